// The browser's storage, which may be full, or switched off. A failure is told by the result and never raised.

/** Of this browser, for good. */
export const lasting = opened("localStorage");
/** Of this tab, until it is closed. */
export const ofTab = opened("sessionStorage");

function opened(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

/** The text that is kept under a key, or null. */
export function read(storage, key) {
  try {
    return storage.getItem(key);
  } catch {
    return null;
  }
}

/** Keeps a text, or with null nothing, under a key; true if that worked. */
export function write(storage, key, text) {
  try {
    if (text === null) storage.removeItem(key);
    else storage.setItem(key, text);
    return true;
  } catch {
    return false;
  }
}

/** All keys. */
export const keys = (storage) => (storage ? Object.keys(storage) : []);
