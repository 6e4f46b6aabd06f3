// Several pictures of the gallery at once: by mouse, by touch, by keyboard; and what is done with them.

import { $, call, say, toast } from "./api.js";

let cells = () => []; // the gallery's, in order
let reload = async () => {};
let open = () => {};
let most = 1;
const chosen = new Set(); // ids
let anchor = null; // id from which shift extends
let choosing = false; // a click chooses, without ctrl
const deleted = []; // the ids of each deletion that Undo takes back, the latest last

export function setUp(actions, limit) {
  ({ cells, reload, open } = actions);
  most = limit;
  $("gallery").addEventListener("click", clicked);
  $("gallery").addEventListener("keydown", keyed);
  $("gallery").addEventListener("keyup", (event) => event.key === " " && event.target.matches(".tile") && event.preventDefault()); // else a click
  $("gallery").addEventListener("focusin", (event) => rove(event.target.closest(".cell")));
  $("select").onclick = () => choose(!choosing);
  $("select-none").onclick = () => choose(false);
  $("select-all").onclick = () => between(ids()[0], ids().at(-1));
  $("selected-favourite").onclick = () => mark([...chosen]).catch(failed);
  $("selected-delete").onclick = () => remove([...chosen]).catch(failed);
  addEventListener("keydown", (event) => {
    const writes = event.target.closest?.("input, textarea, select, dialog");
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !writes && deleted.length) {
      event.preventDefault();
      undo().catch(failed);
    }
  });
}

const ids = () => cells().map((cell) => cell.dataset.id);
const cellOf = (id) => cells().find((cell) => cell.dataset.id === id);
const failed = (error) => toast(error.message);
export const isChosen = (id) => chosen.has(id);

// --- choosing -----------------------------------------------------------------------------------------------------

function choose(on) {
  choosing = on;
  if (!on) {
    chosen.clear();
    anchor = null;
  }
  show();
}

function toggle(id) {
  if (!chosen.delete(id)) chosen.add(id);
  anchor = id;
  show();
}

function between(first, last) {
  const all = ids();
  const [a, b] = [all.indexOf(first ?? last), all.indexOf(last)].sort((x, y) => x - y);
  for (const id of all.slice(Math.max(0, a), b + 1)) chosen.add(id);
  show();
}

// What is not in the gallery any more is not chosen any more, and nothing extends from it.
export function show() {
  const there = new Set(ids());
  for (const id of chosen) if (!there.has(id)) chosen.delete(id);
  if (!there.has(anchor)) anchor = null;
  for (const cell of cells()) {
    cell.classList.toggle("chosen", chosen.has(cell.dataset.id));
    cell.querySelector(".pick").checked = chosen.has(cell.dataset.id);
  }
  const any = chosen.size > 0;
  $("gallery").classList.toggle("choosing", any || choosing);
  $("select").ariaPressed = String(any || choosing);
  $("selection").hidden = !any && !choosing;
  const count = `${chosen.size} selected`;
  if ($("selected-count").textContent !== count && (any || choosing)) say(count);
  $("selected-count").textContent = count;
  const tooMany = chosen.size > most;
  for (const id of ["selected-favourite", "selected-delete"]) $(id).disabled = !any || tooMany;
  if (tooMany) $("selected-count").textContent = `${count}; at most ${most} at once`;
  const query = new URLSearchParams([...chosen].map((id) => ["id", id]));
  if (any && !tooMany) $("selected-zip").href = `/api/images.zip?${query}`;
  else $("selected-zip").removeAttribute("href");
  rove(cells().find((cell) => cell.querySelector(".tile").tabIndex === 0) ?? cells()[0]);
}

function clicked(event) {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const { id } = cell.dataset;
  if (event.target.closest(".star")) return mark([id]).catch(failed);
  if (event.target.closest(".pick")) return event.shiftKey ? between(anchor, id) : toggle(id);
  if (event.shiftKey) return between(anchor ?? id, id);
  if (event.ctrlKey || event.metaKey || choosing || chosen.size) return toggle(id);
  open(id);
}

// --- the keyboard -------------------------------------------------------------------------------------------------

// One picture at a time can be reached by Tab; arrows go to the others.
function rove(cell) {
  for (const one of cells()) one.querySelector(".tile").tabIndex = one === cell ? 0 : -1;
}

function columns() {
  const all = cells();
  const below = all.findIndex((cell) => cell.offsetTop > all[0].offsetTop);
  return below < 0 ? all.length : below;
}

function keyed(event) {
  const cell = event.target.closest(".cell");
  if (!cell || event.altKey || (event.target.matches(".star") && [" ", "Enter"].includes(event.key))) return;
  if (event.repeat && [" ", "Delete", "f"].includes(event.key)) return; // held, it would go on with the next picture
  const [all, { id }] = [cells(), cell.dataset];
  const place = all.indexOf(cell);
  const goes = { ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - columns(), ArrowDown: place + columns(), Home: 0, End: all.length - 1 };
  const ctrl = event.ctrlKey || event.metaKey;
  if (event.key in goes) {
    const to = all[goes[event.key]];
    if (to && event.shiftKey) {
      anchor ??= id;
      if (!chosen.size) anchor = id;
      between(anchor, to.dataset.id);
    }
    to?.querySelector(".tile").focus();
  } else if (event.key === " ") toggle(id);
  else if (event.key === "Enter" && !ctrl) open(id);
  else if (event.key === "Escape") choose(false);
  else if (event.key === "Delete") remove(chosen.size ? [...chosen] : [id]).catch(failed);
  else if (event.key === "f" && !ctrl) mark(chosen.size ? [...chosen] : [id]).catch(failed);
  else if (event.key === "a" && ctrl) between(all[0].dataset.id, all.at(-1).dataset.id);
  else return;
  event.preventDefault();
}

// --- what is done with them ---------------------------------------------------------------------------------------

// As favourites; where all of them are, no longer.
export async function mark(marked) {
  const favourite = !marked.every((id) => cellOf(id)?.classList.contains("favourite"));
  await call("/api/images/favourites", { ids: marked, favourite });
  await reload();
  say(favourite ? "Added to favourites" : "Removed from favourites");
}

// Deletes, and offers to undo it. The focus goes to what is next to them.
export async function remove(gone) {
  const all = ids();
  const place = all.findIndex((id) => gone.includes(id));
  const left = all.filter((id) => !gone.includes(id));
  const { ids: done } = await call("/api/images/delete", { ids: gone });
  if (done.length) deleted.push(done);
  choose(false);
  await reload();
  cellOf(left[Math.min(place, left.length - 1)])?.querySelector(".tile").focus();
  if (!done.length) return; // they were deleted before
  toast(`${done.length === 1 ? "1 picture" : `${done.length} pictures`} deleted.`, "Undo", () => undo().catch(failed));
}

async function undo() {
  const back = deleted.pop();
  if (!back) return;
  const { ids: there } = await call("/api/images/restore", { ids: back }).catch((error) => {
    deleted.push(back);
    throw error;
  });
  await reload();
  cellOf(there[0])?.querySelector(".tile").focus();
  const missing = back.length - there.length;
  toast(missing ? `It was too late for ${missing} of them.` : `${there.length === 1 ? "The picture is" : "They are"} back.`);
}
