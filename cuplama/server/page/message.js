// One message on the page: its text as it grows, its figures, and what can be done with it.

import { button, copyButton, el } from "./dom.js";
import { Markdown } from "./markdown.js";

const ENDS = {
  length: "Ended at the limit of tokens.",
  stopped: "Stopped.",
};
const PAINT = 40; // milliseconds between two paints at least
const SHARE = 4; // and this many times as long as a paint takes: the paints of a long text stay few

/** Text that is shown as it is. */
class Plain {
  #node = document.createTextNode("");
  #added = "";

  constructor(root) {
    root.append(this.#node);
  }

  append(text) {
    this.#added += text;
  }

  paint() {
    this.#node.appendData(this.#added);
    this.#added = "";
  }
}

/**
 * The view of a message. `actions` are the page's: `edit(message, text)`, `regenerate(message)`, `remove(message)`,
 * `goOn(message)` for one that was cut off, `textOf(message)` for copying and editing. `painted()` is called after each
 * change, for the page to scroll.
 */
export class MessageView {
  #message;
  #actions;
  #painted;
  #text; // Markdown or Plain
  #shown = 0; // characters of the content that #text has
  #timer = 0;
  #body = el("div", { class: "body" });
  #stats = el("p", { class: "stats" });
  #foot = el("div", { class: "foot" }, this.#stats);
  #thought = null; // of a model that reasons: {summary, text, shown}

  constructor(message, kind, actions, painted) {
    [this.#message, this.#actions, this.#painted] = [message, actions, painted];
    const who = { user: "You", assistant: "Model" }[message.role];
    this.node = el("article", { class: `message ${message.role}`, "aria-label": who }, this.#body, this.#foot);
    const marked = kind === "chat" && message.role === "assistant";
    this.#body.classList.add(marked ? "prose" : "plain");
    this.#text = new (marked ? Markdown : Plain)(this.#body);
    if (message.role === "user" || message.end || message.error) this.finish();
    else {
      this.node.classList.add("waiting");
      if (message.content || message.reasoning) this.grow();
    }
  }

  /** Called when the message has grown: paints soon. */
  grow() {
    this.#timer ||= setTimeout(() => this.#paint(false), PAINT);
  }

  /** Called when the message is complete. */
  finish() {
    clearTimeout(this.#timer);
    this.#timer = Infinity; // a late call of grow does nothing
    this.#paint(true);
    this.node.classList.remove("waiting");
    this.#foot.replaceChildren(...this.#notes(), this.#stats, this.#tools());
    this.#painted();
  }

  #paint(whole) {
    const begun = performance.now();
    const { content, stats } = this.#message;
    this.#text.append(content.slice(this.#shown));
    this.#shown = content.length;
    this.#text.paint(whole);
    this.#paintThought(whole);
    if (stats) this.#stats.textContent = figures(stats);
    if (content) this.node.classList.remove("waiting");
    this.#painted();
    if (whole) return;
    this.#timer = setTimeout(() => this.#again(), (performance.now() - begun) * SHARE);
  }

  #again() {
    this.#timer = 0;
    const { content, reasoning = "" } = this.#message;
    if (content.length > this.#shown || reasoning.length > (this.#thought?.shown ?? 0)) this.grow();
  }

  #paintThought(whole) {
    const { reasoning, thought, content } = this.#message;
    if (!reasoning) return;
    if (!this.#thought) {
      const [summary, text] = [el("summary"), el("div", { class: "plain" })];
      const node = el("details", { class: "thought" }, summary, text);
      this.node.prepend(node);
      this.#thought = { summary, text: new Plain(text), shown: 0 };
    }
    const view = this.#thought;
    view.text.append(reasoning.slice(view.shown));
    view.shown = reasoning.length;
    view.text.paint();
    const over = whole || content;
    view.summary.textContent = !over ? "Reasoning…" : thought ? `Reasoned for ${seconds(thought)}` : "Reasoning";
  }

  #notes() {
    const { error, end } = this.#message;
    const notes = [];
    if (error) {
      const words = [el("p", {}, error.message), ...(error.detail ? [el("p", { class: "detail" }, error.detail)] : [])];
      notes.push(
        el(
          "div",
          { class: "error", role: "alert" },
          words,
          button("Try again", () => this.#actions.regenerate(this.#message)),
        ),
      );
    }
    if (ENDS[end]) notes.push(el("p", { class: "note" }, ENDS[end]));
    return notes;
  }

  #tools() {
    const tools = [copyButton(() => this.#actions.textOf(this.#message))];
    // Hidden while an answer grows.
    const changing = (label, act, name = "") => tools.push(button(label, act, { class: `changes ${name}` }));
    // Shown below the last message of a chat alone; a plain text goes on anyway.
    if (ENDS[this.#message.end]) changing("Continue", () => this.#actions.goOn(this.#message), "go-on");
    changing("Edit", () => this.#edit(), "edit");
    if (this.#message.role === "assistant") changing("Regenerate", () => this.#actions.regenerate(this.#message));
    changing("Delete", () => this.#actions.remove(this.#message));
    return el("div", { class: "tools" }, tools);
  }

  /** Shows a field in place of the text. */
  #edit() {
    const sends = this.#actions.sendsEdited(this.#message);
    const area = el("textarea", { value: this.#actions.textOf(this.#message), "aria-label": "Text of the message" });
    const close = () => {
      this.node.classList.remove("editing");
      form.replaceWith(this.#body);
      this.#foot.querySelector(".edit")?.focus();
    };
    const save = () => {
      close();
      this.#actions.edit(this.#message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && sends && !event.shiftKey && !event.isComposing) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = [button(sends ? "Send" : "Save", save, { class: "primary" }), button("Cancel", close)];
    const form = el("div", { class: "editor" }, area, el("div", { class: "row" }, buttons));
    this.node.classList.add("editing");
    this.#body.replaceWith(form);
    area.style.height = `${Math.min(area.scrollHeight + 2, 480)}px`;
    area.focus();
  }
}

const seconds = (ms) => (ms < 950 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 9950 ? 1 : 0)} s`);

function figures({ prompt, tokens, cached, speed, wait }) {
  const count = (n) => n.toLocaleString("en");
  const known = cached ? `, ${count(cached)} of them cached` : "";
  const pace = `${speed.toFixed(1)} tokens/s · first after ${seconds(wait)}`;
  return `${count(tokens)} tokens, ${pace} · prompt of ${count(prompt)}${known}`;
}
