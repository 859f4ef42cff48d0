// The field at the foot of the page, where a person writes.

import { byId } from "./dom.js";

const HEIGHT = 240; // pixels; a longer text scrolls within the field
const WORDS = {
  chat: "Write a message",
  text: "Write a beginning",
  more: "Write more",
};

/** `send(text)` gives whether the text was taken; `stop()` ends the answer that is under way. */
export function bindComposer({ send, stop }) {
  const field = byId("prompt");
  const submit = () => {
    if (!send(field.value)) return;
    field.value = "";
    fit(field);
  };
  field.addEventListener("input", () => fit(field));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
    field.focus();
  });
  byId("stop").addEventListener("click", () => {
    stop();
    field.focus();
  });
}

function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, HEIGHT)}px`;
}

/** busy: an answer is under way; used: what stands about the context. */
export function showComposer({ busy, ready, kind, canGoOn, used }) {
  byId("prompt").placeholder = canGoOn ? WORDS.more : WORDS[kind];
  byId("send").textContent = kind === "text" ? "Continue" : "Send";
  byId("send").disabled = !ready;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("used").textContent = used;
}
