// The conversations, kept in this browser's local storage and nowhere else: one entry each, so that two tabs hardly meet.
// A conversation is {id, title, created, changed, system, messages}; what a message is, answer.js says.

const PREFIX = "jaxllm.conversation.";
const MOST = 4_000_000; // characters in all; browsers give a site five million
const FORMAT = "jaxllm-conversations";

const kept = new Map();

/** Reads what there is. An answer that was being written when the page closed is marked as broken off. */
export function open() {
  try {
    for (const name of Object.keys(localStorage)) if (idOf(name)) reread(name);
  } catch { /* storage is forbidden: everything lives as long as the page */ }
}

/** The id of the conversation that an entry of the storage holds, or null. */
export const idOf = (name) => (name?.startsWith(PREFIX) ? name.slice(PREFIX.length) : null);

/** Reads one entry, which may have gone or come from another tab. */
export function reread(name) {
  const id = idOf(name);
  const text = localStorage.getItem(name);
  const conversation = text && readOne(parsed(text));
  if (conversation) kept.set(id, { ...conversation, id });
  else if (text === null) kept.delete(id);
}

export const list = () => [...kept.values()].sort((a, b) => b.changed - a.changed);
export const get = (id) => kept.get(id);

export function create(system) {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", created: Date.now(), changed: Date.now(), system, messages: [] };
}

/** Keeps it. Returns a sentence if it could not be kept beyond this page, else null. */
export function save(conversation) {
  kept.set(conversation.id, conversation);
  const text = JSON.stringify(conversation);
  try {
    if (size(PREFIX + conversation.id) + text.length > MOST) throw new RangeError();
    localStorage.setItem(PREFIX + conversation.id, text);
    return null;
  } catch {
    return "This browser's storage is full, so this conversation lasts only until the page is closed: export or delete some.";
  }
}

/** Characters that all conversations but one take. */
function size(but) {
  return Object.keys(localStorage).reduce((sum, name) => sum + (name.startsWith(PREFIX) && name !== but ? localStorage.getItem(name).length : 0), 0);
}

export function remove(id) {
  kept.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch { /* it was never there */ }
}

export const exported = () => JSON.stringify({ format: FORMAT, version: 1, conversations: list() }, null, 1);

/** Adds the conversations of an exported file; one that is here already is left as it is. Returns a sentence. */
export function imported(text) {
  const file = parsed(text);
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) return "This file holds no conversations that were exported here.";
  const read = file.conversations.map(readOne);
  const fresh = read.filter((conversation) => conversation && !kept.has(conversation.id));
  const full = fresh.map(save).find((problem) => problem);
  const known = read.filter(Boolean).length - fresh.length;
  const bad = read.length - read.filter(Boolean).length;
  const rest = [known && `${known} were here already`, bad && `${bad} could not be read`].filter(Boolean).join(", ");
  return full ?? `${fresh.length} imported${rest && `; ${rest}`}.`;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : 0);

/** A conversation with nothing in it but what belongs there, or null: a file may hold anything. */
function readOne(value) {
  if (!/^[0-9a-f]{16}$/.test(value?.id) || !Array.isArray(value.messages)) return null;
  const { id, title, created, changed, system } = value;
  const messages = value.messages.filter((message) => ["user", "assistant"].includes(message?.role)).map(readMessage);
  return { id, title: text(title).slice(0, 120), created: number(created), changed: number(changed), system: text(system), messages };
}

function readMessage(message) {
  const { role, content } = message;
  if (role === "user") return { role, content: text(content) };
  const calls = Array.isArray(message.calls) ? message.calls.map((call) => ({ name: text(call?.name), arguments: text(call?.arguments) })) : [];
  const ended = ["done", "stopped", "failed"].includes(message.state);
  const broken = ended ? text(message.error) : "The page was closed before this answer was complete.";
  const stats = Object.fromEntries(Object.entries(message.stats ?? {}).map(([name, figure]) => [name, number(figure)]));
  const state = ended ? message.state : "failed";
  return { role, content: text(content), reasoning: text(message.reasoning), calls, state, error: broken, finish: text(message.finish), stats };
}
