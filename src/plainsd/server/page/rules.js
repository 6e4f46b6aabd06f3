// Which settings of a request go together, and what is refused before it is sent.

import { Refused } from "./api.js";

let needs = {}; // a setting -> the one without which it is refused
const PAIR = /^\s*([\d.]+(?:e[-+]?\d+)?)\s*[-–,;\s]\s*([\d.]+(?:e[-+]?\d+)?)\s*$/i;

export function setUp(info) {
  needs = info.needs;
}

// A request without the settings that lack what they belong to, which may be an axis of its grid.
export function effective(fields) {
  const has = (name) => fields[name] || fields.grid?.some((axis) => axis.name === name);
  for (const [name, need] of Object.entries(needs)) if (!has(need)) delete fields[name];
  if (!fields.image && !has("hires")) delete fields.strength;
  return fields;
}

const refuse = (error) => {
  throw new Refused(422, error);
};

// A number field with text that the browser cannot read, such as "1e", has no value, as if it were empty.
export function checkNumbers(form) {
  const input = [...form.elements].find((one) => one.validity.badInput && !one.closest("[hidden]"));
  if (!input) return;
  const name = input.ariaLabel ?? input.labels[0].firstChild.textContent.trim();
  refuse({
    message: `${name}: not a number; correct it, or leave it empty`,
    field: input.closest("[data-field]").dataset.field, entry: input.closest("[data-entry]")?.dataset.entry,
  });
}

// The axes that are filled in, of both: a request's first one goes across.
export function grid(axes) {
  if (!axes[0].name) refuse({ message: "grid: Down is filled in without Across; fill in Across first", field: "grid" });
  return axes.filter((axis) => axis.name);
}

// "0.3, 5", also with a space or a dash.
export function interval(text) {
  const pair = PAIR.exec(text);
  if (!pair) refuse({ message: `guidance interval ${text.trim()}: give two noise levels, such as 0.3, 5`, field: "interval" });
  return pair.slice(1);
}
