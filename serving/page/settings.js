// The settings: what a request says beyond its messages. An empty field sends nothing, and shows what the server then does.

import { TEXT_TOKENS } from "./answer.js";
import { el } from "./dom.js";

const NAME = "jaxllm.settings";
const OFF = { top_k: 0, seed: null };

// name, label, what it does, least, most, step
const NUMBERS = [
  ["temperature", "Temperature", "0 takes the likeliest token", 0, 2, 0.1],
  ["top_p", "Top p", "draw from tokens that have this probability together", 0, 1, 0.05],
  ["top_k", "Top k", "draw from so many tokens; 0 is all", 0, null, 1],
  ["min_p", "Min p", "and at least so likely, beside the likeliest", 0, 1, 0.01],
  ["max_tokens", "Max tokens", "most tokens in an answer", 1, null, 1],
  ["seed", "Seed", "the same seed draws the same answer", 0, null, 1],
  ["presence_penalty", "Presence penalty", "lowers tokens that were used", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", "lowers them by how often", -2, 2, 0.1],
  ["repetition_penalty", "Repetition penalty", "divides their logits; 1 is off", 0, 2, 0.05],
];

export class Settings {
  constructor(root, changedSystem) {
    this.values = stored();
    this.system = area("system", "System prompt", "What the model is told before the conversation; kept with this conversation.", 4);
    this.system.field.addEventListener("input", () => changedSystem(this.system.field.value));
    this.inputs = NUMBERS.map(([name, label, what, min, max, step]) => {
      const field = el("input", { id: `set-${name}`, type: "number", min, max, step: step < 1 ? "any" : step, inputmode: "decimal", "aria-describedby": `what-${name}` });
      return { name, field, root: el("div", { class: "setting" }, el("label", { for: field.id }, label), field, el("p", { id: `what-${name}`, class: "note" }, what)) };
    });
    this.stop = area("stop", "Stop strings", "One a line; the answer ends before the first of them.", 2);
    this.extra = area("extra", "Further fields", "A JSON object that is added to the request, such as {\"tools\": [...]} or {\"chat_template_kwargs\": {...}}.", 3);
    this.problem = el("p", { class: "problem", role: "alert" });
    const note = el("p", { class: "note" }, "What is left empty is not sent; in grey is what the server then takes.");
    root.append(this.system.root, note, el("div", { class: "grid" }, ...this.inputs.map((input) => input.root)), this.stop.root, this.extra.root, this.problem);
    this.fields = [...this.inputs, { name: "stop", field: this.stop.field }, { name: "extra", field: this.extra.field }];
    for (const { name, field } of this.fields) {
      field.value = this.values[name] ?? "";
      field.addEventListener("input", () => this.take(name, field));
    }
  }

  take(name, field) {
    if (field.value === "") delete this.values[name];
    else this.values[name] = field.value;
    this.problem.textContent = this.wrong() ?? "";
    try {
      localStorage.setItem(NAME, JSON.stringify(this.values));
    } catch { /* they last as long as the page */ }
  }

  reset() {
    for (const { name, field } of this.fields) {
      field.value = "";
      this.take(name, field);
    }
  }

  /** Why the settings cannot be sent, or null. Ranges are the server's to judge, which says them in a sentence. */
  wrong() {
    const bad = this.inputs.find(({ field }) => field.validity.badInput);
    if (bad) return `${bad.field.labels[0].textContent} must be a number.`;
    const extra = this.values.extra && parsed(this.values.extra);
    return extra === null ? "The further fields must be one JSON object." : null;
  }

  /** What a request says, by the API's names. */
  sampling() {
    const numbers = this.inputs.filter(({ name }) => this.values[name] !== undefined).map(({ name }) => [name, Number(this.values[name])]);
    const stop = (this.values.stop ?? "").split("\n").filter(Boolean);
    return { ...Object.fromEntries(numbers), ...(stop.length ? { stop } : {}), ...(parsed(this.values.extra ?? "{}") ?? {}) };
  }

  /** defaults: the server's, by the same names. chats: whether a system prompt reaches the model. */
  show({ defaults, chats }) {
    for (const { name, field } of this.inputs) {
      const value = defaults[name] ?? OFF[name];
      field.placeholder = value ?? (name === "max_tokens" ? (chats ? "as many as fit" : TEXT_TOKENS) : name === "seed" ? "drawn anew" : "");
    }
    this.system.root.hidden = !chats;
  }
}

function area(name, label, what, rows) {
  const field = el("textarea", { id: `set-${name}`, rows, "aria-describedby": `what-${name}`, spellcheck: name === "system" ? "true" : "false" });
  return { field, root: el("div", { class: "setting" }, el("label", { for: field.id }, label), field, el("p", { id: `what-${name}`, class: "note" }, what)) };
}

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}

function stored() {
  try {
    const values = parsed(localStorage.getItem(NAME) ?? "{}") ?? {};
    return Object.fromEntries(Object.entries(values).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}
