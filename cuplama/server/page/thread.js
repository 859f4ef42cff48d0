// The messages of the conversation that is open, and where the page is scrolled to.

import { button, byId, el } from "./dom.js";
import { MessageView } from "./message.js";

const NEAR = 48; // pixels from the end within which the page follows a growing answer
const STARTS = ["Once upon a time", "One day, a little girl named Lily", "There was a small dog who"];

const root = () => byId("thread");
const list = () => byId("messages");
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

/** Shows a conversation from its end. */
export function show(conversation, actions) {
  views = new Map();
  follows = true;
  list().replaceChildren();
  list().dataset.kind = conversation.kind;
  for (const message of conversation.messages) add(conversation, message, actions);
  if (!conversation.messages.length) list().append(welcome(conversation, actions));
  follow();
}

function add(conversation, message, actions) {
  const view = new MessageView(message, conversation.kind, actions, follow);
  views.set(message, view);
  list().append(view.node);
}

/** The view of a message, if its conversation is shown. */
export const viewOf = (message) => views.get(message);

/** What an empty conversation says. */
function welcome({ kind }, actions) {
  const kinds = actions.kinds().map(([name, label]) =>
    button(label, () => actions.setKind(name), { "aria-pressed": String(name === kind) }),
  );
  const choice = kinds.length > 1 ? [el("div", { class: "choice", role: "group", "aria-label": "Kind" }, kinds)] : [];
  const text = kind === "text";
  const starts = STARTS.map((start) => button(start, () => actions.begin(start)));
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, text ? "Write a beginning" : "Start a conversation"),
    el("p", {}, text ? "The model goes on from where your text ends." : "Ask a question, or paste something to talk about."),
    text ? [el("div", { class: "starts" }, starts)] : [],
    choice,
  );
}
