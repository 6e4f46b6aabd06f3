// Everything made, newest first; and one picture at a time, with what made it.

import { $, call, element, toast } from "./api.js";
import * as form from "./form.js";
import * as paint from "./paint.js";

let shown = []; // pictures, newest first
let next = null;
let current = -1;
let loading = 0;
const starts = new Map(); // job id -> picture and mask that it was drawn on, for as long as the page is open

export const remember = (job, start) => starts.set(job, start);

export async function load(more = false) {
  const turn = ++loading;
  const query = new URLSearchParams({ search: $("search").value, limit: 48 });
  if (more && next !== null) query.set("before", next);
  const told = await call(`/api/images?${query}`);
  if (turn !== loading) return; // a later search has overtaken this one
  shown = more ? [...shown, ...told.images] : told.images;
  next = told.next;
  const tiles = new Map([...$("gallery").children].map((old) => [old.dataset.id, old])); // those that stay do not blink
  $("gallery").replaceChildren(...shown.map((picture) => tiles.get(picture.id) ?? tile(picture)));
  $("more").hidden = next === null;
  $("empty").hidden = shown.length > 0;
  $("empty").textContent = $("search").value ? "No prompt here has all of these words." : "Nothing here yet. Say what to draw, and press Draw.";
}

function tile(picture) {
  const image = element("img", { src: picture.thumbnail, alt: picture.settings.prompt || "picture without a prompt", loading: "lazy" });
  const button = element("button", { type: "button", className: picture.settings.grid ? "tile sheet" : "tile", title: picture.settings.prompt }, image);
  button.dataset.id = picture.id;
  button.onclick = () => open(picture.id);
  return button;
}

export function open(id) {
  const place = shown.findIndex((picture) => picture.id === id);
  if (place >= 0) view(place);
}

// --- one picture --------------------------------------------------------------------------------------------------

const LABELS = {
  model: "Model", size: "Size", steps: "Steps", sampler: "Sampler", spacing: "Spacing", guidance: "Guidance", seed: "Seed",
  strength: "Strength", negative: "Without", clip_skip: "Clip skip", eta: "Eta", hires: "Enlarged", upscaler: "By",
  variation_seed: "Variation seed", variation_strength: "Variation", rescale: "Rescale", interval: "Guidance from, to",
  perturbed: "Perturbed", threshold: "Threshold", apg: "Projected",
  apg_parallel: "Projected, along", apg_momentum: "Projected, momentum", cache: "Deep cache", refiner: "Refiner", handover: "Refiner from", embeddings: "Embeddings",
  outpaint: "Continued", grid: "Compared", image_guidance: "Of the picture", mask_blur: "Soft edge", mask_grow: "Mask widened",
  masked_padding: "Around the mask", masked_content: "Mask starts from", soft_mask: "Soft mask", tiling: "Seamless",
  like: "As drawn by", noise: "Random numbers",
};
const PLAIN = { clip_skip: 1, upscaler: "latent", variation_strength: 0, rescale: 0, perturbed: 0, apg: 0, apg_parallel: 0, apg_momentum: -0.5,
  negative: "", mask_blur: 0, mask_grow: 0, masked_content: "original", soft_mask: false, tiling: false };

function view(place) {
  current = place;
  const picture = shown[place];
  const { settings } = picture;
  $("viewer-image").src = picture.url;
  $("viewer-image").alt = settings.prompt;
  $("viewer-prompt").textContent = settings.prompt || "(no prompt)";
  const told = (value, plain) => value !== null && value !== undefined && value !== plain && value?.length !== 0;
  const rows = Object.entries(LABELS).filter(([name]) => told(settings[name], PLAIN[name]));
  const loras = picture.loras.map(({ name, strength }) => `${name} ${strength}`).join(", ");
  $("viewer-settings").replaceChildren(
    ...rows.flatMap(([name, label]) => pair(label, form.worded(name, settings[name]))),
    ...(loras ? pair("LoRAs", loras) : []), ...pair("Made", new Date(1000 * picture.created).toLocaleString()));
  $("download").href = picture.url;
  $("download").download = `${picture.id}.png`;
  $("newer").disabled = place === 0;
  $("older").disabled = place === shown.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}

const pair = (label, value) => [element("dt", { textContent: label }), element("dd", { textContent: value })];

function move(by) {
  if (shown[current + by]) view(current + by);
}

function use(withSeed) {
  const { settings, loras } = shown[current];
  form.fill(withSeed ? settings : { ...settings, seed: "" }, loras);
  const start = starts.get(shown[current].job);
  if (start) paint.putBack(start);
  else paint.remove();
  $("viewer").close();
  $("prompt").focus();
  if (!start && settings.strength !== null && settings.strength !== undefined && !settings.hires) {
    return toast("Settings restored. It was drawn on a picture that is not here any more: put that in again first.");
  }
  toast(withSeed ? "Settings restored, with the seed." : "Settings restored, with a new seed each time.");
}

async function usePicture() {
  const blob = await (await fetch(shown[current].url)).blob();
  await paint.take(blob, Math.sqrt(shown[current].width * shown[current].height));
  $("viewer").close();
  $("start").scrollIntoView({ block: "nearest" });
}

async function remove() {
  const picture = shown[current];
  if (!confirm("Delete this picture and its file?")) return;
  await call(`/api/images/${picture.id}`, undefined, "DELETE");
  $("viewer").close();
  await load();
}

export function setUp() {
  let waiting;
  $("search").oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(load, 200);
  };
  $("more").onclick = () => load(true);
  $("use").onclick = () => use(true);
  $("use-new-seed").onclick = () => use(false);
  $("use-picture").onclick = usePicture;
  $("delete").onclick = () => remove().catch((error) => toast(error.message));
  $("newer").onclick = () => move(-1);
  $("older").onclick = () => move(1);
  $("close").onclick = () => $("viewer").close();
  $("viewer").onclick = (event) => event.target === $("viewer") && $("viewer").close();
  $("viewer").onkeydown = (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  };
  $("stage").onclick = (event) => event.target.dataset.id && open(event.target.dataset.id);
  $("stage").onkeydown = (event) => {
    if (!event.target.dataset.id || ![" ", "Enter"].includes(event.key) || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // the space bar would scroll
    open(event.target.dataset.id);
  };
}
