// Talks to the server: requests with the key, streams of events, and errors in plain words.

import { ofTab, read, write } from "./storage.js";

const KEY = "cuplama.key"; // kept until the tab is closed

/** What went wrong, in words for the person at the page. `detail` is what the server said. */
export class ServerError extends Error {
  constructor(message, detail = "", status = 0) {
    super(message);
    this.detail = detail;
    this.status = status;
  }
}

const WORDS = {
  401: "The server wants an API key.",
  404: "The server does not know this model or address.",
  413: "This is more than the server reads in one request.",
  429: "The server is busy: too many requests are waiting.",
  500: "The server failed on this request.",
  503: "The server is not ready.",
};

let key = read(ofTab, KEY);
let askForKey = async () => null;

/** Says how to ask a person for a key: `ask(wasWrong)` gives it, or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** A response with status 200. Raises ServerError; where the server wants a key, one is asked for. */
async function request(path, options = {}) {
  const headers = {
    ...(options.body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. It may have stopped, or the network is down.");
  }
  if (response.status === 401) {
    const given = await askForKey(Boolean(key));
    if (given) {
      key = given;
      write(ofTab, KEY, given);
      return request(path, options);
    }
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const { message = "", code } = await errorOf(response);
  if (code === "context_length_exceeded") {
    return new ServerError("This is longer than the model can read. Delete messages, or start anew.", message, 400);
  }
  const wait = response.headers.get("Retry-After");
  const words = WORDS[response.status] ?? "The server refused this request.";
  return new ServerError(wait ? `${words} Try again in ${wait} s.` : words, message, response.status);
}

async function errorOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {};
  }
}

/** The models that the server has. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** The state of the server: "ready", "loading", "failed" or "silent", and what it says. Never raises. */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) return { state: "ready", message: "" };
    const { message = "" } = await errorOf(response);
    return { state: message === "Loading model" ? "loading" : "failed", message };
  } catch {
    return { state: "silent", message: "" };
  }
}

/** The events of a streamed answer as objects. Raises ServerError; aborting the signal raises AbortError. */
export async function* stream(path, body, signal) {
  const response = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(WORDS[500], event.error.message);
      yield event;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke before the answer was complete.", error.message);
  }
  throw new ServerError("The connection ended before the answer was complete.");
}

/** The data of server-sent events. Each of ours is one line. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let line = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [first, ...others] = value.split("\n");
    line += first;
    for (const next of others) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
      line = next;
    }
  }
}
