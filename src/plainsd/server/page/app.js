// The page: puts the parts together.

import { $, base64Of, call, toast } from "./api.js";
import { clearErrors, showError } from "./errors.js";
import { absent, missing } from "./fields.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as jobs from "./jobs.js";
import * as keep from "./keep.js";
import * as paint from "./paint.js";
import * as prompts from "./prompts.js";
import * as storage from "./storage.js";
import * as typing from "./typing.js";
import * as units from "./units.js";

async function draw() {
  if ($("generate").disabled) return;
  clearErrors();
  $("generate").disabled = true;
  try {
    const [body, inputs] = [await form.request(), await form.inputs()];
    const job = await call("/api/jobs", body);
    if (inputs) keep.keepJob(job.id, inputs);
    jobs.watch(job);
    if (matchMedia("(max-width: 800px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    showError(error);
  } finally {
    $("generate").disabled = false;
  }
}

// --- files dropped, pasted or chosen ------------------------------------------------------------------------------

const startFrom = (file) => paint.take(file).catch(() => toast("This picture cannot be read; use PNG, JPEG or WebP."));

// Where a file dropped or pasted there belongs.
function taken(place, file, otherwise) {
  const unit = place?.closest?.(".unit");
  if (unit && prompts.owns(unit)) prompts.take(unit, place, file);
  else if (unit) units.take(unit, file);
  else if (place?.closest?.("#start")) startFrom(file);
  else otherwise(file);
}

// A PNG that knows how it was made restores the form; any other picture becomes a start.
async function dropped(file) {
  try {
    const { unused, loras, controls = [], image_prompts: images = [], ...settings } = await call("/api/settings", { image: await base64Of(file) });
    const over = form.onPicture(settings);
    if (!over) paint.remove();
    const gone = form.fill(settings, loras);
    const lost = missing(units.fill(controls), prompts.fill(images));
    $("prompt").focus();
    toast([
      `Settings restored from ${file.name}.`,
      over && !paint.hasPicture() && "Its start picture is not in the file: put it in again.",
      lost && `Its ${lost} are not in the file: put them in again.`,
      gone.length && absent(gone),
      unused.length && `No effect here: ${unused.join(", ")}.`,
    ].filter(Boolean).join(" "), "Start from the picture", () => startFrom(file));
  } catch {
    await startFrom(file);
  }
}

const pictureIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

// Office programs copy text with a picture of it.
const isText = ({ target, clipboardData }) => clipboardData.types.includes("text/plain") && target.closest?.("input, textarea");

function wireFiles() {
  let inside = 0;
  const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (event) => {
    if (carriesFiles(event)) $("overlay").hidden = ++inside === 0;
  });
  addEventListener("dragleave", (event) => {
    if (carriesFiles(event)) $("overlay").hidden = --inside <= 0;
  });
  addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return; // text, for the field below it
    event.preventDefault();
    inside = 0;
    $("overlay").hidden = true;
    const file = pictureIn(event.dataTransfer);
    if (!file) return;
    taken(event.target, file, dropped);
  });
  addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (file && !isText(event)) taken(document.activeElement, file, startFrom);
  });
  $("file").onchange = () => $("file").files[0] && startFrom($("file").files[0]);
}

// --- start --------------------------------------------------------------------------------------------------------

function wireTheme() {
  $("theme").onclick = () => {
    const dark = getComputedStyle(document.documentElement).colorScheme.trim() === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    storage.write("plainsd.theme", document.documentElement.dataset.theme);
  };
}

async function start() {
  wireTheme();
  wireFiles();
  $("form").onsubmit = (event) => {
    event.preventDefault();
    draw();
  };
  addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || document.querySelector("dialog[open]")) return;
    const ctrl = event.ctrlKey || event.metaKey;
    if (ctrl || (event.repeat && !event.target.closest?.("textarea"))) event.preventDefault(); // held, it would submit again and again
    if (ctrl && !event.repeat) draw();
  });
  const info = await call("/api/info");
  $("user").textContent = info.user ?? "";
  paint.setUp();
  form.setUp(info);
  await paint.restore();
  await units.restore();
  await prompts.restore();
  gallery.setUp(info);
  const refresh = () => gallery.reload().catch((error) => toast(error.message));
  jobs.setUp(refresh);
  typing.setUp(info, form, refresh);
  await gallery.load();
  await jobs.resume();
  document.documentElement.dataset.ready = "yes";
}

start().catch(showError);
