// The page: puts the parts together.

import { $, base64Of, call, toast } from "./api.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as jobs from "./jobs.js";
import * as paint from "./paint.js";

async function draw() {
  form.clearErrors();
  $("generate").disabled = true;
  try {
    const [body, start] = [await form.request(), paint.kept()];
    const job = await call("/api/jobs", body);
    if (start) gallery.remember(job.id, start);
    jobs.watch(job);
    if (matchMedia("(max-width: 800px)").matches) $("stage").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    form.showError(error);
  } finally {
    $("generate").disabled = false;
  }
}

// --- files dropped, pasted or chosen ------------------------------------------------------------------------------

const startFrom = (file) => paint.take(file).catch(() => toast("This is no picture that can be read; use PNG, JPEG or WebP."));

// A PNG that knows how it was made restores the form; any other picture becomes a start.
async function dropped(file) {
  try {
    const { unused, loras, ...settings } = await call("/api/settings", { image: await base64Of(file) });
    form.fill(settings, loras);
    $("prompt").focus();
    const without = unused.length ? ` No effect here: ${unused.join(", ")}.` : "";
    toast(`Settings restored from ${file.name}.${without}`, "Start from the picture", () => startFrom(file));
  } catch {
    await startFrom(file);
  }
}

const pictureIn = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

function wireFiles() {
  let inside = 0;
  const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (event) => {
    if (carriesFiles(event)) $("overlay").hidden = ++inside === 0;
  });
  addEventListener("dragleave", (event) => {
    if (carriesFiles(event)) $("overlay").hidden = --inside <= 0;
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    $("overlay").hidden = true;
    const file = pictureIn(event.dataTransfer);
    if (!file) return;
    if (event.target.closest?.("#start")) startFrom(file);
    else dropped(file);
  });
  addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (file) startFrom(file);
  });
  $("file").onchange = () => $("file").files[0] && startFrom($("file").files[0]);
}

// --- start --------------------------------------------------------------------------------------------------------

function wireTheme() {
  $("theme").onclick = () => {
    const dark = getComputedStyle(document.documentElement).colorScheme.trim() === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("plainsd.theme", document.documentElement.dataset.theme);
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
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      draw();
    }
  });
  const info = await call("/api/info");
  paint.setUp();
  form.setUp(info);
  gallery.setUp();
  jobs.setUp(() => gallery.load());
  await gallery.load();
  await jobs.resume();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => form.showError(error));
