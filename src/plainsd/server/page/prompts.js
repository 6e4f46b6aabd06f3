// Image prompts in the form: an IP-Adapter each, with its pictures, where, how strongly and when it acts.

import { $, base64Of, element, toast } from "./api.js";
import { PICTURES, UNREADABLE, button, labelled, number, numbered, numbers, readable, select, set, shownOnce } from "./fields.js";
import * as keep from "./keep.js";
import * as paint from "./paint.js";

const MOST = 16; // pictures of one, and masks
const DEFAULTS = { strength: 1, start: 0, end: 1 };
let info;
let units = [];

export function setUp(about) {
  info = about;
  $("add-image-prompt").onclick = () => add({}).inputs.name.focus();
  $("add-image-prompt").hidden = info.image_prompts.length === 0;
  $("no-image-prompts").hidden = info.image_prompts.length > 0;
  paint.whenChanged(() => units.forEach((unit) => (unit.painted.hidden = !paint.hasPicture())));
}

// --- one of them --------------------------------------------------------------------------------------------------

function add(given) {
  const names = !given.name || info.image_prompts.includes(given.name) ? info.image_prompts : [given.name, ...info.image_prompts];
  const inputs = {
    name: select(names.map((name) => [name, name])), strength: number(0, 10, 0.05), start: number(0, 1, 0.05), end: number(0, 1, 0.05),
    encoder: select([["", "the first that fits"], ...info.image_encoders.map((name) => [name, name])]),
  };
  const unit = { images: [...(given.images ?? [])], masks: [...(given.masks ?? [])], inputs };
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
  unit.maskFile = element("input", { type: "file", accept: PICTURES, multiple: true });
  unit.maskDrop = element("label", { className: "drop" }, unit.maskFile, element("span", { textContent: "Drop a mask here, paste one, or choose a file" }));
  unit.maskThumbs = element("ul", { className: "thumbs", ariaLabel: "Masks" });
  unit.painted = button("Use the painted mask", { hidden: !paint.hasPicture() });
  unit.masked = element("details", { className: "masked", open: unit.masks.length > 0 }, element("summary", { textContent: "Mask" }),
    element("p", { className: "hint", textContent: "Acts where the mask is light. One for all pictures, or one for each." }),
    unit.maskThumbs, unit.maskDrop, unit.painted);
  unit.legend = element("span", {});
  const encoders = labelled("Image encoder", encoder);
  encoders.hidden = info.image_encoders.length < 2;
  const remove = button("Remove");
  unit.root = element("fieldset", { className: "unit" }, element("legend", {}, unit.legend), labelled("Adapter", name), unit.pictures, unit.drop,
    element("div", { className: "trio" }, labelled("Strength", strength), labelled("From", start), labelled("to", end)), unit.masked, encoders,
    element("div", { className: "tools" }, remove));
  for (const file of [unit.file, unit.maskFile]) {
    file.onchange = async () => {
      await take(unit.root, file, ...file.files);
      file.value = "";
    };
  }
  unit.painted.onclick = async () => {
    const mask = await paint.mask();
    if (mask) await take(unit.root, unit.maskFile, mask);
    else toast("Nothing is painted over the start picture.");
  };
  unit.root.onchange = (event) => event.target.type !== "file" && save();
  remove.onclick = () => {
    units = units.filter((one) => one !== unit);
    unit.root.remove();
    numbered(units, "Image prompt");
    save();
    $("add-image-prompt").focus();
  };
}

export const owns = (root) => units.some((unit) => unit.root === root);

// Files for the one that this element is: masks, if they were dropped at `place` in its part for masks, else pictures.
export async function take(root, place, ...files) {
  const unit = units.find((one) => one.root === root);
  const [list, what] = unit.masked.contains(place) ? [unit.masks, "masks"] : [unit.images, "pictures"];
  for (const file of files) {
    if (!(await readable(file))) toast(UNREADABLE);
    else if (list.length < MOST) list.push(file);
    else toast(`An image prompt has at most ${MOST} ${what}.`);
  }
  show(unit);
  save();
}

function show(unit) {
  thumbs(unit, unit.pictures, unit.images, "Picture", unit.file);
  thumbs(unit, unit.maskThumbs, unit.masks, "Mask", unit.maskFile);
}

// The files of a list, each with a button that removes it; then `otherwise` has the focus when none is left.
function thumbs(unit, place, files, word, otherwise) {
  place.replaceChildren(...files.map((file, i) => {
    const out = button("×", { ariaLabel: `Remove ${word.toLowerCase()} ${i + 1}` });
    out.onclick = () => {
      files.splice(files.indexOf(file), 1);
      show(unit);
      save();
      (place.querySelector("button") ?? otherwise).focus();
    };
    return element("li", {}, shownOnce(element("img", { alt: `${word} ${i + 1} of the prompt` }), file), out);
  }));
  place.hidden = files.length === 0;
}

// --- to the server, and back --------------------------------------------------------------------------------------

// As they are kept in the browser: fields of a request, and their pictures and masks as Blobs.
export const kept = () => units.map(({ images, masks, inputs }) => ({
  name: inputs.name.value, images, ...(masks.length ? { masks } : {}), ...numbers({ strength: inputs.strength, start: inputs.start, end: inputs.end }),
  ...(inputs.encoder.value ? { encoder: inputs.encoder.value } : {}),
}));

export const request = () => Promise.all(kept().map(async ({ images, masks = [], ...one }) => ({
  ...one, images: await Promise.all(images.map(base64Of)), ...(masks.length ? { masks: await Promise.all(masks.map(base64Of)) } : {}),
})));

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
