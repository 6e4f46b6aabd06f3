// Which settings of a request go together, and how a range of noise levels is written.

import { Refused } from "./api.js";
import { LABELS } from "./kept.js";

const OF_HIRES = Object.keys(LABELS).filter((name) => name.startsWith("hires_"));
const NEEDED = { // by others, which are refused, or have no effect, without it
  hires: ["upscaler", ...OF_HIRES], variation_strength: ["variation_seed"], apg: ["apg_parallel", "apg_momentum"], refiner: ["handover"],
};
const PAIR = /^\s*([\d.]+(?:e[-+]?\d+)?)\s*[-–,;\s]\s*([\d.]+(?:e[-+]?\d+)?)\s*$/i;

// A request without the settings that lack what they belong to, which may be an axis of its grid.
export function effective(fields) {
  const has = (name) => fields[name] || fields.grid?.some((axis) => axis.name === name);
  for (const [name, others] of Object.entries(NEEDED)) if (!has(name)) for (const other of others) delete fields[other];
  if (!fields.image && !has("hires")) delete fields.strength;
  return fields;
}

// "0.3, 5", also with a space or a dash.
export function interval(text) {
  const pair = PAIR.exec(text);
  if (!pair) throw new Refused(422, { message: `guidance interval ${text.trim()}: give two noise levels, such as 0.3, 5`, field: "interval" });
  return pair.slice(1);
}
