// Everything made, newest first; and one picture at a time, with what made it.

import { $, call, element, fileOf, toast } from "./api.js";
import { absent, missing } from "./fields.js";
import * as form from "./form.js";
import * as keep from "./keep.js";
import * as kept from "./kept.js";
import * as paint from "./paint.js";
import * as prompts from "./prompts.js";
import * as selection from "./selection.js";
import * as units from "./units.js";

const AT_ONCE = 48;
const MOST = 200; // in one answer
let shown = []; // pictures, newest first
let next = null;
let opened = null; // the picture in the viewer
let searches = 0; // how many there were: the latest overtakes what was asked before
let last = Promise.resolve(); // the loading that was begun last

const failed = (error) => toast(error.message);

// After the loading that was begun last, so that neither undoes what the other shows.
function inTurn(act) {
  last = last.catch(() => {}).then(act);
  return last;
}

// The newest.
export function load() {
  const turn = ++searches;
  last = answer(null, AT_ONCE).then((told) => turn === searches && show(told.images, told.next));
  return last;
}

// The next ones after those that are there.
const older = () => inTurn(async () => {
  const turn = searches;
  if (next === null) return;
  const told = await answer(next, AT_ONCE);
  if (turn === searches) show([...shown, ...told.images], told.next);
});

// As many as there were, and all that are selected or open: whatever is new, these stay.
export const reload = () => inTurn(async () => {
  const turn = searches;
  const length = Math.max(AT_ONCE, shown.length);
  const oldest = Math.min(...shown.filter(({ id }) => selection.isChosen(id) || id === opened?.id).map(({ number }) => number));
  const images = [];
  let before = null;
  do {
    const told = await answer(before, Math.min(MOST, Math.max(AT_ONCE, length - images.length)));
    if (turn !== searches) return;
    images.push(...told.images);
    before = told.next;
  } while (before !== null && (images.length < length || before > oldest));
  const staying = images.filter(({ number }, i) => i < length || number >= oldest);
  show(staying, staying.length < images.length ? staying.at(-1).number : before);
});

function answer(before, limit) {
  const query = new URLSearchParams({ search: $("search").value, limit });
  if (before !== null) query.set("before", before);
  if (onlyFavourites()) query.set("favourites", "true");
  return call(`/api/images?${query}`);
}

function show(images, after) {
  [shown, next] = [images, after];
  arrange();
  if (opened) around();
  $("more").hidden = next === null;
  $("empty").hidden = shown.length > 0;
  $("empty").textContent = $("search").value ? "No prompt contains all of these words."
    : onlyFavourites() ? "No favourites yet. Press the star of a picture." : "No pictures yet. Write a prompt and press Generate.";
}

const onlyFavourites = () => $("favourites").ariaPressed === "true";

// One cell for each picture; those that stay are moved only where they must be, so that the focus stays too.
function arrange() {
  const old = new Map(cells().map((cell) => [cell.dataset.id, cell]));
  const wanted = shown.map((picture) => old.get(picture.id) ?? cellOf(picture));
  for (const cell of cells()) if (!wanted.includes(cell)) cell.remove();
  wanted.forEach((cell, i) => {
    if ($("gallery").children[i] !== cell) $("gallery").insertBefore(cell, $("gallery").children[i] ?? null);
    starred(cell, shown[i].favourite);
  });
  selection.show();
}

const cells = () => [...$("gallery").children];

function starred(cell, favourite) {
  cell.classList.toggle("favourite", favourite);
  cell.querySelector(".star").ariaPressed = String(favourite);
}

function cellOf(picture) {
  const name = picture.settings.prompt || "picture without a prompt";
  const star = element("button", { type: "button", className: "star", textContent: "★", ariaLabel: `Favourite: ${name}`, tabIndex: -1 });
  const pick = element("input", { type: "checkbox", className: "pick", ariaLabel: `Select: ${name}`, tabIndex: -1 });
  const cell = element("div", { className: "cell" }, tile(picture), pick, star);
  cell.dataset.id = picture.id;
  return cell;
}

