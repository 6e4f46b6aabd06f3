// Draws while the form is edited, with models that draw in few steps. A picture that the next one replaces is deleted,
// unless it was kept.

import { $, call, element, toast } from "./api.js";
import * as keep from "./keep.js";
import { effective } from "./rules.js";
import { follow } from "./stream.js";

const WAIT = 120; // milliseconds without another letter
let info, form, keptOne;
let card = null; // while it is on
let seed = null; // of all pictures, where the form has none: only what is typed changes them
let last = null; // the picture that is shown: its id, its job, and what that was drawn on
let wanted = null; // the timer of the next one, also when it has run out while one is drawn
let busy = false;

const quick = () => (info.models.find((model) => model.name === $("model").value) ?? info.models[0]).quick;

export function setUp(told, theForm, whenKept) {
  [info, form, keptOne] = [told, theForm, whenKept];
  const fit = () => {
    $("typing").closest("label").hidden = !quick();
    if (!quick() && card) off();
  };
  $("typing").onchange = () => ($("typing").checked ? on() : off());
  for (const kind of ["input", "change"]) $("form").addEventListener(kind, (event) => event.target !== $("typing") && card && soon());
  $("model").addEventListener("change", fit);
  fit();
}

function on() {
  seed = Math.floor(Math.random() * 2 ** 32);
  const button = element("button", { type: "button", className: "small", textContent: "Keep", disabled: true });
  const image = element("img", { alt: "" });
  const status = element("span", { className: "status", textContent: "Write a prompt" });
  const root = element("article", { className: "card typed" },
    element("div", { className: "tiles" }, image), element("div", { className: "card-foot" }, status, button));
  button.onclick = () => {
    if (last?.inputs) keep.keepJob(last.job, last.inputs);
    last = null;
    button.disabled = true;
    keptOne();
  };
  card = { root, image, status, button };
  $("stage").prepend(root);
  soon();
}

async function off() {
  $("typing").checked = false;
  clearTimeout(wanted);
  wanted = null;
  card.root.remove();
  const old = last;
  card = last = null;
  await remove(old);
}

function soon() {
  clearTimeout(wanted);
  wanted = setTimeout(draw, WAIT);
}

async function draw() {
  if (!card || busy) return;
  if (!quick()) return off(); // the form was filled with settings of a slower model
  if (!$("prompt").value.trim()) return;
  [busy, wanted] = [true, null];
  try {
    const [body, inputs] = [await few(), await form.inputs()];
    const job = await call("/api/jobs", body);
    const told = await ended(job.id);
    if (told.error) throw new Error(told.error);
    const [old, made] = [last, told.images.length ? { id: told.images[0], job: job.id, inputs } : null];
    last = card && made; // it may have been turned off meanwhile
    if (last) show(told);
    await remove(card ? old : made);
  } catch (error) {
    if (card) card.status.textContent = error.message;
  } finally {
    busy = false;
  }
  if (wanted && card) soon();
}

// What the form asks for, as one picture in few steps.
async function few() {
  const body = await form.request();
  for (const name of ["grid", "hires"]) delete body[name];
  return { ...effective(body), ...quick(), seed: body.seed ?? String(seed), count: 1 };
}

function ended(id) {
  return new Promise((resolve, reject) => follow(id, {
    progress: () => {},
    end: resolve,
    waiting: () => card && (card.status.textContent = "The server cannot be reached; waiting for it"),
    lost: () => reject(new Error("The server does not know this job any more; write on to try again.")),
  }));
}

async function remove(made) {
  if (made) await call(`/api/images/${made.id}`, undefined, "DELETE").catch((error) => error.status !== 404 && toast(error.message));
}

function show(told) {
  card.image.src = `/api/images/${last.id}.png`;
  card.image.alt = told.prompt;
  card.button.disabled = false;
  card.status.textContent = `${Math.max(1, Math.round(1000 * (told.finished - told.started)))} ms · seed ${told.seeds[0]}`;
}
