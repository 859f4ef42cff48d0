// The page: what is open, what is being answered, and what each button and key does.

import { stream } from "./api.js";
import { announce, byId, toast } from "./dom.js";
import { bindComposer, showComposer } from "./composer.js";
import { bindPanels } from "./panels.js";
import { readEvent, requestOf, statsOf } from "./requests.js";
import { resetSettings, settings, showSettings } from "./settings.js";
import { askModel, bindServer, isReady, watchServer } from "./server.js";
import { exportAll, importFrom, showList } from "./sidebar.js";
import * as store from "./store.js";
import * as thread from "./thread.js";

const OPEN = "cuplama.open"; // the conversation that a reload of this tab finds again
const SAVE = 1000; // milliseconds between two savings of a growing answer

let model = null; // what /v1/models says of it
let current = store.create("chat");
const runs = new Map(); // id of a conversation -> {controller} while it is answered

const isBusy = () => runs.has(current.id);
const kinds = () =>
  model?.chat_template === false
    ? [["text", "Text"]]
    : [
        ["chat", "Chat"],
        ["text", "Plain text"],
      ];

function refresh() {
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · cuplama` : "cuplama";
  byId("system").value = current.system;
  byId("system").closest(".field").hidden = current.kind === "text";
  showList(current, { open, remove: removeConversation, renamed: refresh });
  refreshComposer();
}

function refreshComposer() {
  thread.setBusy(isBusy());
  const { stats } = current.messages.findLast((m) => m.stats) ?? {};
  const used =
    stats && model?.max_model_len
      ? [stats.prompt + stats.tokens, model.max_model_len].map((n) => n.toLocaleString("en"))
      : null;
  showComposer({
    busy: isBusy(),
    ready: isReady(),
    kind: current.kind,
    canGoOn: current.kind === "text" && current.messages.length > 0,
    used: used ? `${used[0]} of ${used[1]} tokens of context` : "",
  });
}

function open(conversation) {
  current = conversation;
  sessionStorage.setItem(OPEN, conversation.id);
  thread.show(conversation, actions);
  refresh();
  panels.closeMenu();
}

function fresh() {
  open(store.create(kinds()[0][0]));
  focusPrompt();
}

/** Not on a phone, where the keyboard would cover the page. */
function focusPrompt() {
  if (!matchMedia("(pointer: coarse)").matches) byId("prompt").focus();
}

/** Reads the text of the composer and has it answered. True if it was taken. */
function send(text) {
  if (isBusy() || !isReady()) return false;
  const last = current.messages.at(-1);
  if (!text.trim() && !(current.kind === "text" && last)) return false;
  if (text.trim()) current.messages.push({ role: "user", content: joined(last, text) });
  answer(current);
  return true;
}

/** In a plain text, a word that follows a word needs a blank between them. */
function joined(last, text) {
  const touches = current.kind === "text" && last && /\S$/.test(last.content) && /^[\p{L}\p{N}]/u.test(text);
  return touches ? ` ${text}` : text;
}

/** Has the model answer what the conversation holds. */
async function answer(conversation) {
  const { path, body } = requestOf(conversation, settings(), model?.id);
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  conversation.messages.push(message);
  runs.set(conversation.id, { controller });
  store.save(conversation);
  if (conversation === current) {
    open(conversation);
    focusPrompt();
  }
  announce("The model is answering.");
  try {
    await read(stream(path, body, controller.signal), conversation, message);
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else message.error = { message: error.message, detail: error.detail ?? "" };
    if (error.status === 0 || error.status === 503) watchServer();
  }
  message.end ??= "stop";
  runs.delete(conversation.id);
  if (store.find(conversation.id) === conversation) store.save(conversation);
  thread.viewOf(message)?.finish();
  announce(message.error ? message.error.message : `The answer is complete. ${message.content.slice(0, 2000)}`);
  refresh();
}

/** Reads a stream of events into a message, and shows it as it grows. */
async function read(events, conversation, message) {
  const begun = performance.now();
  let [first, last, saved, usage] = [0, 0, begun, null];
  for await (const event of events) {
    const added = readEvent(conversation.kind, event);
    const now = performance.now();
    usage = added.usage ?? usage;
    message.end = added.finish ?? message.end;
    if (!added.text && !added.reasoning) continue;
    [first, last] = [first || now, now];
    if (added.reasoning) message.reasoning = (message.reasoning ?? "") + added.reasoning;
    if (added.text && message.reasoning) message.thought ??= now - first;
    message.content += added.text;
    thread.viewOf(message)?.grow();
    if (now - saved > SAVE) {
      saved = now;
      store.save(conversation, false);
    }
  }
  if (usage) message.stats = statsOf(usage, begun, first || last, last);
}

function stop() {
  runs.get(current.id)?.controller.abort();
}

/** Takes messages away from `from` on, `count` of them, and offers to bring them back. */
function removeMessages(from, count) {
  const conversation = current;
  const gone = conversation.messages.splice(from, count);
  store.save(conversation);
  open(conversation);
  focusPrompt();
  const undo = () => {
    conversation.messages.splice(from, 0, ...gone);
    store.save(conversation);
    open(conversation);
  };
  toast(gone.length > 1 ? "Message and answer deleted." : "Message deleted.", { label: "Undo", run: undo });
}

function removeConversation(conversation) {
  runs.get(conversation.id)?.controller.abort();
  store.remove(conversation);
  if (conversation === current) fresh();
  else refresh();
  const undo = () => {
    store.save(conversation, false);
    open(conversation);
  };
  toast(`“${conversation.title || "Untitled"}” deleted.`, { label: "Undo", run: undo });
}

const allText = () => current.messages.map((m) => m.content).join("");

// What the messages on the page can have done to them.
const actions = {
  kinds,
  setKind(kind) {
    current.kind = kind;
    open(current);
  },
  begin: send,
  textOf: (message) => (current.kind === "text" ? allText() : message.content),
  sendsEdited: (message) => current.kind === "text" || message.role === "user",
  regenerate(message) {
    if (isBusy()) return;
    const at = current.messages.indexOf(message);
    current.messages.splice(message.role === "user" ? at + 1 : at);
    answer(current);
  },
  edit(message, text) {
    if (isBusy() || !text.trim()) return;
    const at = current.kind === "text" ? 0 : current.messages.indexOf(message);
    const sends = actions.sendsEdited(message);
    const edited = sends ? { role: "user", content: text } : { role: "assistant", content: text, end: "stop" };
    current.messages.splice(at, sends ? Infinity : 1, edited);
    if (sends) answer(current);
    else {
      store.save(current);
      open(current);
    }
  },
  /** A question goes together with its answer: two turns of one side in a row are refused by many models. */
  remove(message) {
    if (isBusy()) return;
    const at = current.messages.indexOf(message);
    const pair = current.kind === "chat" && message.role === "user" && current.messages[at + 1]?.role === "assistant";
    removeMessages(at, pair ? 2 : 1);
  },
};

/** Called when the server is ready: asks which model it has, and whether that one can chat. */
async function greet() {
  const found = await askModel();
  if (!found) return;
  model = found;
  byId("model").textContent = model.id;
  if (!current.messages.length) {
    const fits = kinds().some(([kind]) => kind === current.kind);
    actions.setKind(fits ? current.kind : kinds()[0][0]);
  }
}

function bind() {
  const on = (id, event, act) => byId(id).addEventListener(event, act);
  on("new", "click", fresh);
  on("export", "click", exportAll);
  on("import", "click", () => byId("file").click());
  on("file", "change", async ({ target }) => {
    if (target.files[0]) await importFrom(target.files[0]);
    target.value = "";
    refresh();
  });
  on("reset", "click", resetSettings);
  on("system", "input", ({ target }) => {
    current.system = target.value;
    if (store.find(current.id)) store.save(current, false);
  });
  addEventListener("storage", ({ key }) => {
    const id = store.reread(key);
    if (id === current.id && store.find(id) && !isBusy()) open(store.find(id));
    else if (id) refresh();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      fresh();
    } else if (event.key === "Escape" && !byId("key-dialog").open && !panels.closeTop()) stop();
  });
}

const panels = bindPanels();
store.openStore(() => toast("This browser keeps no more conversations. Export and delete some."));
bindServer({ ready: greet, changed: refreshComposer });
bindComposer({ send, stop });
bind();
showSettings();
thread.watchScrolling();
open(store.find(sessionStorage.getItem(OPEN)) ?? current);
watchServer();
