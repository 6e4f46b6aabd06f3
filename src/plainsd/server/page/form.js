// The form: from fields to a request and back.

import { $, element, toast } from "./api.js";
import { clearErrors } from "./errors.js";
import { absent, options } from "./fields.js";
import * as kept from "./kept.js";
import * as loras from "./loras.js";
import * as paint from "./paint.js";
import * as prompts from "./prompts.js";
import * as rules from "./rules.js";
import * as storage from "./storage.js";
import * as units from "./units.js";

const NUMBERS = ["steps", "guidance", "image_guidance", "count", "strength", "mask_blur", "mask_grow", "masked_padding", "hires", "variation_strength", "clip_skip", "eta",
  "rescale", "perturbed", "threshold", "apg", "cache", "handover"];
const TEXTS = ["prompt", "negative", "model", "sampler", "spacing", "seed", "upscaler", "variation_seed", "refiner", "like", "noise", "masked_content"];
const CHECKS = ["tiling", "soft_mask"];
const SIDES = ["left", "top", "right", "bottom"].map((side) => `outpaint-${side}`);
const OF_MASK = ["mask_blur", "mask_grow", "masked_padding", "masked_content", "soft_mask"];
const DRAFT = "plainsd.draft";
let info;
let settled = []; // prompts of a picture, whose choices are made: they are drawn as they are until they are edited
let lastSeed = null;

const modelOf = (name) => info.models.find((model) => model.name === name) ?? info.models[0];

export function setUp(told) {
  info = told;
  $("model").replaceChildren(...options(info.models.map((model) => [model.name, model.name])));
  $("model").value = info.default;
  $("model-field").hidden = info.models.length < 2;
  $("spacing").replaceChildren(...options([["", "Automatic"], ...Object.entries(info.spacings)]));
  $("upscaler").replaceChildren(...options([["", "latent"], ...info.upscalers.filter((name) => name !== "latent").map((name) => [name, name])]));
  $("masked_content").replaceChildren(...options(info.masked_contents.map((name) => [name === "original" ? "" : name, name])));
  $("like").replaceChildren(...options([["", "plainsd"], ...info.like.map((name) => [name, name])]));
  $("noise").replaceChildren(...options([["", "as it draws"], ...info.noises.map((name) => [name, name])]));
  $("styles").replaceChildren(...options(info.styles.map((name) => [name, name])));
  $("styles-field").hidden = info.styles.length === 0 && Object.keys(info.unusable.styles).length === 0;
  for (const side of ["x", "y"]) {
    $(`${side}-name`).replaceChildren(...options([["", "–"], ...info.grid.map((name) => [name, name.replaceAll("_", " ")])]));
  }
  $("count").max = info.limits.count;
  $("steps").max = info.limits.steps;
  $("steps-range").max = Math.min(60, info.limits.steps);
  for (const kind of ["loras", "embeddings", "upscalers", "styles"]) {
    $(`unusable-${kind}`).replaceChildren(...Object.entries(info.unusable[kind]).map(
      ([name, why]) => element("li", { textContent: `${name}: ${why}` })));
  }
  units.setUp(info);
  prompts.setUp(info);
  kept.setUp(edited);
  loras.setUp(info, edited);
  rules.setUp(info);
  takeDefaults();
  restoreDraft();
  wire();
}

function wire() {
  for (const name of ["steps", "guidance", "image_guidance"]) {
    $(`${name}-range`).oninput = () => ($(name).value = $(`${name}-range`).value);
    $(name).addEventListener("input", () => ($(`${name}-range`).value = $(name).value));
  }
  for (const field of ["prompt", "negative"]) {
    $(field).addEventListener("input", () => (settled = settled.filter((name) => name !== field)));
  }
  $("model").onchange = takeDefaults;
  $("idea").onclick = () => {
    const { ideas } = modelOf($("model").value);
    put("prompt", ideas[Math.floor(Math.random() * ideas.length)]);
    $("prompt").focus();
  };
  $("swap").onclick = () => {
    const { value } = $("width");
    $("width").value = $("height").value;
    put("height", value);
  };
  $("random-seed").onclick = () => put("seed", "");
  $("last-seed").onclick = () => put("seed", lastSeed);
  $("form").addEventListener("input", clearErrors);
  for (const kind of ["input", "change"]) $("form").addEventListener(kind, save);
  paint.whenChanged(save);
}

