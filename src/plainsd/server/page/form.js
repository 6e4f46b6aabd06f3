// The form: from fields to a request and back, and errors beside the field they are about.

import { $, element } from "./api.js";
import { options } from "./fields.js";
import * as paint from "./paint.js";
import * as prompts from "./prompts.js";
import * as units from "./units.js";

const NUMBERS = ["steps", "guidance", "image_guidance", "count", "strength", "mask_blur", "mask_grow", "masked_padding", "hires", "variation_strength", "clip_skip", "eta",
  "rescale", "perturbed", "threshold", "apg", "cache", "handover"];
const TEXTS = ["prompt", "negative", "model", "sampler", "spacing", "seed", "upscaler", "variation_seed", "refiner", "like", "noise", "masked_content"];
const CHECKS = ["tiling", "soft_mask"];
const SIDES = ["left", "top", "right", "bottom"].map((side) => `outpaint-${side}`);
const OF_MASK = ["mask_blur", "mask_grow", "masked_padding", "masked_content", "soft_mask"];
const WITH_PICTURE = ["strength", ...OF_MASK];
const DRAFT = "plainsd.draft";
let info;
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
  $("no-loras").hidden = info.loras.length > 0;
  $("add-lora").hidden = info.loras.length === 0;
  for (const kind of ["loras", "embeddings", "upscalers", "styles"]) {
    $(`unusable-${kind}`).replaceChildren(...Object.entries(info.unusable[kind]).map(
      ([name, why]) => element("li", { textContent: `${name}: ${why}` })));
  }
  units.setUp(info);
  prompts.setUp(info);
  takeDefaults();
  restoreDraft();
  wire();
}

function wire() {
  for (const name of ["steps", "guidance", "image_guidance"]) {
    $(`${name}-range`).oninput = () => ($(name).value = $(`${name}-range`).value);
    $(name).addEventListener("input", () => ($(`${name}-range`).value = $(name).value));
  }
  $("model").onchange = takeDefaults;
  $("idea").onclick = () => {
    const { ideas } = modelOf($("model").value);
    $("prompt").value = ideas[Math.floor(Math.random() * ideas.length)];
    $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    $("prompt").focus();
  };
  $("swap").onclick = () => ([$("width").value, $("height").value] = [$("height").value, $("width").value]);
  $("random-seed").onclick = () => ($("seed").value = "");
  $("last-seed").onclick = () => ($("seed").value = lastSeed);
  $("add-lora").onclick = () => addLora(info.loras[0], 1);
  $("form").addEventListener("input", () => {
    clearErrors();
    localStorage.setItem(DRAFT, JSON.stringify(draft()));
  });
}

// What suits the model, in place of what suited the one before.
function takeDefaults() {
  const model = modelOf($("model").value);
  const { defaults, ideas, refiners, embeddings, edits } = model;
  units.fit(model);
  const { size, steps, guidance, sampler } = defaults;
  $("idea").hidden = ideas.length === 0;
  $("image_guidance").closest(".field").hidden = !edits;
  [$("width").value, $("height").value] = size;
  for (const side of [$("width"), $("height")]) side.min = side.step = model.size_multiple;
  paint.setNative(size[0]);
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
  $("prompt").value = `${$("prompt").value.trimEnd()} ${word}`.trimStart();
  $("prompt").dispatchEvent(new Event("input", { bubbles: true }));
  $("prompt").focus();
}

function set(name, value) {
  $(name).value = value ?? "";
  if ($(`${name}-range`)) $(`${name}-range`).value = $(name).value;
}

// A setting as a reader sees it.
export function worded(name, value) {
  if (name === "size") return value.join(" × ");
  const labels = { sampler: info.samplers, spacing: info.spacings }[name] ?? {};
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
  const [low, high] = $("interval").value.split(",").map((part) => part.trim());
  if (low && high) fields.interval = [low, high];
  fields.size = [Number($("width").value), Number($("height").value)];
  const sides = SIDES.map((id) => Number($(id).value));
  if (sides.some(Boolean)) fields.outpaint = sides;
  const loras = [...$("loras").children].map((row) => ({
    name: row.querySelector("select").value, strength: Number(row.querySelector("input").value),
  }));
  if (loras.length) fields.loras = loras;
  return fields;
}

function grid() {
  const axes = ["x", "y"].map((side) => ({
    name: $(`${side}-name`).value,
    values: $(`${side}-values`).value.split(",").map((value) => value.trim()).filter((value) => value !== ""),
  }));
  return axes.filter((axis) => axis.name);
}

