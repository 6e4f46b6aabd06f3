// Parts of forms that are made in script.

import { element } from "./api.js";

export const PICTURES = "image/png,image/jpeg,image/webp";

export const options = (pairs) => pairs.map(([value, textContent]) => element("option", { value, textContent }));
export const select = (pairs) => element("select", {}, ...options(pairs));
export const number = (min, max, step) => element("input", { type: "number", min, max, step });
export const button = (textContent, more = {}) => element("button", { type: "button", className: "small", textContent, ...more });
export const labelled = (text, input) => element("label", { className: "unit-field" }, element("span", { textContent: text }), input);
export const set = (input, value) => (input.type === "checkbox" ? (input.checked = value) : (input.value = value));

// The values of inputs by name, of those that are not empty.
export const numbers = (inputs) => Object.fromEntries(Object.entries(inputs).filter(([, input]) => input.value !== "").map(([name, input]) => [name, Number(input.value)]));

// An image element with a Blob in it, which is let go once it is decoded.
export function shownOnce(image, blob) {
  const address = URL.createObjectURL(blob);
  image.onload = image.onerror = () => URL.revokeObjectURL(address);
  image.src = address;
  return image;
}

// Units of a list, such as "Control 1", by their place in it.
export function numbered(units, word) {
  units.forEach((unit, i) => {
    unit.legend.textContent = `${word} ${i + 1}`;
    unit.root.dataset.entry = i;
  });
}

export const readable = (file) => createImageBitmap(file).then(() => true, () => false);
export const UNREADABLE = "This picture cannot be read; use PNG, JPEG or WebP.";

// What a picture was drawn with and is not there, in words; empty where nothing is missing.
export const missing = (maps, images) => [maps && "control maps", images && "image prompts (pictures, masks)"].filter(Boolean).join(" and ");

// Likewise what the server does not have any more.
export const absent = (names) => `Not on this server: ${names.join(", ")}.`;
