// Control nets in the form: each with its map, which is seen over the picture, and how strongly and when it acts.

import { $, base64Of, element, fileOf } from "./api.js";
import { PICTURES, UNREADABLE, button, labelled, number, numbered, numbers, options, readable, select, set, shownOnce } from "./fields.js";
import * as keep from "./keep.js";
import * as paint from "./paint.js";

const DEFAULTS = { strength: 1, start: 0, end: 1, guess: false, mode: "balanced", preprocess: "none", low: 100, high: 200, resolution: "", resize: "stretch" };
const RESIZES = [["stretch", "stretched"], ["crop", "cropped"], ["fill", "padded"]];
let info;
let fitting = []; // names of the nets that fit the model
let units = [];

export function setUp(about) {
  info = about;
  $("add-control").onclick = () => add({}).inputs.name.focus();
  $("unusable-controls").replaceChildren(...Object.entries(info.unusable.controls).map(
    ([name, why]) => element("li", { textContent: `${name}: ${why}` })));
  paint.whenChanged(() => units.forEach(showUnder));
}

// The nets of another model.
export function fit(model) {
  fitting = model.controls;
  $("add-control").hidden = fitting.length === 0;
  $("no-controls").hidden = fitting.length > 0;
  $("no-controls-here").hidden = info.controls.length > 0;
  for (const unit of units) nets(unit, unit.inputs.name.value);
}

function nets(unit, chosen) {
  const names = fitting.includes(chosen) || !chosen ? fitting : [chosen, ...fitting];
  unit.inputs.name.replaceChildren(...options(names.map((name) => [name, fitting.includes(name) ? name : `${name} (does not fit)`])));
  unit.inputs.name.value = chosen || fitting[0];
}

// --- one unit -----------------------------------------------------------------------------------------------------

function add(given) {
  const inputs = {
    name: select([]), preprocess: select(info.preprocessors.map((name) => [name, name])), mode: select(Object.entries(info.control_modes)),
    strength: number(0, 10, 0.05), start: number(0, 1, 0.05), end: number(0, 1, 0.05), low: number(0, 10000, 10), high: number(0, 10000, 10),
    resolution: number(64, 2048, 8), resize: select(RESIZES), kind: number(0, 15, 1), guess: element("input", { type: "checkbox" }),
  };
  const unit = { image: given.image ?? null, inputs, turn: 0 };
  nets(unit, given.name);
  for (const [name, value] of Object.entries(DEFAULTS)) set(inputs[name], given[name] ?? value);
  inputs.kind.value = given.kind?.[0] ?? 0;
  inputs.resolution.placeholder = "unchanged";
  build(unit);
  units.push(unit);
  $("controls").append(unit.root);
  $("control-section").open = true;
  numbered(units, "Control");
  refresh(unit);
  return unit;
}

function build(unit) {
  const { name, preprocess, mode, strength, start, end, low, high, resolution, resize, kind, guess } = unit.inputs;
  unit.file = element("input", { type: "file", accept: PICTURES });
  unit.drop = element("label", { className: "drop" }, unit.file, element("span", { textContent: "Drop a map here, paste one, or choose a file" }));
  unit.under = element("img", { className: "under", alt: "The picture that is drawn over", hidden: true });
  unit.map = element("img", { className: "map", alt: "Control map" });
  unit.opacity = element("input", { type: "range", min: 0, max: 100, value: 60 });
  unit.seeing = labelled("Map over the picture", unit.opacity);
  unit.shown = element("div", { className: "map-box", hidden: true }, unit.under, unit.map);
  unit.other = button("Another map");
  unit.canny = element("div", { className: "trio" }, labelled("Edges from", low), labelled("sure from", high), labelled("Resolution", resolution));
  unit.note = element("p", { className: "hint" });
  unit.guess = element("label", { className: "check" }, guess, "Guess mode");
  unit.kind = labelled("Kind of map", kind);
  unit.resize = labelled("A map of another shape is", resize);
  const remove = button("Remove");
  unit.legend = element("span", {});
  unit.root = element("fieldset", { className: "unit" },
    element("legend", {}, unit.legend), labelled("Net", name), labelled("Preprocessor", preprocess), unit.canny, unit.drop, unit.note, unit.shown,
    unit.seeing, element("div", { className: "trio" }, labelled("Strength", strength), labelled("From", start), labelled("to", end)),
    element("div", { className: "pair" }, labelled("Control mode", mode), unit.kind), unit.resize, unit.guess, element("div", { className: "tools" }, unit.other, remove));
  unit.file.onchange = () => unit.file.files[0] && take(unit.root, unit.file.files[0]);
  unit.other.onclick = () => unit.file.click();
  unit.opacity.oninput = () => showUnder(unit);
  unit.root.onchange = (event) => {
    if (event.target === unit.file || event.target === unit.opacity) return;
    if ([name, preprocess, low, high, resolution].includes(event.target)) refresh(unit);
    save();
  };
  remove.onclick = () => {
    units = units.filter((one) => one !== unit);
    unit.root.remove();
    numbered(units, "Control");
    save();
    $("add-control").focus();
  };
}

