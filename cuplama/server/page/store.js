// Conversations, kept in this browser: one entry of its storage each, so that saving one does not write the others.

import { keys, lasting, read, write } from "./storage.js";

const PREFIX = "cuplama.conversation.";
const FORMAT = "cuplama-conversations";
const TITLE = 60; // characters

/**
 * Conversations by id: `{id, kind: "chat" | "text", title, named, updated, system, messages}`. named: a person gave
 * the title; updated: milliseconds since 1970.
 * A message is `{role, content, reasoning?, thought?, stats?, end?, error?}`. thought: milliseconds of reasoning; end:
 * why the answer ended.
 */
const known = new Map();

let onFull = () => {};

/** Reads everything. `full()` is called when the storage takes no more. */
export function openStore(full) {
  onFull = full;
  known.clear();
  for (const key of keys(lasting)) {
    if (!key.startsWith(PREFIX)) continue;
    const conversation = checked(parsed(read(lasting, key)));
    if (conversation) known.set(conversation.id, conversation);
  }
}

/** Reads again what another tab of this page has written. */
export function reread(key) {
  if (!key?.startsWith(PREFIX)) return null;
  const id = key.slice(PREFIX.length);
  const conversation = checked(parsed(read(lasting, key)));
  if (conversation) known.set(id, conversation);
  else known.delete(id);
  return id;
}

export const all = () => [...known.values()].sort((a, b) => b.updated - a.updated);
export const find = (id) => known.get(id);

/** A new conversation. It is kept once it has a message. */
export function create(kind) {
  return {
    id: crypto.randomUUID?.() ?? randomId(),
    kind,
    title: "",
    named: false,
    updated: Date.now(),
    system: "",
    messages: [],
  };
}

const randomId = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

/** Writes a conversation; `touched` moves it to the top of the list. */
export function save(conversation, touched = true) {
  if (touched) conversation.updated = Date.now();
  if (!conversation.named) conversation.title = titleOf(conversation);
  known.set(conversation.id, conversation);
  if (!write(lasting, PREFIX + conversation.id, JSON.stringify(conversation))) onFull();
}

export function remove({ id }) {
  known.delete(id);
  write(lasting, PREFIX + id, null);
}

function titleOf({ messages }) {
  const first =
    messages
      .find((m) => m.content.trim())
      ?.content.trim()
      .split("\n", 1)[0] ?? "";
  return first.length > TITLE ? `${first.slice(0, TITLE - 1).trimEnd()}…` : first;
}

/** Everything as the text of a JSON file. */
export const exported = () => JSON.stringify({ format: FORMAT, version: 1, conversations: all() }, null, 2);

/** Takes the conversations of such a text in, beside those that are here. Gives their number; raises an Error. */
export function imported(text) {
  const data = parsed(text);
  if (data?.format !== FORMAT || !Array.isArray(data.conversations))
    throw new Error("This is not a file of conversations from here.");
  const good = data.conversations.map(checked).filter(Boolean);
  for (const conversation of good) {
    const mine = known.get(conversation.id);
    if (mine && JSON.stringify(mine) === JSON.stringify(conversation)) continue;
    if (mine) conversation.id = create(conversation.kind).id;
    save(conversation, false);
  }
  return good.length;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const string = (value) => (typeof value === "string" ? value : "");

/** A conversation with the fields that this page knows, each of its right type; null where it is none. */
function checked(data) {
  if (!data || typeof data.id !== "string" || !/^[\w-]{8,64}$/.test(data.id) || !Array.isArray(data.messages))
    return null;
  const kind = data.kind === "text" ? "text" : "chat";
  const updated = Number.isFinite(data.updated) ? data.updated : Date.now();
  const messages = data.messages.filter((m) => m && (m.role === "user" || m.role === "assistant")).map(checkedMessage);
  return {
    id: data.id,
    kind,
    title: string(data.title),
    named: data.named === true,
    updated,
    system: string(data.system),
    messages,
  };
}

function checkedMessage({ role, content, reasoning, thought, stats, end, error }) {
  const message = { role, content: string(content) };
  if (string(reasoning)) message.reasoning = reasoning;
  if (Number.isFinite(thought)) message.thought = thought;
  if (stats && ["prompt", "tokens", "cached", "speed", "wait"].every((name) => Number.isFinite(stats[name])))
    message.stats = stats;
  // An answer without an end was growing when its page was closed.
  if (string(end) || role === "assistant") message.end = string(end) || "stopped";
  if (error && string(error.message)) message.error = { message: error.message, detail: string(error.detail) };
  return message;
}
