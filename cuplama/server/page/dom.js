// Makes elements without any HTML text: what a model or a user wrote only ever becomes a text node.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. Of `props`, functions become listeners of that event, `class` and names with a dash become attributes,
 * the rest become properties. Children are nodes, strings, or arrays of them; a string becomes a text node.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "class" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  for (const child of children.flat()) node.append(child);
  return node;
}

/** A button that shows a word. */
export const button = (label, click, props = {}) => el("button", { type: "button", click, ...props }, label);

/** Has a screen reader say a sentence. */
export function announce(sentence) {
  byId("status").textContent = sentence;
}

let toastTimer = 0;

/** Shows a sentence for some seconds, with one thing that can be done about it. */
export function toast(sentence, action = null, seconds = 8) {
  const box = byId("toast");
  const hide = () => box.replaceChildren();
  clearTimeout(toastTimer);
  const act = action && button(action.label, () => (hide(), action.run()), { class: "link" });
  box.replaceChildren(el("p", {}, sentence), ...(act ? [act] : []), button("Dismiss", hide, { class: "link" }));
  toastTimer = setTimeout(hide, seconds * 1000);
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text) {
  const node = button("Copy", async () => {
    node.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (node.textContent = "Copy"), 1500);
  });
  return node;
}

/** Puts text into the clipboard; true if that worked. */
async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Refused: the older way below may be allowed.
    }
  }
  // A page that came over plain http from another machine has no clipboard object.
  const area = el("textarea", { value: text, class: "offscreen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