function tile(picture) {
  const image = element("img", { src: picture.thumbnail, alt: picture.settings.prompt || "picture without a prompt", loading: "lazy" });
  const button = element("button", { type: "button", className: picture.settings.grid ? "tile sheet" : "tile", title: picture.settings.prompt }, image);
  button.dataset.id = picture.id;
  button.tabIndex = -1;
  return button;
}

// Also one that the gallery does not show: of a job that goes on, or that the search leaves out.
export async function open(id) {
  try {
    view(shown.find((one) => one.id === id) ?? (await call(`/api/images/${id}`)));
  } catch (error) {
    failed(error);
  }
}

// --- one picture --------------------------------------------------------------------------------------------------

const LABELS = {
  model: "Model", size: "Size", steps: "Steps", sampler: "Sampler", spacing: "Spacing", guidance: "Guidance", seed: "Seed",
  strength: "Denoising strength", negative: "Negative prompt", clip_skip: "Clip skip", eta: "Eta", hires: "Hires upscale",
  upscaler: "Upscaler", variation_seed: "Variation seed", variation_strength: "Variation strength", rescale: "Guidance rescale",
  interval: "Guidance interval", perturbed: "Perturbed-attention guidance", threshold: "Dynamic threshold",
  apg: "Projected guidance", cache: "DeepCache",
  refiner: "Refiner", handover: "Refiner switch", embeddings: "Embeddings", outpaint: "Outpaint", grid: "X/Y grid",
  image_guidance: "Image guidance", mask_blur: "Mask blur", mask_grow: "Mask grow", masked_padding: "Only masked, padding",
  masked_content: "Masked content", soft_mask: "Soft mask", tiling: "Seamless", like: "Compatible with", noise: "Noise source",
  ...kept.LABELS,
};
const PLAIN = { ...kept.PLAIN, clip_skip: 1, upscaler: "latent", variation_strength: 0, rescale: 0, perturbed: 0, apg: 0,
  negative: "", mask_blur: 0, mask_grow: 0, masked_content: "original", soft_mask: false, tiling: false };

function view(picture) {
  opened = picture;
  const { settings } = picture;
  $("viewer-image").src = picture.url;
  $("viewer-image").alt = settings.prompt;
  $("viewer-prompt").textContent = settings.prompt || "(no prompt)";
  const told = (value, plain) => value !== null && value !== undefined && value !== plain && value?.length !== 0;
  const rows = Object.entries(LABELS).filter(([name]) => told(settings[name], PLAIN[name]));
  const loras = picture.loras.map(({ name, strength, text_strength }) => [name, strength, text_strength].filter((one) => one !== undefined).join(" ")).join(", ");
  const [controls, images] = [picture.controls, picture.image_prompts].map((each) => each.map(({ name, strength }) => `${name} ${strength}`).join(", "));
  $("viewer-settings").replaceChildren(
    ...rows.flatMap(([name, label]) => pair(label, form.worded(name, settings[name]))),
    ...(loras ? pair("LoRAs", loras) : []), ...(controls ? pair("Control", controls) : []), ...(images ? pair("Image prompts", images) : []),
    ...pair("Created", new Date(1000 * picture.created).toLocaleString()));
  $("download").href = picture.url;
  $("download").download = `${picture.id}.png`;
  $("viewer-favourite").ariaPressed = String(picture.favourite);
  showMap(picture);
  around();
  if (!$("viewer").open) $("viewer").showModal();
}

// Pictures come and go while one is open, so its place is looked up.
const place = () => shown.findIndex(({ id }) => id === opened.id);

function around() {
  $("newer").disabled = place() <= 0;
  $("older").disabled = [-1, shown.length - 1].includes(place());
}

// The first control map that it followed, over it, where this browser has drawn it.
async function showMap(picture) {
  $("viewer-map").hidden = $("show-map").hidden = true;
  const map = picture.controls.length ? (await keep.keptJob(picture.job))?.controls?.find((one) => one.map)?.map : null;
  if (!map) return;
  const bitmap = await createImageBitmap(map);
  if (opened !== picture) return;
  [$("viewer-map").width, $("viewer-map").height] = [picture.width, picture.height]; // the net reads it scaled to these
  $("viewer-map").getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
  $("show-map").hidden = false;
  $("viewer-map").hidden = $("show-map").ariaPressed !== "true";
}

