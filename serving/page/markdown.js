// Markdown to DOM nodes: what models write, and no more. Nodes are made one by one and text stays text, so that nothing a model says
// can become markup; addresses are checked by the browser's own URL parser. Pictures are links: the page loads nothing from elsewhere.

import { copyButton, el } from "./dom.js";

const DEEPEST = 8; // nested lists, quotes and emphasis; beyond it, text stays as it is written
const LONGEST = 2000; // characters in the line of a heading or a table; some patterns would take long over more

/** Shows a growing text in `root`, making again only the blocks that changed. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  show(text) {
    const found = blocks(text.split("\n"));
    found.forEach((block, i) => {
      const old = this.shown[i];
      if (old && old.kind === block.kind && old.source === block.source) return;
      if (old && old.kind === "code" && block.kind === "code" && old.language === block.language) {
        this.root.children[i].querySelector("code").textContent = block.text; // in place: its button keeps the focus
      } else if (old) this.root.children[i].replaceWith(node(block, 0));
      else this.root.append(node(block, 0));
    });
    while (this.root.children.length > found.length) this.root.lastElementChild.remove();
    this.shown = found;
  }
}

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const HEADING_BEGINS = /^ {0,3}#{1,6}\s/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The blocks of some lines: {kind, source, ...}. Every line is looked at a bounded number of times. */
export function blocks(lines) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = take(lines, at);
    found.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return found;
}

function take(lines, at) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return takeCode(lines, at, match);
  if (line.length <= LONGEST && (match = HEADING.exec(line))) return [{ kind: "heading", level: match[1].length, text: match[2] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return takeQuote(lines, at);
  if (ITEM.test(line)) return takeList(lines, at);
  if (isTable(lines, at)) return takeTable(lines, at);
  return takeParagraph(lines, at);
}

function takeCode(lines, at, [, indent, fence, language]) {
  let end = at + 1;
  const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const inner = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent.length}}`), ""));
  return [{ kind: "code", language: language.trim().split(/\s/)[0], text: inner.join("\n") }, Math.min(end + 1, lines.length)];
}

function takeQuote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return [{ kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(QUOTE, "")) }, end];
}

/** A list: items at the first one's indentation, each with the lines indented deeper than its sign. */
function takeList(lines, at) {
  const [, indent, sign] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(sign);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    const deeper = lines[end].search(/\S/) > indent.length;
    if (match && match[1].length <= indent.length + 1 && !RULE.test(lines[end])) {
      if (/\d/.test(match[2]) !== ordered) break;
      items.push([lines[end].slice(match[0].length)]);
    } else if (deeper) items.at(-1).push(lines[end].slice(Math.min(lines[end].search(/\S/), indent.length + sign.length + 1)));
    else if (!lines[end].trim() && goesOn(lines, end + 1, indent.length, ordered)) items.at(-1).push("");
    else break;
    end += 1;
  }
  return [{ kind: "list", ordered, start: ordered ? parseInt(sign, 10) : 1, items }, end];
}

/** Whether the list continues after an empty line. */
function goesOn(lines, at, indent, ordered) {
  const next = lines[at];
  if (next === undefined || !next.trim()) return false;
  const match = ITEM.exec(next);
  return match && match[1].length <= indent + 1 ? /\d/.test(match[2]) === ordered : next.search(/\S/) > indent;
}

function isTable(lines, at) {
  const [head, divider] = [lines[at], lines[at + 1] ?? ""];
  if (!head.includes("|") || !divider.includes("-") || Math.max(head.length, divider.length) > LONGEST) return false;
  return DIVIDER.test(divider) && cells(head).length === cells(divider).length;
}

function takeTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const align = cells(lines[at + 1]).map((cell) => (/^:.*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : null));
  return [{ kind: "table", align, head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells) }, end];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function takeParagraph(lines, at) {
  let end = at + 1;
  const begins = (line) => !line.trim() || [FENCE, HEADING_BEGINS, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
  while (end < lines.length && !begins(lines[end]) && !isTable(lines, end)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end];
}

function node(block, depth) {
  if (depth > DEEPEST) return el("p", {}, block.source);
  switch (block.kind) {
    case "code": return codeNode(block);
    case "heading": return el(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...blocks(block.lines).map((inner) => node(inner, depth + 1)));
    case "list": return listNode(block, depth);
    case "table": return tableNode(block);
    default: return el("p", {}, ...inline(block.text));
  }
}

function codeNode({ language, text }) {
  const code = el("code", {}, text);
  const head = el("div", { class: "code-head" }, el("span", {}, language), copyButton(() => code.textContent));
  // A block that scrolls must be reachable by keyboard.
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0", role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, code));
}

function listNode({ ordered, start, items }, depth) {
  const made = items.map((lines) => {
    const [first, ...others] = blocks(lines);
    const tight = first?.kind === "paragraph" ? inline(first.text) : first ? [node(first, depth + 1)] : [];
    return el("li", {}, ...tight, ...others.map((inner) => node(inner, depth + 1)));
  });
  return el(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {}, ...made);
}

function tableNode({ align, head, rows }) {
  const row = (tag, texts) => el("tr", {}, ...align.map((side, i) => el(tag, { class: side }, ...inline(texts[i] ?? ""))));
  const table = el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...rows.map((texts) => row("td", texts))));
  return el("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

const LINK = /!?\[((?:[^[\]\\]|\\.|\[[^[\]]{0,200}\]){0,500})\]\(\s*<?([^\s()<>]{0,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,4})>?(?:\s+"[^"]{0,200}")?\s*\)/y;
const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const SIGNS = /\\[\\`*_{}[\]()#+.!|~<>-]|`+|\*{1,3}|_{1,3}|~~|!?\[|https?:\/\/|\n/g;
const TAGS = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], ___: ["strong", "em"], "~~": ["del"] };

