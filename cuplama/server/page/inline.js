// Markdown within a paragraph: emphasis, code, links. Every step is linear in the text, whatever the text is: what may
// repeat is bounded, and a bracket or a run of backticks is looked up in a table of where it ends.

import { el } from "./dom.js";

const MAX_DEPTH = 16; // of emphasis within emphasis: too deep a tree of elements would stop the browser
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);
const SPECIAL = /[\\`*_~[!<\nh]/g;
const BARE_URL = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const TARGET = /\(<?((?:[^\s<>()]|\([^\s<>()]{0,200}\)){1,2000})>?(?:\s{1,9}"[^"]{0,500}")?\)/y;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

/** A fragment with the nodes of a piece of text. */
export const inline = (text) => build(matched(tokens(text, closingBrackets(text))));

/** An absolute http, https or mailto address as the browser reads it, or null. */
export function safeUrl(text) {
  try {
    const url = new URL(text);
    return PROTOCOLS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** A link to an address that is safe, or the text that stood there. */
function link(address, content, otherwise) {
  const href = safeUrl(address);
  return href
    ? el("a", { href, title: href, rel: "noopener noreferrer nofollow", target: "_blank" }, content)
    : otherwise;
}

/** The text as strings, nodes, and marks `{mark, opens, closes}`, in order. */
function tokens(text, brackets) {
  const out = [];
  const ends = { backticks: closingBackticks(text), brackets };
  let plain = 0; // where the plain text begins that is not in `out` yet
  for (let i = 0; i < text.length;) {
    SPECIAL.lastIndex = i;
    const hit = SPECIAL.exec(text);
    if (!hit) break;
    const found = READERS[hit[0]](text, hit.index, ends);
    i = found ? found.end : hit.index + 1;
    if (!found) continue;
    if (hit.index > plain) out.push(text.slice(plain, hit.index));
    out.push(...[found.token].flat());
    plain = i;
  }
  if (plain < text.length) out.push(text.slice(plain));
  return out;
}

// What may begin at a special character: each gives `{end, token}`, or nothing where the character is plain text.
// An image becomes a link: the page loads none.
const READERS = {
  "\\": (text, i) => (/[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? { end: i + 2, token: text[i + 1] } : null),
  "\n": (text, i) => ({ end: i + 1, token: el("br") }),
  "`": readCode,
  "*": readRun,
  _: readRun,
  "~": readRun,
  "[": (text, i, ends) => readLink(text, i, ends),
  "!": (text, i, ends) => (text[i + 1] === "[" ? readLink(text, i + 1, ends) : null),
  "<": (text, i) => {
    ANGLE_URL.lastIndex = i;
    const hit = ANGLE_URL.exec(text);
    return hit && { end: ANGLE_URL.lastIndex, token: link(hit[1], hit[1].replace(/^mailto:/, ""), hit[0]) };
  },
  h: (text, i) => {
    if (!text.startsWith("http", i) || /\w/.test(text[i - 1] ?? "")) return null;
    BARE_URL.lastIndex = i;
    const hit = BARE_URL.exec(text);
    const address = hit && withoutPunctuation(hit[0]);
    return hit && { end: i + address.length, token: link(address, address, address) };
  },
};

/** An address in running text does not hold the full stop, or the bracket of the sentence, that follows it. */
function withoutPunctuation(address) {
  let surplus = address.split(")").length - address.split("(").length;
  let end = address.length;
  for (; end > 0; end -= 1) {
    if (address[end - 1] === ")" && surplus > 0) surplus -= 1;
    else if (!/[.,;:!?*_~\]]/.test(address[end - 1])) break;
  }
  return address.slice(0, end);
}

function readCode(text, i, { backticks }) {
  const size = runLength(text, i);
  const close = backticks.get(i);
  if (close === undefined) return { end: i + size, token: text.slice(i, i + size) };
  let code = text.slice(i + size, close).replaceAll("\n", " ");
  if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
  return { end: close + size, token: el("code", {}, code) };
}

function readLink(text, i, { brackets }) {
  const close = brackets.get(i);
  if (close === undefined) return null;
  TARGET.lastIndex = close + 1;
  const hit = TARGET.exec(text);
  if (!hit) return null;
  const end = TARGET.lastIndex;
  const label = build(matched(tokens(text.slice(i + 1, close), new Map())));
  return { end, token: link(hit[1], label.hasChildNodes() ? label : hit[1], text.slice(i, end)) };
}

function readRun(text, i) {
  const [char, size] = [text[i], runLength(text, i)];
  const end = i + size;
  if (size > 3 || (char === "~" && size !== 2)) return { end, token: text.slice(i, end) };
  const [before, after] = [text[i - 1] ?? " ", text[end] ?? " "];
  const inWord = char === "_" && /\w/.test(before) && /\w/.test(after);
  const opens = /\S/.test(after) && !inWord;
  const closes = /\S/.test(before) && !inWord;
  const sizes = size < 3 ? [size] : closes && !opens ? [1, 2] : [2, 1];
  return { end, token: sizes.map((n) => ({ mark: char.repeat(n), opens, closes })) };
}

function runLength(text, i) {
  let end = i + 1;
  while (text[end] === text[i]) end += 1;
  return end - i;
}

/** Start of a run of backticks -> start of the next run that is as long. */
function closingBackticks(text) {
  const [ends, open] = [new Map(), new Map()];
  const runs = [...text.matchAll(/`+/g)].reverse();
  for (const { index, 0: run } of runs) {
    if (open.has(run.length)) ends.set(index, open.get(run.length));
    open.set(run.length, index);
  }
  return ends;
}

/** Position of `[` -> position of the `]` that belongs to it. */
function closingBrackets(text) {
  const [ends, open] = [new Map(), []];
  for (const { index, 0: char } of text.matchAll(/\\.|[[\]]/gs)) {
    if (char === "[") open.push(index);
    else if (char === "]" && open.length) ends.set(open.pop(), index);
  }
  return ends;
}

/**
 * Marks become tags where two belong together, and text where not. A mark that another pair crosses leaves the stack,
 * so each is looked at once; `count` says whether looking down the stack can find anything.
 */
function matched(items) {
  const [stack, count] = [[], {}];
  for (const item of items) {
    if (!item.mark) continue;
    if (item.closes && count[item.mark]) {
      let opener;
      do {
        opener = stack.pop();
        count[opener.mark] -= 1;
      } while (opener.mark !== item.mark);
      opener.side = "open";
      item.side = "close";
    } else if (item.opens) {
      stack.push(item);
      count[item.mark] = (count[item.mark] ?? 0) + 1;
    }
  }
  return items;
}

/** A fragment of what `matched` gave. */
function build(items) {
  const root = new DocumentFragment();
  const open = [root];
  for (const item of items) {
    const parent = open.at(-1);
    if (item.side === "open") {
      const inner = open.length > MAX_DEPTH ? parent : el(TAGS[item.mark]);
      if (inner !== parent) parent.append(inner);
      open.push(inner);
    } else if (item.side === "close") open.pop();
    else parent.append(item.mark ?? item);
  }
  root.normalize(); // joins neighbouring pieces of text
  return root;
}