// A file for the unit that this element is.
export async function take(root, file) {
  const unit = units.find((one) => one.root === root);
  unit.image = file;
  await refresh(unit);
  save();
}

// --- the map ------------------------------------------------------------------------------------------------------

async function refresh(unit) {
  const turn = ++unit.turn;
  const { preprocess, name } = unit.inputs;
  const net = info.control_nets[name.value] ?? { kinds: 0, adapter: false };
  const reads = preprocess.value === "inpaint"; // the picture that is drawn over
  unit.canny.hidden = preprocess.value !== "canny";
  unit.kind.hidden = net.kinds === 0;
  unit.inputs.kind.max = Math.max(0, net.kinds - 1);
  unit.guess.hidden = net.adapter;
  unit.resize.hidden = reads;
  unit.drop.hidden = reads || unit.image !== null;
  unit.other.hidden = reads || unit.image === null;
  unit.root.querySelector(".error")?.remove();
  let made = null;
  try {
    made = reads || !unit.image ? null : preprocess.value === "none" ? unit.image : await preprocessed(unit);
    if (made && !(await readable(made))) throw new Error(UNREADABLE);
  } catch (error) {
    if (turn === unit.turn) unit.root.append(element("p", { className: "error", role: "alert", textContent: error.message }));
    made = null;
  }
  if (turn !== unit.turn) return; // something was changed meanwhile
  if (made) shownOnce(unit.map, made);
  else unit.map.removeAttribute("src");
  unit.made = made;
  showUnder(unit);
}

async function preprocessed(unit) {
  const { preprocess, low, high, resolution } = unit.inputs;
  const body = { image: await base64Of(unit.image), preprocess: preprocess.value, ...numbers({ low, high, resolution }) };
  return fileOf("/api/preprocess", body);
}

// The map alone, or over the picture that is drawn over.
function showUnder(unit) {
  const under = paint.url();
  const reads = unit.inputs.preprocess.value === "inpaint";
  unit.note.hidden = !reads && (unit.image !== null || !under);
  unit.note.textContent = reads ? "It reads the start picture and its mask." : "Without a map it reads the start picture.";
  unit.shown.hidden = !unit.made;
  unit.seeing.hidden = !unit.made || !under;
  unit.under.hidden = !under;
  if (under) unit.under.src = under;
  unit.map.classList.toggle("over", Boolean(under));
  unit.map.style.opacity = under ? unit.opacity.value / 100 : 1;
}

// --- to the server, and back --------------------------------------------------------------------------------------

// As it is kept in the browser: fields of a request, and its picture as a Blob.
function state(unit) {
  const { name, preprocess, mode, guess, kind, low, high, resolution, resize, strength, start, end } = unit.inputs;
  const net = info.control_nets[name.value];
  return {
    name: name.value, preprocess: preprocess.value, mode: mode.value, guess: guess.checked && !net?.adapter, image: unit.image,
    ...numbers({ strength, start, end }), ...(preprocess.value === "canny" ? numbers({ low, high, resolution }) : {}),
    ...(resize.value === "stretch" ? {} : { resize: resize.value }),
    ...(net?.kinds ? { kind: Object.values(numbers({ kind })) } : {}),
  };
}

export const kept = () => units.map(state);

// Likewise with the map that the net reads, to be seen over the picture.
export const withMaps = (states) => states.map((one, i) => ({ ...one, map: units[i]?.made ?? null }));

export async function request() {
  return Promise.all(kept().map(async ({ image, ...fields }) => (image && fields.preprocess !== "inpaint" ? { ...fields, image: await base64Of(image) } : fields)));
}

// In place of what is there; how many of them lack their map.
export function fill(given) {
  units = [];
  $("controls").replaceChildren();
  given.forEach(add);
  $("control-section").open = given.length > 0;
  save();
  return given.filter((one) => !one.image && one.preprocess !== "inpaint").length;
}

// A picture of the gallery, as one more unit: its edges where the server can find them.
export function addPicture(image) {
  const unit = add({ image, preprocess: info.preprocessors.includes("canny") ? "canny" : "none" });
  save();
  unit.root.scrollIntoView({ block: "nearest" });
  unit.inputs.name.focus();
}

const save = () => keep.keepForm("controls", kept());

export async function restore() {
  (await keep.keptForm("controls"))?.forEach(add);
}
