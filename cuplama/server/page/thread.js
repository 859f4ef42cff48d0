// The messages of the conversation that is open, and where the page is scrolled to.

import { button, byId, el } from "./dom.js";
import { MessageView } from "./message.js";

const NEAR = 48; // pixels from the end within which the page follows a growing answer
const KINDS = { chat: "Chat", text: "Plain text" };
const STARTS = ["Once upon a time", "One day, a little girl named Lily", "There was a small dog who"];

const root = () => byId("thread");
const list = () => byId("messages");
let shown = null; // the conversation
let views = new Map(); // message -> its view
let follows = true;

/** Follows the growing text until somebody scrolls up. */
export function watchScrolling() {
  root().addEventListener("scroll", () => {
    follows = root().scrollHeight - root().scrollTop - root().clientHeight < NEAR;
  });
}

function follow() {
  if (follows) root().scrollTop = root().scrollHeight;
}

/** Shows a conversation from its end. Of one that is shown already, only what has changed is made anew. */
export function show(conversation, actions) {
  const known = conversation === shown ? views : new Map();
  shown = conversation;
  views = new Map();
  follows = true;
  list().dataset.kind = conversation.kind;
  for (const message of conversation.messages) {
    views.set(message, known.get(message) ?? new MessageView(message, conversation.kind, actions, follow));
  }
  const nodes = views.size ? [...views.values()].map((view) => view.node) : [welcome(conversation, actions)];
  for (const node of [...list().children]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, i) => node !== list().children[i] && list().insertBefore(node, list().children[i] ?? null));
  follow();
}

/** While an answer grows, what would change the conversation is hidden. */
export function setBusy(busy) {
  list().classList.toggle("busy", busy);
}

/** The view of a message, if its conversation is shown. */
export const viewOf = (message) => views.get(message);

/** What an empty conversation says. */
function welcome({ kind }, actions) {
  const kinds = actions
    .kinds()
    .map((name) => button(KINDS[name], () => actions.setKind(name), { "aria-pressed": String(name === kind) }));
  const choice = kinds.length > 1 ? [el("div", { class: "choice", role: "group", "aria-label": "Kind" }, kinds)] : [];
  const text = kind === "text";
  const starts = STARTS.map((start) => button(start, () => actions.begin(start)));
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, text ? "Write a beginning" : "Start a conversation"),
    el(
      "p",
      {},
      text ? "The model goes on from where your text ends." : "Ask a question, or paste something to talk about.",
    ),
    text ? [el("div", { class: "starts" }, starts)] : [],
    choice,
  );
}