export async function request() {
  const fields = draft();
  const controls = await units.request();
  if (controls.length) fields.controls = controls;
  const images = await prompts.request();
  if (images.length) fields.image_prompts = images;
  if (paint.hasPicture()) Object.assign(fields, await paint.pictures(...fields.size));
  else delete fields.outpaint;
  if (!fields.image && !fields.hires) delete fields.strength;
  if (!fields.mask && !fields.outpaint) for (const name of OF_MASK) delete fields[name];
  if ($("image_guidance").closest(".field").hidden) delete fields.image_guidance;
  if (fields.outpaint) delete fields.size; // the picture's own, and what is added
  if (!fields.refiner) delete fields.handover;
  const axes = grid();
  if (axes.length) {
    fields.grid = axes;
    delete fields.count;
  }
  return fields;
}

// --- back into the form -------------------------------------------------------------------------------------------

export function fill(settings, loras = []) {
  const known = modelOf(settings.model);
  if ($("model").value !== known.name) $("model").value = known.name;
  takeDefaults();
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (name in settings) set(name, settings[name]);
    else if (!["model", "steps", "guidance", "count", ...WITH_PICTURE].includes(name)) set(name, "");
  }
  $("model").value = known.name;
  if (!info.samplers[$("sampler").value]) $("sampler").value = "";
  if (!info.spacings[$("spacing").value]) $("spacing").value = "";
  for (const [name, none] of [["variation_strength", 0], ["rescale", 0], ["perturbed", 0], ["apg", 0], ["upscaler", "latent"], ["clip_skip", 1]]) {
    if (settings[name] === none) set(name, "");
  }
  for (const [name, none] of [["mask_blur", 0], ["mask_grow", 0], ["masked_content", "original"]]) if (settings[name] === none) set(name, "");
  for (const name of CHECKS) if (name in settings || !WITH_PICTURE.includes(name)) $(name).checked = settings[name] === true;
  for (const one of $("styles").options) one.selected = (settings.styles ?? []).includes(one.value);
  $("interval").value = settings.interval?.join(", ") ?? "";
  const sides = settings.outpaint ?? ["", "", "", ""];
  SIDES.forEach((id, i) => set(id, sides[i]));
  if (settings.size) [$("width").value, $("height").value] = [settings.size[0] - sides[0] - sides[2], settings.size[1] - sides[1] - sides[3]];
  $("loras").replaceChildren();
  for (const { name, strength } of loras) addLora(name, strength);
  $("lora-section").open = loras.length > 0;
  ["x", "y"].forEach((side, i) => {
    $(`${side}-name`).value = settings.grid?.[i]?.name ?? "";
    $(`${side}-values`).value = settings.grid?.[i]?.values.map((value) => worded(settings.grid[i].name, value)).join(", ") ?? "";
  });
  $("grid-section").open = Boolean(settings.grid);
  clearErrors();
  localStorage.setItem(DRAFT, JSON.stringify(draft()));
}

function addLora(name, strength) {
  const names = info.loras.includes(name) ? info.loras : [name, ...info.loras];
  const choice = element("select", { ariaLabel: "LoRA" }, ...options(names.map((one) => [one, one])));
  choice.value = name;
  const amount = element("input", { type: "number", step: "0.1", min: "-10", max: "10", value: strength, ariaLabel: "Strength" });
  const remove = element("button", { type: "button", className: "small", textContent: "×", ariaLabel: "Remove this LoRA" });
  const row = element("div", { className: "lora" }, choice, amount, remove);
  remove.onclick = () => row.remove();
  $("loras").append(row);
}

function restoreDraft() {
  try {
    const kept = JSON.parse(localStorage.getItem(DRAFT));
    if (kept) fill(kept, kept.loras);
    if (kept) [$("width").value, $("height").value] = kept.size;
  } catch {
    localStorage.removeItem(DRAFT);
  }
}

// --- errors -------------------------------------------------------------------------------------------------------

export function clearErrors() {
  $("form-error").textContent = "";
  for (const old of document.querySelectorAll("[data-field] .error")) old.remove();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// Beside the field if the error is about one, or beside the unit of it; else below the button.
export function showError(error) {
  clearErrors();
  const field = error.field && document.querySelector(`[data-field="${CSS.escape(error.field)}"]`);
  const place = field?.querySelector(`[data-entry="${error.entry}"]`) ?? field;
  if (!place || place.closest("[hidden]")) {
    $("form-error").textContent = error.message;
    return;
  }
  for (let inside = place; inside; inside = inside.parentElement) if (inside.tagName === "DETAILS") inside.open = true;
  const id = `error-${error.field}`;
  place.append(element("p", { className: "error", id, textContent: error.message, role: "alert" }));
  const input = place.querySelector("input:not([type=file]), textarea, select");
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-describedby", id);
  input?.focus();
}
