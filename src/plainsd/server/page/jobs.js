// What is being drawn: a card for each job, with previews, progress and cancel.

import { $, call, element, say, toast } from "./api.js";
import { usedSeed } from "./form.js";
import { follow } from "./stream.js";

const watched = new Set(); // ids of the jobs that have a card
let finished = () => {};

export function setUp(whenFinished) {
  finished = whenFinished;
}

// Jobs that were begun before the page was loaded, or by somebody else.
export async function resume() {
  for (const job of (await call("/api/jobs?limit=0")).active) watch(job);
}

export function watch(job) {
  if (watched.has(job.id)) return;
  for (const old of document.querySelectorAll(".card.over")) old.remove();
  const card = makeCard(job);
  watched.add(job.id);
  $("stage").prepend(card.root);
  follow(job.id, {
    progress: (told) => progress(card, told),
    end: (told) => {
      watched.delete(job.id);
      end(card, told);
    },
    waiting: () => (card.status.textContent = "The server cannot be reached; waiting for it"),
    lost: () => lost(card),
  });
}

function makeCard(job) {
  const tiles = Array.from({ length: job.count }, () => element("img", { alt: "" }));
  const bar = element("progress", { max: 1, value: 0, ariaLabel: "Progress" });
  const status = element("span", { className: "status" });
  const cancel = element("button", { type: "button", className: "small", textContent: "Cancel" });
  const root = element("article", { className: "card" },
    element("p", { className: "card-prompt", textContent: job.prompt || "(no prompt)" }),
    element("div", { className: "tiles" }, ...tiles), bar, element("div", { className: "card-foot" }, status, cancel));
  root.dataset.job = job.id;
  cancel.onclick = async () => {
    cancel.disabled = true;
    await call(`/api/jobs/${job.id}/cancel`, {}).catch((error) => toast(error.message));
  };
  const card = { root, tiles, bar, status, cancel, job, heard: -1 };
  progress(card, { ...job, previews: {} });
  return card;
}

function progress(card, job) {
  for (const [place, preview] of Object.entries(job.previews)) {
    card.tiles[place].src = preview;
    card.tiles[place].className = "rough";
  }
  showFinished(card, job);
  card.bar.value = job.progress;
  card.status.textContent = status(job);
  document.title = job.state === "running" ? `${Math.round(100 * job.progress)}% · plainsd` : "plainsd";
  const quarter = Math.floor(4 * job.progress);
  if (quarter > card.heard && job.state === "running") say(`Drawing, ${25 * quarter} percent`);
  card.heard = Math.max(card.heard, quarter);
}

function status(job) {
  if (job.state === "queued") return job.position ? `Waiting, ${job.position} before it` : "Waiting";
  const step = job.steps ? `Step ${job.step} of ${job.steps}` : "Getting ready";
  const pictures = job.count > 1 ? ` · ${job.done} of ${job.count} pictures` : "";
  const left = job.seconds_left === null ? "" : ` · ${duration(job.seconds_left)} left`;
  return step + pictures + left;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function showFinished(card, job) {
  for (const id of job.images) {
    const tile = card.tiles[Number(id.split("-").at(-1))];
    if (tile.dataset.id === id) continue;
    tile.dataset.id = id;
    tile.src = `/api/images/${id}.png`;
    tile.className = "whole";
    tile.alt = job.prompt;
    tile.tabIndex = 0; // the gallery opens it, by mouse and by keyboard
    tile.setAttribute("role", "button");
  }
}

// The server is there, and does not know the job any more.
function lost(card) {
  watched.delete(card.job.id);
  card.root.classList.add("over");
  card.bar.remove();
  card.cancel.remove();
  card.status.textContent = "The server does not know this job any more.";
}

const ENDS = { done: "Done", cancelled: "Cancelled", failed: "Failed" };

function end(card, job) {
  showFinished(card, job);
  document.title = "plainsd";
  card.bar.remove();
  card.cancel.remove();
  card.root.classList.add("over");
  for (const tile of card.tiles) if (!tile.dataset.id) tile.remove();
  const seconds = job.started ? ` in ${duration(job.finished - job.started)}` : "";
  card.status.textContent = job.state === "done" ? `Done${seconds} · seed ${job.seeds.join(", ")}` : ENDS[job.state];
  for (const note of job.notes) card.root.append(element("p", { className: "note", textContent: note }));
  if (job.error) card.root.append(element("p", { className: "error", role: "alert", textContent: job.error }));
  if (job.state === "cancelled" && !job.images.length) card.root.remove();
  if (job.state !== "cancelled") usedSeed(job.seeds[0]);
  say(job.state === "done" ? `Done, ${job.images.length} pictures` : `${ENDS[job.state]}. ${job.error ?? ""}`);
  finished(job);
}