/** The nodes of one block's text. */
export function inline(text, depth = 0) {
  const out = [];
  const absent = new Map(); // signs that have no partner from some place on: looked for once, so that a million of them stay cheap
  let done = 0;
  const signs = new RegExp(SIGNS);
  for (let match; (match = signs.exec(text)); ) {
    const [made, end] = depth < DEEPEST ? meaning(text, match[0], match.index, depth, absent) : [null, 0];
    if (!made) continue;
    if (match.index > done) out.push(text.slice(done, match.index));
    out.push(made);
    done = signs.lastIndex = end;
  }
  if (done < text.length) out.push(text.slice(done));
  return out;
}

/** [node, where it ends] of the sign at `at`, or [null] where it is only a character. */
function meaning(text, sign, at, depth, absent) {
  if (sign === "\n") return [el("br"), at + 1];
  if (sign[0] === "\\") return [document.createTextNode(sign[1]), at + 2];
  if (sign[0] === "`") return codeSpan(text, sign, at, absent);
  if (sign.endsWith("[")) return link(text, at, depth);
  if (sign.startsWith("http")) return bare(text, at);
  return emphasis(text, sign, at, depth, absent);
}

function codeSpan(text, sign, at, absent) {
  if (absent.get(sign) <= at) return [null];
  const close = new RegExp(`(?<!\`)${sign}(?!\`)`, "g");
  close.lastIndex = at + sign.length;
  const match = close.exec(text);
  if (!match) {
    absent.set(sign, at);
    return [null];
  }
  const inner = text.slice(at + sign.length, match.index).replaceAll("\n", " ");
  return [el("code", {}, /^ .*\S.* $/.test(inner) ? inner.slice(1, -1) : inner), match.index + sign.length];
}

function emphasis(text, sign, at, depth, absent) {
  const from = at + sign.length;
  const word = /[\p{L}\p{N}]/u;
  const opens = /\S/.test(text[from] ?? "") && !(sign[0] === "_" && word.test(text[at - 1] ?? ""));
  if (!opens || absent.get(sign) <= at) return [null];
  for (let close = text.indexOf(sign, from + 1), tries = 0; close >= 0 && tries < 50; close = text.indexOf(sign, close + 1), tries += 1) {
    const alone = text[close + sign.length] !== sign[0] && text[close - 1] !== sign[0];
    const ends = /\S/.test(text[close - 1]) && text[close - 1] !== "\\" && !(sign[0] === "_" && word.test(text[close + sign.length] ?? ""));
    if (!alone || !ends) continue;
    const inner = inline(text.slice(from, close), depth + 1);
    return [TAGS[sign].reduceRight((nodes, tag) => [el(tag, {}, ...nodes)], inner)[0], close + sign.length];
  }
  if (text.indexOf(sign, from + 1) < 0) absent.set(sign, at);
  return [null];
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const match = LINK.exec(text);
  const href = match && safe(match[2]);
  return href ? [anchor(href, inline(match[1] || match[2], depth + 1)), at + match[0].length] : [null];
}

function bare(text, at) {
  BARE.lastIndex = at;
  const [found] = BARE.exec(text) ?? [""];
  // The full stop of a sentence, or the bracket around it, is not part of the address.
  const address = found.replace(/[.,;:!?*_~\]]+$/, "").replace(/\)+$/, (end) => (found.includes("(") ? end : ""));
  const href = safe(address);
  return href ? [anchor(href, [address]), at + address.length] : [null];
}

const anchor = (href, nodes) => el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);

/** The address if a browser may follow it, else null: no javascript:, no data:, nothing relative to this server. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
