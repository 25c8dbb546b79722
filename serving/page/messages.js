// What a message looks like, and how a growing one is kept up to date: at most once a frame, and only where it changed.

import { duration, figures, parts } from "./answer.js";
import { byId, copyButton, el, quiet } from "./dom.js";
import { Markdown } from "./markdown.js";

const NEAR = 80; // pixels from the end within which the view follows it

/** The view of one user message. actions: {edit(text), remove()}. */
export function userView(message, actions) {
  const bubble = el("div", { class: "bubble" }, message.content);
  const bar = el("div", { class: "actions" });
  const item = el("li", { class: "message user" }, el("h2", { class: "hidden" }, "You"), bubble, bar);
  const edit = quiet("Edit", () => editor(item, message, actions.edit));
  bar.append(copyButton(() => message.content), edit, quiet("Delete", actions.remove));
  return item;
}

/** Puts a field in the place of the message until it is sent or left. */
function editor(item, message, send) {
  const before = [...item.children];
  const text = el("textarea", { "aria-label": "Edit your message" });
  text.value = message.content;
  const leave = () => {
    item.replaceChildren(...before);
    [...item.querySelectorAll("button")].find((button) => button.textContent === "Edit").focus();
  };
  const done = () => text.value.trim() && send(text.value);
  text.addEventListener("input", () => grow(text));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (sends(event)) done();
    if (event.key === "Escape" || sends(event)) {
      event.preventDefault();
      event.stopPropagation();
    }
  });
  const save = el("button", { type: "button", class: "solid", on: { click: done } }, "Send again");
  item.replaceChildren(before[0], text, el("div", { class: "actions" }, save, quiet("Cancel", leave)));
  grow(text);
  text.focus();
}

/** Enter sends, where there is a keyboard that has Shift; not while an input method is putting a character together. */
export const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;

export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** The view of an answer. */
export class AnswerView {
  /** actions: {again(), goOn(), remove(), shown(text)}, the last called for what is now to be read. name: what the model is called. */
  constructor(message, name, actions) {
    this.message = message;
    this.text = el("div", { class: "text" });
    this.markdown = new Markdown(this.text);
    this.thought = el("div", { class: "thought" });
    this.summary = el("summary", {}, "Reasoning");
    this.details = el("details", { class: "reasoning", hidden: true }, this.summary, this.thought);
    this.calls = el("div", { class: "calls" });
    this.waiting = el("p", { class: "waiting", hidden: true });
    this.error = el("div", { class: "error", hidden: true });
    this.figures = el("p", { class: "figures" });
    this.goOn = quiet("Continue", actions.goOn, { class: "quiet go-on" });
    const copy = copyButton(() => parts(message)[1]);
    this.bar = el("div", { class: "actions" }, copy, quiet("Regenerate", actions.again), this.goOn, quiet("Delete", actions.remove));
    this.actions = actions;
    this.root = el("li", { class: "message assistant" }, el("h2", { class: "hidden" }, name),
      this.details, this.waiting, this.text, this.calls, this.error, this.figures, this.bar);
    this.frame = 0;
    this.show();
  }

  /** To be called as often as one likes. A hidden page draws no frames, so there it waits until the end. */
  changed() {
    const over = !["waiting", "writing"].includes(this.message.state);
    if (over) this.show();
    else this.frame ||= requestAnimationFrame(() => this.show());
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { message } = this;
    const busy = ["waiting", "writing"].includes(message.state);
    const [thought, text] = parts(message);
    this.root.setAttribute("aria-busy", String(busy));
    this.details.hidden = !thought;
    this.thought.textContent = thought;
    this.summary.textContent = busy && !text ? "Reasoning…" : "Reasoning";
    this.markdown.show(text);
    this.text.classList.toggle("growing", message.state === "writing");
    this.showCalls(message.calls);
    this.figures.textContent = figures(message);
    this.bar.hidden = busy;
    this.goOn.hidden = !text || (message.state === "done" && message.finish !== "length");
    this.waiting.hidden = message.state !== "waiting";
    this.error.hidden = message.state !== "failed";
    if (!this.error.hidden && !this.error.hasChildNodes()) this.showError();
    this.actions.shown(text);
  }

  showCalls(calls) {
    if (!calls.length) return;
    this.calls.replaceChildren(...calls.map(({ name, arguments: text }) =>
      el("figure", { class: "call" }, el("figcaption", {}, "Calls ", el("code", {}, name)), el("pre", { tabindex: "0" }, indented(text)))));
  }

  /** The server's sentence, and a way to try again. */
  showError() {
    const retry = el("button", { type: "button", on: { click: this.actions.again } }, "Try again");
    this.error.append(el("p", {}, this.message.error), retry);
  }

  /** Keeps the way closed for as long as the server asks. */
  wait(seconds) {
    const retry = this.error.querySelector("button");
    if (!retry || !seconds) return;
    let left = Math.min(Math.ceil(seconds), 600);
    const tick = () => {
      retry.disabled = left > 0;
      retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left-- > 0) setTimeout(tick, 1000);
    };
    tick();
  }

  /** While nothing has come: how long it has been, and what the server says of its queue. */
  showWaiting(ms, queue) {
    const others = queue ? `; on the server ${queue.running} run and ${queue.waiting} wait` : "";
    this.waiting.textContent = `Waiting for the first token, ${duration(ms)}${others}`;
  }
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not complete yet, or never was JSON
  }
}

/** Keeps the end of the messages in view while the reader is there, and offers a way back when not. */
export class Follow {
  constructor(scroller, button) {
    this.scroller = scroller;
    this.button = button;
    this.on = true;
    scroller.addEventListener("scroll", () => {
      this.on = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
      button.hidden = this.on;
    });
    new ResizeObserver(() => this.on && this.toEnd()).observe(byId("messages"));
    button.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.on = true;
    this.button.hidden = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

/** Reads an answer out as it grows: whole sentences, each once, for those who listen to the page. */
export class Spoken {
  constructor(region) {
    this.region = region;
    this.at = 0;
  }

  /** at: how much of the text has been there before. */
  start(at = 0) {
    this.region.replaceChildren();
    this.at = at;
  }

  follow(text, ended) {
    const fresh = text.slice(this.at);
    const end = ended ? fresh.length : Math.max(...[...fresh.matchAll(/[.!?:]\s|\n/g)].map((match) => match.index + 1), 0);
    if (end > 0 && fresh.slice(0, end).trim()) this.region.append(el("p", {}, fresh.slice(0, end).trim()));
    this.at += end;
  }
}
