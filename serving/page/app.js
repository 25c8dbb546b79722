// The page: which conversation is shown, what is asked of the server for it, and what the reader does with it.

import { Run, bodyFor, empty, parts } from "./answer.js";
import { getJson } from "./api.js";
import { askKey, toast } from "./dialogs.js";
import { byId, el, quiet } from "./dom.js";
import { Live } from "./live.js";
import { AnswerView, Follow, Spoken, grow, sends, userView } from "./messages.js";
import { Settings } from "./settings.js";
import { Side, titleOf } from "./side.js";
import * as store from "./store.js";

const SAVE_MS = 1000; // an answer that is being written is kept so often
const QUEUE_MS = 500; // after so long without a token one would like to know who else is served
const ASK = ["Tell me a story about a dog and a kite.", "What can you do?", "What is 12 plus 7?"];
const BEGIN = ["Once upon a time there was a dog who found a kite.", "The rain had not stopped for three days, and", "Dear Anna,\n"];

class Chat {
  constructor() {
    store.open();
    this.facts = { model: "", chats: true, defaults: {}, max_model_len: 0 };
    this.runs = new Map(); // conversation id to the Run that is writing in it
    this.views = new WeakMap(); // message to its AnswerView
    this.settings = new Settings(byId("settings-fields"), (system) => this.changeSystem(system));
    this.live = new Live();
    this.spoken = new Spoken(byId("spoken"));
    this.follow = new Follow(byId("scroll"), byId("to-end"));
    this.side = new Side(this);
    this.listen();
    this.route();
    this.ready = this.connect(); // what is asked before waits for it
    setInterval(() => this.tick(), 100);
  }

