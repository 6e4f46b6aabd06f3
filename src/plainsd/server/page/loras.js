// LoRAs in the form: a row each.

import { $, element } from "./api.js";
import { numbers, options } from "./fields.js";

let known = [];
let changed = () => {};

export function setUp(info, whenChanged) {
  [known, changed] = [info.loras, whenChanged];
  $("no-loras").hidden = known.length > 0;
  $("add-lora").hidden = known.length === 0;
  $("add-lora").onclick = () => {
    add({ name: known[0], strength: 1 });
    changed();
  };
}

function add({ name, strength, text_strength }) {
  const names = known.includes(name) ? known : [name, ...known];
  const choice = element("select", { ariaLabel: "LoRA" }, ...options(names.map((one) => [one, one])));
  choice.value = name;
  const amount = element("input", { type: "number", step: "0.1", min: "-10", max: "10", value: strength ?? "", ariaLabel: "Strength" });
  const text = element("input", {
    type: "number", step: "0.1", min: "-10", max: "10", value: text_strength ?? "", placeholder: "text",
    ariaLabel: "Strength on the text encoders", title: "Strength on the text encoders; the same if empty",
  });
  const remove = element("button", { type: "button", className: "small", textContent: "×", ariaLabel: "Remove this LoRA" });
  const row = element("div", { className: "lora" }, choice, amount, text, remove);
  remove.onclick = () => {
    row.remove();
    changed();
  };
  $("loras").append(row);
}

// In place of what is there.
export function fill(loras) {
  $("loras").replaceChildren();
  for (const lora of loras) add(lora);
  $("lora-section").open = loras.length > 0;
}

export const fields = () => [...$("loras").children].map((row) => {
  const [amount, text] = row.querySelectorAll("input");
  return { name: row.querySelector("select").value, ...numbers({ strength: amount, text_strength: text }) };
});
