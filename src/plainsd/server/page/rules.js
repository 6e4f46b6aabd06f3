// Which settings of a request go together, and how a range of noise levels is written.

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

// "0.3, 5", also with a space or a dash.
export function interval(text) {
  const pair = PAIR.exec(text);
  if (!pair) throw new Refused(422, { message: `guidance interval ${text.trim()}: give two noise levels, such as 0.3, 5`, field: "interval" });
  return pair.slice(1);
}
