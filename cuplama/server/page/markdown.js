// Markdown of a growing text as elements of the page. Blocks that are complete are made once and then left alone; only
// the last ones are made anew when text arrives. HTML in the text stays text.

import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // of lists and quotes within each other
const FENCE = /^\s*(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^(\s*)([-*+]|(\d{1,9})[.)])(?:[ \t]+(?=\S)|[ \t]*$)/;

const codeTexts = new WeakMap(); // element of a code block -> its text node

/** Shows a text, which may still grow, at the end of `root`. */
export class Markdown {
  #root;
  #rest = ""; // the text of the blocks that are not complete
  #open = []; // their elements

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    this.#rest += text;
  }

  /** Brings the page up to date with the text. `whole`: nothing will follow. */
  paint(whole = false) {
    const lines = this.#rest.split("\n");
    const found = blocks(lines, 0);
    const grown = found.length && this.#open.length && grow(this.#open[0], found[0]) ? [this.#open.shift()] : [];
    for (const node of this.#open) node.remove();
    const made = found.slice(grown.length).map((block) => block.make());
    for (const node of made) this.#root.append(node);
    this.#open = [...grown, ...made];
    // Two further lines tell where a block ends: a table is known by its second, the last may be half a line.
    let done = 0;
    while (found[done + 1]?.start + 2 < lines.length) done += 1;
    if (whole) done = found.length;
    this.#open.splice(0, done);
    this.#rest = lines.slice(found[done]?.start ?? lines.length).join("\n");
  }
}

/** Adds to a code block what it lacks, so that a selection in it stays; false where it must be made anew. */
function grow(node, { code, language }) {
  const text = codeTexts.get(node);
  if (!text || code === undefined || node.dataset.language !== language || !code.startsWith(text.data)) return false;
  text.appendData(code.slice(text.data.length));
  return true;
}

/** The blocks of lines: `{start, end, make}`, of which `make()` gives the element; code has text and language. */
function blocks(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const kind = kindOf(lines, i, depth);
    const block = { start: i, ...READERS[kind](lines, i, depth) };
    found.push(block);
    i = block.end;
  }
  return found;
}

const elements = (lines, depth) => blocks(lines, depth).map((block) => block.make());

/** What begins at line i, which is not blank. */
function kindOf(lines, i, depth) {
  const line = lines[i];
  const fence = FENCE.exec(line);
  if (fence && !(fence[1][0] === "`" && fence[2].includes("`"))) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (isTable(line, lines[i + 1])) return "table";
  if (depth < MAX_DEPTH && QUOTE.test(line)) return "quote";
  if (depth < MAX_DEPTH && MARKER.test(line)) return "list";
  return "paragraph";
}

/** Whether line i ends a paragraph above it. A number other than 1 does not: a line may begin with a year. */
function interrupts(lines, i, depth) {
  const kind = kindOf(lines, i, depth);
  if (kind !== "list") return kind !== "paragraph";
  const [whole, , , number] = MARKER.exec(lines[i]);
  return (number === undefined || number === "1") && whole.length < lines[i].length;
}

/** The first line from i on that does not belong to a paragraph. */
function paragraphEnd(lines, i, depth) {
  while (i < lines.length && lines[i].trim() && !interrupts(lines, i, depth)) i += 1;
  return i;
}

const READERS = { code, heading, rule, table, quote, list, paragraph };

function paragraph(lines, start, depth) {
  const end = paragraphEnd(lines, start + 1, depth);
  const text = () =>
    lines
      .slice(start, end)
      .map((line) => line.trim())
      .join("\n");
  return { end, make: () => el("p", {}, inline(text())) };
}

function heading(lines, start) {
  const [, marks, title = ""] = HEADING.exec(lines[start]);
  // The page itself has the first level.
  const make = () => el(`h${Math.min(marks.length + 1, 6)}`, {}, inline(title.trim()));
  return { end: start + 1, make };
}

function rule(lines, start) {
  return { end: start + 1, make: () => el("hr") };
}

