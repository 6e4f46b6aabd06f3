// Settings of a picture that the form has no field for: they are listed, sent with the others, and cleared by a button.

import { $, element } from "./api.js";

export const LABELS = {
  hires_steps: "Hires steps", hires_sampler: "Hires sampler", hires_spacing: "Hires spacing", hires_prompt: "Hires prompt",
  hires_negative: "Hires negative prompt", hires_guidance: "Hires guidance", apg_parallel: "Projected, parallel share",
  apg_momentum: "Projected, momentum", ensd: "Eta noise seed delta", seed_resize: "Seed resize from", batch_index: "Noise batch index",
  batch_size: "Noise batch size",
};
export const PLAIN = { apg_parallel: 0, apg_momentum: -0.5, batch_index: 0 };
let settings = {};

export const fields = () => ({ ...settings });

export function setUp(cleared) {
  $("clear-kept").onclick = () => {
    fill({});
    cleared();
  };
}

// In place of what is there; `worded` tells a reader of a setting.
export function fill(given, worded) {
  const told = Object.keys(LABELS).filter((name) => ![null, undefined, PLAIN[name]].includes(given[name]));
  settings = Object.fromEntries(told.map((name) => [name, given[name]]));
  $("kept").hidden = told.length === 0;
  $("kept-list").replaceChildren(...told.map((name) => {
    const line = element("li", { textContent: `${LABELS[name]}: ${worded(name, given[name])}` });
    line.dataset.field = name; // where an error about it stands
    return line;
  }));
}