const pair = (label, value) => [element("dt", { textContent: label }), element("dd", { textContent: value })];

function move(by) {
  if (place() >= 0 && shown[place() + by]) view(shown[place() + by]);
}

async function use(withSeed) {
  const { settings, loras, controls, image_prompts: images, job } = opened;
  const inputs = await keep.keptJob(job);
  const gone = form.fill(withSeed ? settings : { ...settings, seed: "" }, loras);
  const start = inputs?.start;
  if (start) await paint.putBack(start);
  else paint.remove();
  const lost = missing(units.fill(inputs?.controls ?? controls), prompts.fill(inputs?.images ?? images));
  $("viewer").close();
  $("prompt").focus();
  toast([
    withSeed ? "Settings restored, with the seed." : "Settings restored, with a new seed each time.",
    !start && form.onPicture(settings) && "Its start picture is not in this browser; add it again first.",
    lost && `Its ${lost} are not in this browser; add them again first.`,
    gone.length && absent(gone),
  ].filter(Boolean).join(" "));
}

const pictureFile = () => fileOf(opened.url);

async function useAsMap() {
  const file = await pictureFile();
  $("viewer").close();
  units.addPicture(file);
}

async function usePicture() {
  const { width, height } = opened;
  await paint.take(await pictureFile(), Math.sqrt(width * height));
  $("viewer").close();
  $("start").scrollIntoView({ block: "nearest" });
}

async function remove() {
  const { id } = opened;
  $("viewer").close();
  await selection.remove([id]);
}

async function markOpened() {
  const [picture, favourite] = [opened, !opened.favourite];
  await call("/api/images/favourites", { ids: [picture.id], favourite });
  for (const one of [picture, ...shown]) if (one.id === picture.id) one.favourite = favourite;
  if (opened === picture) $("viewer-favourite").ariaPressed = String(favourite);
  for (const cell of cells()) if (cell.dataset.id === picture.id) starred(cell, favourite); // it stays, also where all are favourites
}

export function setUp(info) {
  selection.setUp({ cells, reload, open }, info.limits.selection);
  $("favourites").onclick = () => {
    $("favourites").ariaPressed = String(!onlyFavourites());
    load().catch(failed);
  };
  $("viewer-favourite").onclick = () => markOpened().catch(failed);
  $("use-map").onclick = () => useAsMap().catch(failed);
  $("use-map").hidden = info.controls.length === 0;
  $("show-map").onclick = () => {
    $("show-map").ariaPressed = String($("show-map").ariaPressed !== "true");
    $("viewer-map").hidden = $("show-map").ariaPressed !== "true";
  };
  let waiting;
  $("search").oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => load().catch(failed), 200);
  };
  $("more").onclick = () => older().catch(failed);
  for (const [id, withSeed] of [["use", true], ["use-new-seed", false]]) $(id).onclick = () => use(withSeed).catch(failed);
  $("use-picture").onclick = () => usePicture().catch(failed);
  $("delete").onclick = () => remove().catch(failed);
  $("newer").onclick = () => move(-1);
  $("older").onclick = () => move(1);
  $("close").onclick = () => $("viewer").close();
  $("viewer").onclose = () => (opened = null);
  $("viewer").onclick = (event) => event.target === $("viewer") && $("viewer").close();
  $("viewer").onkeydown = (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
    if (event.key === "f" && !event.ctrlKey && !event.metaKey) $("viewer-favourite").click();
    if (event.key === "Delete") $("delete").click();
  };
  $("stage").onclick = (event) => event.target.dataset.id && open(event.target.dataset.id);
  $("stage").onkeydown = (event) => {
    if (!event.target.dataset.id || ![" ", "Enter"].includes(event.key) || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // the space bar would scroll
    open(event.target.dataset.id);
  };
}