function code(lines, start) {
  const [, fence, info] = FENCE.exec(lines[start]);
  const indent = indentOf(lines[start]);
  const language = info.trim().split(/\s/, 1)[0].slice(0, 40);
  let end = start + 1;
  while (end < lines.length && !closes(lines[end].trim(), fence)) end += 1;
  const body = lines.slice(start + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const text = body.join("\n");
  return { end: Math.min(end + 1, lines.length), code: text, language, make: () => codeBlock(text, language) };
}

const closes = (line, fence) => line.length >= fence.length && line === fence[0].repeat(line.length);

/** A block of code with its language and a button that copies it. */
function codeBlock(text, language) {
  const node = document.createTextNode(text);
  const head = el(
    "div",
    { class: "code-head" },
    el("span", {}, language || "code"),
    copyButton(() => node.data),
  );
  const body = el("pre", { tabIndex: 0, "aria-label": `${language} code` }, el("code", {}, node));
  const block = el("div", { class: "code", "data-language": language }, head, body);
  codeTexts.set(block, node);
  return block;
}

function quote(lines, start, depth) {
  let end = start + 1;
  while (end < lines.length && (QUOTE.test(lines[end]) || isLazy(lines, end, depth))) end += 1;
  const inner = () => lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return { end, make: () => el("blockquote", {}, elements(inner(), depth + 1)) };
}

/** Whether line i goes on with a paragraph above it although it lacks the indent or the mark. */
const isLazy = (lines, i, depth) => Boolean(lines[i].trim() && lines[i - 1].trim()) && !interrupts(lines, i, depth);

function list(lines, start, depth) {
  const first = marker(lines[start]);
  const items = [];
  let end = start;
  for (let i = start; i < lines.length; i = skipBlank(lines, end)) {
    const mark = marker(lines[i]);
    if (!mark || mark.ordered !== first.ordered || Math.abs(mark.indent - first.indent) > 1) break;
    const after = itemEnd(lines, i, mark, depth);
    items.push(itemLines(lines.slice(i, after), mark));
    end = after;
  }
  const make = () => {
    const children = items.map((item) => listItem(elements(item, depth + 1)));
    return first.ordered ? el("ol", { start: first.number }, children) : el("ul", {}, children);
  };
  return { end, make };
}

function marker(line) {
  const hit = MARKER.exec(line);
  if (!hit || RULE.test(line)) return null;
  const indent = indentOf(line);
  return { indent, ordered: hit[3] !== undefined, number: Number(hit[3] ?? 1), width: hit[0].length };
}

/** The first line after an item: lines with two blanks more than its mark belong to it, as models write it. */
function itemEnd(lines, start, mark, depth) {
  let end = start + 1;
  for (let i = end; i < lines.length; i += 1) {
    if (!lines[i].trim()) continue;
    if (indentOf(lines[i]) < mark.indent + 2 && (marker(lines[i]) || !isLazy(lines, i, depth))) break;
    end = i + 1;
  }
  return end;
}

function itemLines([first, ...others], mark) {
  return [first.slice(mark.width), ...others.map((line) => line.slice(Math.min(indentOf(line), mark.width)))];
}

/** An item with a single paragraph shows it without a paragraph's space. */
function listItem(children) {
  const paragraphs = children.filter((child) => child.tagName === "P");
  if (paragraphs.length !== 1) return el("li", {}, children);
  return el(
    "li",
    {},
    children.flatMap((child) => (child === paragraphs[0] ? [...child.childNodes] : child)),
  );
}

function skipBlank(lines, i) {
  while (i < lines.length && !lines[i].trim()) i += 1;
  return i;
}

const indentOf = (line) => line.length - line.trimStart().length;

/** Whether a line with bars and the one below it begin a table. */
function isTable(line, below) {
  if (!below || !line.includes("|") || !below.includes("-") || !/^[-:|\s]+$/.test(below)) return false;
  const rules = cells(below);
  return rules.length === cells(line).length && rules.every((cell) => /^:?-+:?$/.test(cell));
}

function table(lines, start, depth) {
  let end = start + 2;
  while (end < lines.length && lines[end].includes("|") && !interrupts(lines, end, depth)) end += 1;
  const make = () => {
    const sides = cells(lines[start + 1]).map((rule) =>
      rule.endsWith(":") ? (rule[0] === ":" ? "center" : "right") : "",
    );
    const row = (line, tag) =>
      el(
        "tr",
        {},
        cells(line)
          .slice(0, sides.length)
          .map((cell, i) => el(tag, { class: sides[i] }, inline(cell))),
      );
    const body = lines.slice(start + 2, end).map((line) => row(line, "td"));
    const whole = el("table", {}, el("thead", {}, row(lines[start], "th")), el("tbody", {}, body));
    return el("div", { class: "table", tabIndex: 0 }, whole);
  };
  return { end, make };
}

/** The cells of a row. A bar after a backslash is text. */
function cells(line) {
  const bare = line.trim().replace(/^\|/, "");
  const found = [];
  let cell = "";
  for (const [part] of bare.matchAll(/\\.|\||[^\\|]+|\\/g)) {
    if (part === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += part === "\\|" ? "|" : part;
  }
  return cell.trim() ? [...found, cell.trim()] : found;
}