// The form as it is, for the next time; and what it shows of it.
function save() {
  storage.write(DRAFT, JSON.stringify(draft()));
  placeStrength();
}

const edited = (field = $("form")) => field.dispatchEvent(new Event("input", { bubbles: true }));

// By a button, as if it were typed.
function put(name, value) {
  $(name).value = value;
  edited($(name));
}

// Of the start picture, or of the second pass: beside what it belongs to.
function placeStrength() {
  const field = $("strength").closest(".field");
  const ofHires = !paint.hasPicture() && (Number($("hires").value) > 0 || grid().some((axis) => axis.name === "hires"));
  const place = ofHires ? $("upscaler") : $("mask_blur");
  if (ofHires && field.hidden) $("more-section").open = true;
  field.hidden = !ofHires && !paint.hasPicture();
  if (ofHires !== $("more-section").contains(field)) place.closest(".field").before(field);
  $("strength").placeholder = ofHires ? "0.7" : "0.75; mask: 1";
}

// What suits the model, in place of what suited the one before.
function takeDefaults() {
  const model = modelOf($("model").value);
  const { defaults, ideas, refiners, embeddings, edits } = model;
  units.fit(model);
  const { size, steps, guidance, sampler } = defaults;
  $("idea").hidden = ideas.length === 0;
  $("image_guidance").closest(".field").hidden = !edits;
  for (const side of [$("width"), $("height")]) side.min = side.step = model.size_multiple;
  paint.setNative(size[0], model.size_multiple);
  [$("width").value, $("height").value] = paint.hasPicture() ? paint.size() : size;
  set("steps", steps);
  set("guidance", guidance);
  const names = Object.entries(info.samplers).map(([name, label]) => [name, label]);
  $("sampler").replaceChildren(...options([["", `${info.samplers[sampler]} (default)`], ...names]));
  $("refiner").replaceChildren(...options([["", "none"], ...refiners.map((name) => [name, name])]));
  for (const name of ["refiner", "handover"]) $(name).closest(".field").hidden = refiners.length === 0;
  $("embeddings").replaceChildren(...embeddings.map((word) => {
    const button = element("button", { type: "button", className: "small", textContent: word, ariaLabel: `Write ${word} into the prompt` });
    button.onclick = () => write(word);
    return button;
  }));
  $("no-embeddings").hidden = embeddings.length > 0;
}

// A learned word, at the end of the prompt.
function write(word) {
  put("prompt", `${$("prompt").value.trimEnd()} ${word}`.trimStart());
  $("prompt").focus();
}

function set(name, value) {
  $(name).value = value ?? "";
  if ($(`${name}-range`)) $(`${name}-range`).value = $(name).value;
}

// A setting as a reader sees it.
export function worded(name, value) {
  if (["size", "seed_resize"].includes(name)) return value.join(" × ");
  const labels = { sampler: info.samplers, spacing: info.spacings }[name.replace("hires_", "")] ?? {};
  if (name === "grid") return value.map((axis) => `${axis.name.replaceAll("_", " ")} ${axis.values.map((one) => worded(axis.name, one)).join(", ")}`).join(" × ");
  if (typeof value === "boolean") return value ? "yes" : "no";
  return labels[value] ?? [value].flat().join(", ");
}

export function usedSeed(seed) {
  lastSeed = String(seed);
  $("last-seed").disabled = false;
  $("last-seed").title = lastSeed;
}

// --- to the server ------------------------------------------------------------------------------------------------

function draft() {
  const fields = {};
  for (const name of TEXTS) if ($(name).value.trim() !== "") fields[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value !== "") fields[name] = Number($(name).value);
  for (const name of CHECKS) if ($(name).checked) fields[name] = true;
  const styles = [...$("styles").selectedOptions].map((one) => one.value);
  if (styles.length) fields.styles = styles;
  if ($("interval").value.trim() !== "") fields.interval = $("interval").value;
  fields.size = [Number($("width").value), Number($("height").value)];
  const sides = SIDES.map((id) => Number($(id).value));
  if (sides.some(Boolean)) fields.outpaint = sides;
  const rows = loras.fields();
  if (rows.length) fields.loras = rows;
  const axes = grid();
  if (axes.some((axis) => axis.name)) fields.grid = axes;
  if (settled.length) fields.settled = settled;
  return { ...fields, ...kept.fields() };
}

const grid = () => ["x", "y"].map((side) => ({
  name: $(`${side}-name`).value,
  values: $(`${side}-values`).value.split(",").map((value) => value.trim()).filter((value) => value !== ""),
}));