  listen() {
    const text = byId("text");
    text.addEventListener("input", () => grow(text));
    text.addEventListener("keydown", (event) => sends(event) && (event.preventDefault(), this.send()));
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    byId("stop").addEventListener("click", () => this.stop(this.conversation.id));
    byId("open-settings").addEventListener("click", () => byId("settings").showModal());
    byId("reset").addEventListener("click", () => this.settings.reset());
    addEventListener("hashchange", () => this.route());
    addEventListener("pagehide", () => [...this.runs.keys()].forEach((id) => store.save(store.get(id))));
    addEventListener("storage", (event) => this.changedElsewhere(event.key));
    addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
      if (this.side.open) this.side.toggle(false);
      else this.stop(this.conversation.id);
    });
  }

  /** Learns what the server serves; asks for the key if it must. */
  async connect() {
    try {
      const [facts, models] = [await getJson("page/facts"), (await getJson("v1/models")).data];
      this.facts = { ...facts, chats: facts.chat_refused === null };
      this.showModels(models.map(({ id }) => id));
      this.settings.show(this.facts);
      this.banner(this.facts.chats ? "" : `This model does not chat (${facts.chat_refused}). So the page lets it continue what you write.`);
      this.showWelcome();
      this.showRoom();
      this.live.ask();
    } catch (error) {
      if (error.status === 401 && (await askKey(error.message))) await this.connect();
      else this.banner(error.message, quiet("Try again", () => (this.ready = this.connect())));
    }
  }

  banner(text, ...more) {
    byId("banner").hidden = !text;
    byId("banner").replaceChildren(text, " ", ...more);
  }

  showModels(names) {
    const select = byId("model");
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    select.hidden = names.length < 2;
    byId("model-name").textContent = names.length < 2 ? names.join() : "";
  }

  get model() {
    return byId("model").value || this.facts.model;
  }

  // Which conversation

  route() {
    const id = location.hash.slice(1);
    this.show(store.get(id) ?? store.create(this.conversation?.system ?? ""));
  }

  begin() {
    history.pushState(null, "", location.pathname + location.search);
    this.side.toggle(false);
    this.route();
    this.focus();
  }

  /** Into the message field, but not where that would bring up a keyboard over half of what one wants to read. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) byId("text").focus();
  }

  show(conversation) {
    this.conversation = conversation;
    this.settings.system.field.value = conversation.system;
    byId("messages").replaceChildren();
    conversation.messages.forEach((message) => this.append(message));
    this.showAround();
    this.showBusy();
    this.spoken.start();
    this.follow.toEnd();
  }

  /** Title, list and what else speaks of the conversation as a whole. */
  showAround() {
    const { conversation } = this;
    byId("title").textContent = titleOf(conversation);
    document.title = conversation.messages.length ? `${titleOf(conversation)} – jaxllm` : "jaxllm";
    this.side.show(conversation);
    this.showWelcome();
    this.showRoom();
  }

  showWelcome() {
    const { chats } = this.facts;
    byId("welcome").hidden = this.conversation.messages.length > 0;
    byId("welcome-title").textContent = chats ? "What shall we talk about?" : "How does it begin?";
    byId("welcome-note").textContent = chats ? "" : "Write the beginning of a text, and the model goes on with it.";
    const suggestion = (text) => el("li", {}, el("button", { type: "button", on: { click: () => this.send(text) } }, text.trim()));
    byId("suggestions").replaceChildren(...(chats ? ASK : BEGIN).map(suggestion));
  }

  /** How much of the context the conversation takes, as of its last answer. */
  showRoom() {
    const last = this.conversation.messages.findLast(({ stats }) => stats?.prompt);
    const most = this.facts.max_model_len;
    const used = last && last.stats.prompt + (last.stats.tokens ?? 0);
    byId("room").textContent = last && most ? `${used.toLocaleString("en")} of ${most.toLocaleString("en")} tokens used.` : "";
  }

  append(message) {
    const remove = () => this.replace(this.without(message), "Message deleted.");
    if (message.role === "user") {
      byId("messages").append(userView(message, { edit: (text) => this.edit(message, text), remove }));
      return;
    }
    const { conversation } = this;
    const shown = (text) => this.runs.get(conversation.id)?.message === message && this.spoken.follow(text, false);
    const actions = { again: () => this.again(message), goOn: () => this.goOn(message), remove, shown };
    const view = new AnswerView(message, this.model || "The model", actions);
    this.views.set(message, view);
    byId("messages").append(view.root);
  }

  /** Keeps a conversation that changed. */
  keep(conversation) {
    const problem = store.save(conversation);
    if (problem) this.banner(problem);
    this.showAround();
  }

  changeSystem(system) {
    this.conversation.system = system;
    if (this.conversation.messages.length) store.save(this.conversation);
  }

  /** Another tab wrote or deleted a conversation. What is being answered here stays as it is here. */
  changedElsewhere(name) {
    const id = store.idOf(name);
    if (id === null || this.runs.has(id)) return;
    store.reread(name);
    if (id === this.conversation.id && store.get(id)) this.show(store.get(id));
    else this.side.show(this.conversation);
  }

  // What the reader does

  send(text = byId("text").value) {
    if (!text.trim() || this.runs.has(this.conversation.id)) return;
    const { value } = byId("text");
    byId("text").value = "";
    grow(byId("text"));
    this.focus();
    if (!this.ask([...this.conversation.messages, { role: "user", content: text }])) byId("text").value = value;
  }

  edit(message, text) {
    const { messages } = this.conversation;
    const before = messages.slice(0, messages.indexOf(message));
    this.replace([...before, { role: "user", content: text }], "The messages from there on were replaced.", true);
  }

  again(message) {
    const { messages } = this.conversation;
    this.replace(messages.slice(0, messages.indexOf(message)), message.content ? "The answer was replaced." : "", true);
  }

  without(message) {
    return this.conversation.messages.filter((each) => each !== message);
  }

  /** Has the last answer written on, where it was cut off. */
  goOn(message) {
    this.ask(this.without(message), message);
  }

  /** Puts other messages in the place of what was said, and offers the old ones back. ask: have the last one answered. */
  replace(messages, said, ask = false) {
    const { conversation } = this;
    const before = conversation.messages;
    this.stop(conversation.id);
    if (!ask) this.setMessages(conversation, messages);
    else if (!this.ask(messages)) return;
    if (said) toast(said, () => this.setMessages(conversation, before));
    this.focus();
  }

  setMessages(conversation, messages) {
    this.stop(conversation.id);
    conversation.messages = messages;
    store.save(conversation);
    if (conversation === this.conversation) this.show(conversation);
  }

  stop(id) {
    this.runs.get(id)?.stop();
  }

  // Asking

  /** Has the messages answered, in this conversation. Returns false, with nothing changed, if the settings cannot be sent.
   * message: what the answer goes into; it may have a beginning. */
  ask(messages, message = empty()) {
    const wrong = this.settings.wrong();
    if (wrong) {
      byId("settings").showModal();
      this.settings.problem.textContent = wrong;
      return false;
    }
    const { conversation } = this;
    Object.assign(message, { state: "waiting", error: "", finish: "" });
    conversation.changed = Date.now();
    conversation.messages = [...messages, message];
    history.replaceState(null, "", `#${conversation.id}`);
    this.keep(conversation);
    this.show(conversation);
    this.run(conversation, message, this.settings.sampling());
    return true;
  }

  async run(conversation, message, sampling) {
    const { messages } = conversation;
    let saved = performance.now();
    const run = new Run(message, () => {
      this.views.get(message)?.changed();
      if (performance.now() - saved < SAVE_MS) return;
      saved = performance.now();
      store.save(conversation);
    });
    this.runs.set(conversation.id, run);
    this.spoken.start(parts(message)[1].length);
    this.showBusy();
    await this.ready;
    await run.run(...bodyFor(conversation, messages, { model: this.model, chats: this.facts.chats, sampling }));
    if (this.runs.get(conversation.id) === run) this.runs.delete(conversation.id);
    this.ended(conversation, message, run);
  }

  async ended(conversation, message, run) {
    const view = this.views.get(message);
    if (conversation === this.conversation) this.showBusy();
    if (!conversation.messages.includes(message) || store.get(conversation.id) !== conversation) return; // replaced or deleted meanwhile
    store.save(conversation);
    if (conversation === this.conversation) {
      this.spoken.follow(parts(message)[1], true);
      this.say({ done: "The answer is complete.", stopped: "Stopped.", failed: message.error }[message.state]);
      this.showRoom();
    }
    if (run.status === 401 && (await askKey(message.error))) {
      this.ready = this.connect();
      if (conversation === this.conversation) this.again(message);
    } else view?.wait(run.retryAfter);
  }

  tick() {
    const run = this.runs.get(this.conversation.id);
    this.live.wanted = run?.message.state === "waiting" && run.waited > QUEUE_MS;
    if (run?.message.state !== "waiting") return;
    if (run.waited > QUEUE_MS && !run.asked) this.live.ask((run.asked = true));
    this.views.get(run.message)?.showWaiting(run.waited, this.live.queue);
  }

  showBusy() {
    const busy = this.runs.has(this.conversation.id);
    const focused = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (busy) this.say("Waiting for the answer.");
    if (focused) byId(busy ? "stop" : "send").focus();
  }

  say(text) {
    byId("status").textContent = text;
  }
}

new Chat();
