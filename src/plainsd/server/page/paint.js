// The picture to start from, and the brush that marks what is to be drawn anew.

import { $, Refused, base64Of } from "./api.js";
import { PICTURES } from "./fields.js";
import * as keep from "./keep.js";

const LONGEST = 768; // of the mask's canvas; it is scaled down when it is sent
const COLOUR = "#ff3d7f";
const OPAQUE = 96; // of 255, from which a pixel counts as painted
let source = null; // ImageBitmap
let file = null; // that it was read from
let address = null; // of the file, for others that show it
const watching = []; // called when there is another picture, or none
let painted = false;
let past = [];
let cursor = null; // of the keyboard, in canvas pixels
let last = null;
let native = 512;
let multiple = 8; // of the sides' pixels

export const hasPicture = () => source !== null;
export const url = () => address;
export const whenChanged = (act) => watching.push(act);
const changed = () => watching.forEach((act) => act());
export const setNative = (...given) => ([native, multiple] = given);

// Of the picture's shape, with about as many pixels as the model draws best.
export function size(side = native) {
  const ratio = Math.sqrt(source.width / source.height);
  return [side * ratio, side / ratio].map((pixels) => multiple * Math.max(1, Math.round(pixels / multiple)));
}

// Takes a file, and gives the form its size.
export async function take(given, side = native) {
  await setSource(given);
  [$("width").value, $("height").value] = size(side);
  show();
  await save();
}

async function setSource(given) {
  source = await createImageBitmap(given); // of a file that is no picture nothing changes
  file = given;
  URL.revokeObjectURL(address);
  address = URL.createObjectURL(given);
}

// What is there, to be put back as it is; null where there is nothing.
export async function kept() {
  return source && { source: file, mask: painted ? await new Promise((resolve) => $("mask").toBlob(resolve, "image/png")) : null };
}

const save = async () => keep.keepForm("start", await kept());

export async function putBack(start) {
  await setSource(start.source);
  show();
  if (start.mask) drawing().drawImage(await createImageBitmap(start.mask), 0, 0);
  painted = start.mask !== null;
  await save();
}

export async function restore() {
  const start = await keep.keptForm("start");
  if (start) await putBack(start);
}

export function remove() {
  URL.revokeObjectURL(address);
  source = file = address = null;
  painted = false;
  $("canvas-tools").hidden = true;
  $("drop").hidden = false;
  $("file").value = "";
  changed();
  save();
}

function show() {
  const scale = LONGEST / Math.max(source.width, source.height);
  for (const canvas of [$("picture"), $("mask")]) {
    canvas.width = Math.max(1, Math.round(source.width * scale));
    canvas.height = Math.max(1, Math.round(source.height * scale));
  }
  const context = $("picture").getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, $("picture").width, $("picture").height);
  painted = false;
  past = [];
  cursor = null;
  $("drop").hidden = true;
  $("canvas-tools").hidden = false;
  changed();
}

// The fields of a request: the picture at the size that is drawn, and the mask where something is painted. With `onlyMasked` the
// part under the mask is drawn at that size, and the picture stays as it is.
export async function pictures(drawn, onlyMasked) {
  const whole = onlyMasked && painted;
  const [width, height] = whole ? [source.width, source.height] : drawn;
  const asItIs = whole && PICTURES.split(",").includes(file.type);
  const image = asItIs ? file : await scaled(width, height, (context) => context.drawImage(source, 0, 0, width, height));
  return { image: await base64Of(image), ...(painted ? { mask: await base64Of(await mask(width, height)) } : {}) };
}

// What is painted, white on black, as a file; null where nothing is.
export async function mask(width = $("mask").width, height = $("mask").height) {
  if (!painted) return null;
  return scaled(width, height, (context) => {
    context.drawImage($("mask"), 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data.fill(pixels.data[i + 3] >= OPAQUE ? 255 : 0, i, i + 3);
      pixels.data[i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  });
}

function scaled(width, height, draw) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  draw(context);
  const refused = new Refused(422, { message: `size ${width}x${height}: give both sides in pixels, such as ${native}`, field: "size" });
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(refused)), "image/png"));
}

// --- the brush ----------------------------------------------------------------------------------------------------

const drawing = () => $("mask").getContext("2d", { willReadFrequently: true });
const erasing = () => $("erase").ariaPressed === "true";
const width = () => (Number($("brush").value) * $("mask").width) / 400;

function remember() {
  past.push(drawing().getImageData(0, 0, $("mask").width, $("mask").height));
  past = past.slice(-20);
}

function stroke(from, to, erase) {
  const context = drawing();
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.strokeStyle = COLOUR;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = width();
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x + 0.01, to.y);
  context.stroke();
  painted = true;
}

function place(event) {
  const box = $("mask").getBoundingClientRect();
  return { x: ((event.clientX - box.left) / box.width) * $("mask").width, y: ((event.clientY - box.top) / box.height) * $("mask").height };
}

function anythingPainted() {
  const { data } = drawing().getImageData(0, 0, $("mask").width, $("mask").height);
  for (let i = 3; i < data.length; i += 4) if (data[i] >= OPAQUE) return true;
  return false;
}

function keyed(event) {
  const step = Math.max(4, width() / 3);
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  cursor ??= { x: $("mask").width / 2, y: $("mask").height / 2 };
  if (event.key in moves) {
    const [x, y] = moves[event.key];
    const next = { x: clamp(cursor.x + x, $("mask").width), y: clamp(cursor.y + y, $("mask").height) };
    if (event.shiftKey) paintTo(next);
    cursor = next;
  } else if (event.key === " ") {
    paintTo(cursor);
  } else if (event.key.toLowerCase() === "e" && !event.ctrlKey) {
    $("erase").click();
  } else {
    return;
  }
  event.preventDefault();
  const share = (value, whole) => `${Math.round((100 * value) / whole)}%`;
  $("canvas-hint").textContent =
    `Brush at ${share(cursor.x, $("mask").width)} across, ${share(cursor.y, $("mask").height)} down. Space paints; shift and arrows draw a line.`;
}

function paintTo(next) {
  remember();
  stroke(cursor, next, erasing());
  painted = anythingPainted();
  save();
}

const clamp = (value, most) => Math.min(Math.max(0, value), most);

export function setUp() {
  const mask = $("mask");
  mask.onpointerdown = (event) => {
    if (!event.isPrimary || event.button > 2) return; // a second finger draws nothing
    mask.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last, last, erasing() || event.button === 2);
  };
  mask.onpointermove = (event) => {
    if (!last || !event.isPrimary) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const next = place(one);
      stroke(last, next, erasing() || Boolean(event.buttons & 2));
      last = next;
    }
  };
  mask.onpointerup = mask.onpointercancel = (event) => {
    if (!event.isPrimary) return;
    last = null;
    painted = anythingPainted();
    save();
  };
  mask.oncontextmenu = (event) => event.preventDefault();
  mask.onkeydown = keyed;
  $("erase").onclick = () => ($("erase").ariaPressed = String(!erasing()));
  $("undo").onclick = () => {
    const before = past.pop();
    if (before) drawing().putImageData(before, 0, 0);
    painted = anythingPainted();
    save();
  };
  $("clear").onclick = () => {
    remember();
    drawing().clearRect(0, 0, mask.width, mask.height);
    painted = false;
    save();
  };
  $("remove").onclick = () => {
    remove();
    $("file").focus();
  };
}
