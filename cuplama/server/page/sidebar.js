// The list of conversations: open, rename, delete, export and import.

import { button, byId, el, toast } from "./dom.js";
import * as store from "./store.js";

/** Shows the list. `actions`: `open(conversation)`, `remove(conversation)`, `renamed(conversation)`. */
export function showList(current, actions) {
  const list = byId("conversations");
  if (list.querySelector("input")) return; // a title is being written
  const focused = list.contains(document.activeElement) && document.activeElement.closest("li");
  const which = focused && [...focused.querySelectorAll("button")].indexOf(document.activeElement);
  const rows = store.all().map((conversation) => row(conversation, conversation.id === current.id, actions));
  list.replaceChildren(...(rows.length ? rows : [el("li", { class: "none" }, "None yet")]));
  if (focused) list.querySelector(`[data-id="${focused.dataset.id}"]`)?.querySelectorAll("button")[which]?.focus();
}

function row(conversation, isOpen, actions) {
  const title = conversation.title || "Untitled";
  const open = button(title, () => actions.open(conversation), { class: "open", title });
  if (isOpen) open.setAttribute("aria-current", "true");
  const rename = button("Rename", () => edit(item, conversation, actions), { "aria-label": `Rename ${title}` });
  const remove = button("Delete", () => actions.remove(conversation), { "aria-label": `Delete ${title}` });
  const item = el("li", { "data-id": conversation.id }, open, el("span", { class: "tools" }, rename, remove));
  return item;
}

/** A field for the title in place of the row. */
function edit(item, conversation, actions) {
  const field = el("input", { value: conversation.title, maxLength: 120, "aria-label": "Title of the conversation" });
  let done = false;
  const close = (keep) => {
    if (done) return;
    done = true;
    const title = field.value.trim();
    if (keep && title) {
      Object.assign(conversation, { title, named: true });
      store.save(conversation, false);
    }
    field.remove();
    actions.renamed(conversation);
    byId("conversations").querySelector(`[data-id="${conversation.id}"] .open`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    close(event.key === "Enter");
  });
  field.addEventListener("blur", () => close(true));
  item.replaceChildren(field);
  field.focus();
  field.select();
}

/** Gives all conversations to the person as a file. */
export function exportAll() {
  const url = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  const day = new Date().toISOString().slice(0, 10);
  const anchor = el("a", { href: url, download: `cuplama-conversations-${day}.json` });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Takes conversations from a file that the person chose. */
export async function importFrom(file) {
  try {
    const count = store.imported(await file.text());
    toast(`${count} ${count === 1 ? "conversation" : "conversations"} read from ${file.name}.`);
  } catch (error) {
    toast(`${file.name} was not read. ${error.message}`);
  }
}
