// Image prompts in the form: an IP-Adapter each, with its pictures, and how strongly and when it acts.

import { $, base64Of, element, toast } from "./api.js";
import { PICTURES, UNREADABLE, button, labelled, number, numbered, numbers, readable, select, set, shownOnce } from "./fields.js";
import * as keep from "./keep.js";

const MOST = 16; // pictures of one
const DEFAULTS = { strength: 1, start: 0, end: 1 };
let info;
let units = [];

export function setUp(about) {
  info = about;
  $("add-image-prompt").onclick = () => add({}).inputs.name.focus();
  $("add-image-prompt").hidden = info.image_prompts.length === 0;
  $("no-image-prompts").hidden = info.image_prompts.length > 0;
}

// --- one of them --------------------------------------------------------------------------------------------------

function add(given) {
  const names = !given.name || info.image_prompts.includes(given.name) ? info.image_prompts : [given.name, ...info.image_prompts];
  const inputs = {
    name: select(names.map((name) => [name, name])), strength: number(0, 10, 0.05), start: number(0, 1, 0.05), end: number(0, 1, 0.05),
    encoder: select([["", "the first that fits"], ...info.image_encoders.map((name) => [name, name])]),
  };
  const unit = { images: [...(given.images ?? [])], inputs };
  for (const [name, value] of Object.entries(DEFAULTS)) set(inputs[name], given[name] ?? value);
  if (given.name) inputs.name.value = given.name;
  inputs.encoder.value = info.image_encoders.includes(given.encoder) ? given.encoder : "";
  build(unit);
  units.push(unit);
  $("image-prompts").append(unit.root);
  $("image-prompt-section").open = true;
  numbered(units, "Image prompt");
  show(unit);
  return unit;
}

function build(unit) {
  const { name, strength, start, end, encoder } = unit.inputs;
  unit.file = element("input", { type: "file", accept: PICTURES, multiple: true });
  unit.drop = element("label", { className: "drop" }, unit.file, element("span", { textContent: "Drop pictures here, paste one, or choose files" }));
  unit.pictures = element("ul", { className: "thumbs", ariaLabel: "Pictures used as prompts" });
  unit.legend = element("span", {});
  const encoders = labelled("Image encoder", encoder);
  encoders.hidden = info.image_encoders.length < 2;
  const remove = button("Remove");
  unit.root = element("fieldset", { className: "unit" }, element("legend", {}, unit.legend), labelled("Adapter", name), unit.pictures, unit.drop,
    element("div", { className: "trio" }, labelled("Strength", strength), labelled("From", start), labelled("to", end)), encoders,
    element("div", { className: "tools" }, remove));
  unit.file.onchange = async () => {
    await take(unit.root, ...unit.file.files);
    unit.file.value = "";
  };
  unit.root.onchange = (event) => event.target !== unit.file && save();
  remove.onclick = () => {
    units = units.filter((one) => one !== unit);
    unit.root.remove();
    numbered(units, "Image prompt");
    save();
    $("add-image-prompt").focus();
  };
}

export const owns = (root) => units.some((unit) => unit.root === root);

// Files for the one that this element is.
export async function take(root, ...files) {
  const unit = units.find((one) => one.root === root);
  for (const file of files) {
    if (!(await readable(file))) toast(UNREADABLE);
    else if (unit.images.length < MOST) unit.images.push(file);
    else toast(`An image prompt has at most ${MOST} pictures.`);
  }
  show(unit);
  save();
}

function show(unit) {
  unit.pictures.replaceChildren(...unit.images.map((image, i) => {
    const out = button("×", { ariaLabel: `Remove picture ${i + 1}` });
    out.onclick = () => {
      unit.images = unit.images.filter((one) => one !== image);
      show(unit);
      save();
      (unit.pictures.querySelector("button") ?? unit.file).focus();
    };
    return element("li", {}, shownOnce(element("img", { alt: `Picture ${i + 1} of the prompt` }), image), out);
  }));
  unit.pictures.hidden = unit.images.length === 0;
}

// --- to the server, and back --------------------------------------------------------------------------------------

// As they are kept in the browser: fields of a request, and their pictures as Blobs.
export const kept = () => units.map(({ images, inputs }) => ({
  name: inputs.name.value, images, ...numbers({ strength: inputs.strength, start: inputs.start, end: inputs.end }),
  ...(inputs.encoder.value ? { encoder: inputs.encoder.value } : {}),
}));

export const request = () => Promise.all(kept().map(async (one) => ({ ...one, images: await Promise.all(one.images.map(base64Of)) })));

// In place of what is there; how many of them lack their pictures.
export function fill(given) {
  units = [];
  $("image-prompts").replaceChildren();
  given.forEach(add);
  $("image-prompt-section").open = given.length > 0;
  save();
  return given.filter((one) => !one.images?.length).length;
}

const save = () => keep.keepForm("prompts", kept());

export async function restore() {
  (await keep.keptForm("prompts"))?.forEach(add);
}
