// The panel of settings: sampling for all conversations, the system prompt for the one that is open.

import { byId, el } from "./dom.js";
import { SETTINGS } from "./requests.js";
import { lasting, read, write } from "./storage.js";

const KEY = "cuplama.settings";

/** The settings that have a value, by name. */
export function settings() {
  try {
    const kept = JSON.parse(read(lasting, KEY)) ?? {};
    return Object.fromEntries(
      SETTINGS.flatMap(({ name }) => (Number.isFinite(kept[name]) ? [[name, kept[name]]] : [])),
    );
  } catch {
    return {};
  }
}

/** Makes the fields. What is not a number in its range is marked and not kept. */
export function showSettings() {
  const values = settings();
  const fields = SETTINGS.map(({ name, label, about, min, max, step }) => {
    const id = `setting-${name}`;
    const range = { min, step: "any", ...(max !== undefined && { max }) };
    const input = el("input", {
      id,
      type: "number",
      inputMode: "decimal",
      placeholder: "model's own",
      "aria-describedby": `${id}-about`,
      ...range,
    });
    input.step = step >= 1 ? step : "any";
    input.value = values[name] ?? "";
    input.addEventListener("input", keep);
    return el(
      "div",
      { class: "field number" },
      el("label", { htmlFor: id }, label),
      input,
      el("p", { id: `${id}-about` }, about),
    );
  });
  byId("fields").replaceChildren(...fields);
}

function keep() {
  const inputs = SETTINGS.map(({ name }) => [name, byId(`setting-${name}`)]);
  const good = inputs.filter(([, input]) => input.value !== "" && input.checkValidity());
  for (const [, input] of inputs) input.setAttribute("aria-invalid", String(!input.checkValidity()));
  write(lasting, KEY, JSON.stringify(Object.fromEntries(good.map(([name, input]) => [name, Number(input.value)]))));
}

/** Leaves everything to the model again. */
export function resetSettings() {
  write(lasting, KEY, null);
  showSettings();
}
