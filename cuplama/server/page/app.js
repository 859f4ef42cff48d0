// The page: what is open, what is being answered, and what each button and key does.

import { stream } from "./api.js";
import { announce, byId, toast } from "./dom.js";
import { bindComposer, showComposer } from "./composer.js";
import { bindPanels } from "./panels.js";
import { readEvent, requestOf, statsOf } from "./requests.js";
import { resetSettings, settings, showSettings } from "./settings.js";
import { askModel, bindServer, isReady, watchServer } from "./server.js";
import { exportAll, importFrom, showList } from "./sidebar.js";
import { ofTab, read, write } from "./storage.js";
import * as store from "./store.js";
import * as thread from "./thread.js";

const OPEN = "cuplama.open"; // the conversation that a reload of this tab finds again
const SAVE = 1000; // milliseconds between two savings of a growing answer

let model = null; // what /v1/models says of it
let current = store.create("chat");
const runs = new Map(); // id of a conversation -> {controller} while it is answered

const isBusy = () => runs.has(current.id);
const kinds = () => (model?.chat_template === false ? ["text"] : ["chat", "text"]);

function refresh() {
  byId("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · cuplama` : "cuplama";
  byId("system").value = current.system;
  byId("system").closest(".field").hidden = current.kind === "text";
  showList(current, { open: openAndWrite, remove: removeConversation, renamed: refresh });
  refreshComposer();
}

function refreshComposer() {
  thread.setBusy(isBusy());
  const { stats } = current.messages.findLast((m) => m.stats) ?? {};
  const [used, room] = [stats && stats.prompt + stats.tokens, model?.max_model_len].map((n) => n?.toLocaleString("en"));
  showComposer({
    busy: isBusy(),
    ready: isReady(),
    kind: current.kind,
    canGoOn: current.kind === "text" && current.messages.length > 0,
    used: used && room ? `${used} of ${room} tokens of context` : "",
  });
}

function open(conversation) {
  current = conversation;
  write(ofTab, OPEN, conversation.id);
  thread.show(conversation, actions);
  refresh();
  panels.closeMenu();
}

function openAndWrite(conversation) {
  open(conversation);
  focusPrompt();
}

const fresh = () => openAndWrite(store.create(kinds()[0]));

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

/** Has the model answer what the conversation holds, or go on with an answer that has begun. */
async function answer(conversation, message = { role: "assistant", content: "" }) {
  conversation.messages.push(message);
  const { path, body } = requestOf(conversation, settings(), model?.id);
  const controller = new AbortController();
  runs.set(conversation.id, { controller });
  store.save(conversation);
  if (conversation === current) openAndWrite(conversation);
  announce("The model is answering.");
  try {
    await follow(stream(path, body, controller.signal), conversation, message);
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
async function follow(events, conversation, message) {
  const begun = performance.now();
  let [first, last, saved] = [0, 0, begun];
  for await (const event of events) {
    const { text, reasoning, finish, usage } = readEvent(conversation.kind, event);
    const now = performance.now();
    message.end = finish ?? message.end;
    if (text || reasoning) [first, last] = [first || now, now];
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    if (text && message.reasoning) message.thought ??= now - first;
    message.content += text;
    if (usage?.completion_tokens) message.stats = statsOf(usage, begun, first || now, last || now);
    if (!text && !reasoning) continue;
    thread.viewOf(message)?.grow();
    if (now - saved > SAVE) {
      saved = now;
      store.save(conversation, false);
    }
  }
}

function stop() {
  runs.get(current.id)?.controller.abort();
}

/** Takes messages away from `from` on, `count` of them, and offers to bring them back. */
function removeMessages(from, count) {
  const conversation = current;
  const gone = conversation.messages.splice(from, count);
  store.save(conversation);
  openAndWrite(conversation);
  const undo = () => {
    conversation.messages.splice(from, 0, ...gone);
    store.save(conversation);
    open(conversation);
  };
  toast(gone.length > 1 ? "Message and answer deleted." : "Message deleted.", { label: "Undo", run: undo });
}

/** Offers to bring back what an answer to an earlier message has replaced. */
function offerBack(before) {
  const conversation = current;
  if (before.length - conversation.messages.length < 2) return;
  const undo = () => {
    runs.get(conversation.id)?.controller.abort();
    conversation.messages.splice(0, Infinity, ...before);
    store.save(conversation);
    open(conversation);
  };
  toast("What followed is replaced.", { label: "Undo", run: undo });
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
  goOn(message) {
    if (isBusy() || message !== current.messages.at(-1)) return;
    const { role, content, reasoning, thought } = current.messages.pop();
    answer(current, { role, content, ...(reasoning && { reasoning, thought }) });
  },
  textOf: (message) => (current.kind === "text" ? allText() : message.content),
  sendsEdited: (message) => current.kind === "text" || message.role === "user",
  regenerate(message) {
    if (isBusy()) return;
    const before = [...current.messages];
    current.messages.splice(current.messages.indexOf(message));
    offerBack(before);
    answer(current);
  },
  edit(message, text) {
    if (isBusy() || !text.trim()) return;
    const at = current.kind === "text" ? 0 : current.messages.indexOf(message);
    const sends = actions.sendsEdited(message);
    const before = [...current.messages];
    const edited = sends ? { role: "user", content: text } : { role: "assistant", content: text, end: "stop" };
    current.messages.splice(at, sends ? Infinity : 1, edited);
    if (sends) {
      offerBack(before);
      answer(current);
    } else {
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
    actions.setKind(kinds().includes(current.kind) ? current.kind : kinds()[0]);
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
open(store.find(read(ofTab, OPEN)) ?? current);
watchServer();