// What a job is drawn on, as the browser keeps it; null where it is drawn from text alone.
export async function inputs() {
  const [start, controls, images] = [await paint.kept(), units.kept(), prompts.kept()];
  return start || controls.length || images.length ? { start, controls: units.withMaps(controls), images } : null;
}

export async function request() {
  rules.checkNumbers($("form"));
  const fields = draft();
  const controls = await units.request();
  if (controls.length) fields.controls = controls;
  const images = await prompts.request();
  if (images.length) fields.image_prompts = images;
  if (fields.interval) fields.interval = rules.interval(fields.interval);
  if (fields.grid) fields.grid = rules.grid(fields.grid);
  const onlyMasked = fields.masked_padding !== undefined && !fields.outpaint;
  if (paint.hasPicture()) Object.assign(fields, await paint.pictures(fields.size, onlyMasked));
  else delete fields.outpaint;
  if (!fields.mask && !fields.outpaint) for (const name of OF_MASK) delete fields[name];
  if ($("image_guidance").closest(".field").hidden) delete fields.image_guidance;
  if (fields.outpaint) delete fields.size; // the picture's own, and what is added
  if (fields.grid) delete fields.count;
  return rules.effective(fields);
}

// --- back into the form -------------------------------------------------------------------------------------------

// The settings of a picture, whose size is with what is added at its sides. What is not on this server is returned, in words.
export function fill(settings, named) {
  const [left, top, right, bottom] = settings.outpaint ?? [0, 0, 0, 0];
  const size = settings.size && [settings.size[0] - left - right, settings.size[1] - top - bottom];
  return apply({ ...settings, size }, named);
}

// Whether a picture with these settings was drawn over another.
export const onPicture = ({ strength, hires }) => (strength ?? null) !== null && !hires;

// Settings as the form has them.
function apply(settings, named = []) {
  const known = modelOf(settings.model);
  if ($("model").value !== known.name) $("model").value = known.name;
  takeDefaults();
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (name in settings) set(name, settings[name]);
    else if (!["model", "steps", "guidance", "count"].includes(name)) set(name, "");
  }
  $("model").value = known.name;
  if (!info.samplers[$("sampler").value]) $("sampler").value = "";
  if (!info.spacings[$("spacing").value]) $("spacing").value = "";
  for (const [name, none] of [["variation_strength", 0], ["rescale", 0], ["perturbed", 0], ["apg", 0], ["upscaler", "latent"], ["clip_skip", 1]]) {
    if (settings[name] === none) set(name, "");
  }
  for (const [name, none] of [["mask_blur", 0], ["mask_grow", 0], ["masked_content", "original"]]) if (settings[name] === none) set(name, "");
  for (const name of CHECKS) $(name).checked = settings[name] === true;
  for (const one of $("styles").options) one.selected = (settings.styles ?? []).includes(one.value);
  $("interval").value = [settings.interval ?? []].flat().join(", ");
  SIDES.forEach((id, i) => set(id, settings.outpaint?.[i]));
  if (settings.size) [$("width").value, $("height").value] = settings.size;
  kept.fill(settings, worded);
  settled = settings.settled ?? [];
  loras.fill(named);
  ["x", "y"].forEach((side, i) => {
    $(`${side}-name`).value = settings.grid?.[i]?.name ?? "";
    $(`${side}-values`).value = settings.grid?.[i]?.values.map((value) => worded(settings.grid[i].name, value)).join(", ") ?? "";
  });
  $("grid-section").open = Boolean(settings.grid);
  clearErrors();
  save();
  const lost = (name) => settings[name] && !$(name).value;
  return [
    settings.model && known.name !== settings.model && `model ${settings.model} (${known.name} instead)`,
    settings.hires && settings.upscaler !== "latent" && lost("upscaler") && `upscaler ${settings.upscaler} (latent instead)`,
    lost("refiner") && `refiner ${settings.refiner}`,
    ...(settings.embeddings ?? []).map((word) => !known.embeddings.includes(word) && `embedding ${word}`),
  ].filter(Boolean);
}

function restoreDraft() {
  try {
    const old = JSON.parse(storage.read(DRAFT));
    const gone = old ? apply(old, old.loras) : [];
    if (gone.length) toast(absent(gone));
  } catch {
    storage.write(DRAFT, "null");
  }
}
