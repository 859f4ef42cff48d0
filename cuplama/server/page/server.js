// The state of the server, as it is shown above the messages, and the question for a key.

import { health, models, onKeyNeeded } from "./api.js";
import { byId } from "./dom.js";

const POLL = 1000; // milliseconds between two looks at a server that is not ready
const STATES = {
  loading: () => "The model is being loaded. You can write already.",
  failed: (message) => `The server cannot answer: ${message}`,
  refused: (message) => message,
  silent: () => "The server does not answer. Trying again…",
  ready: () => "",
};

let server = { state: "loading", message: "" };
let watching = false;
let asking = null; // while the person is asked for a key
let hooks = {};

export const isReady = () => server.state === "ready";

/** `ready()` is called when the server can answer, `changed()` whenever its state is another. */
export function bindServer({ ready, changed }) {
  hooks = { ready, changed };
  onKeyNeeded(askForKey);
  byId("state-again").addEventListener("click", watchServer);
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-dialog").close(byId("key").value.trim());
  });
}

/** Looks at the server until it is ready. */
export async function watchServer() {
  if (watching) return;
  watching = true;
  for (;;) {
    show(await health());
    if (isReady()) break;
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
  watching = false;
  await hooks.ready();
}

/** The model that the server has, as /v1/models describes it; null where the server refuses to say. */
export async function askModel() {
  try {
    return (await models())[0];
  } catch (error) {
    show({ state: "refused", message: error.message });
    return null;
  }
}

function show(now) {
  server = now;
  byId("state").hidden = isReady();
  byId("state").dataset.state = now.state;
  byId("state-text").textContent = STATES[now.state](now.message);
  byId("state-again").hidden = now.state !== "refused";
  hooks.changed();
}

/** Asks for a key, once for all requests that want one; null if none is given. */
function askForKey(wasWrong) {
  asking ??= showDialog(wasWrong).finally(() => (asking = null));
  return asking;
}

function showDialog(wasWrong) {
  const dialog = byId("key-dialog");
  byId("key-words").textContent = wasWrong ? "The server did not take this key." : "The server wants an API key.";
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue || null), { once: true });
  });
}
