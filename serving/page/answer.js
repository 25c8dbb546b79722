// One answer, from request to last token. The message it fills is
// {role, content, reasoning, calls: [{name, arguments}], state, error, finish, stats}, state being waiting, writing, done, stopped or failed,
// stats {first, writing: milliseconds to the first token and from there to the last, tokens, prompt, cached: counted by the server}.

import { Failure, events, request } from "./api.js";

export const TEXT_TOKENS = 256; // a text is continued by so many unless the settings say: the API's own default of 16 is half a sentence

export const empty = () => ({ role: "assistant", content: "", reasoning: "", calls: [], state: "waiting", error: "", finish: "", stats: {} });

/** The body that asks for the next message, or for more of the last one if that is an answer. `chats`: whether the model has a chat
 * template; without one, everything said is one text. */
export function bodyFor(conversation, messages, { model, chats, sampling }) {
  const said = messages.filter(({ role, content }) => role === "user" || content);
  const body = { model, ...sampling, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (!chats) return ["v1/completions", { max_tokens: TEXT_TOKENS, ...body, prompt: said.map(({ content }) => content).join("") }];
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const more = said.at(-1)?.role === "assistant" ? { continue_final_message: true, add_generation_prompt: false } : {};
  return ["v1/chat/completions", { ...body, ...more, messages: [...system, ...said.map(({ role, content }) => ({ role, content }))] }];
}

export class Run {
  /** changed: called after every piece. */
  constructor(message, changed) {
    this.message = message;
    this.changed = changed;
    this.sent = performance.now(); // or would have been
    this.firstAt = null;
    this.retryAfter = 0;
    this.status = null;
    this.abort = new AbortController();
  }

  /** Ends it: the closed connection is what tells the server. */
  stop() {
    this.abort.abort();
  }

  get waited() {
    return performance.now() - this.sent;
  }

  async run(path, body) {
    const { message } = this;
    this.sent = performance.now();
    try {
      const response = await request(path, { body, signal: this.abort.signal });
      for await (const event of events(response)) {
        this.take(event);
        this.changed();
      }
      message.state = "done";
    } catch (error) {
      this.fail(error);
    }
    this.changed();
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.message.state = "stopped";
      return;
    }
    const known = error instanceof Failure;
    if (!known) console.error(error);
    this.message.state = "failed";
    this.message.error = known ? error.message : "The server's answer could not be understood; the browser's console says why.";
    this.retryAfter = error.retryAfter ?? 0;
    this.status = error.status ?? 0;
  }

  take({ choices = [], usage }) {
    const { message } = this;
    const now = performance.now();
    for (const choice of choices) {
      const delta = choice.delta ?? { content: choice.text };
      message.content += delta.content ?? "";
      message.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
      for (const call of delta.tool_calls ?? []) this.takeCall(call);
      message.finish = choice.finish_reason ?? message.finish;
      this.firstAt ??= now;
      message.state = "writing";
    }
    if (choices.length) message.stats = { ...message.stats, first: this.firstAt - this.sent, writing: now - this.firstAt };
    if (usage) {
      const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = usage;
      message.stats = { ...message.stats, tokens, prompt, cached: details?.cached_tokens ?? 0 };
    }
  }

  /** A tool call comes in pieces, each with its index; its name once, its arguments as text to be joined. */
  takeCall({ index = 0, function: piece = {} }) {
    const call = (this.message.calls[index] ??= { name: "", arguments: "" });
    call.name += piece.name ?? "";
    call.arguments += piece.arguments ?? "";
  }
}

/** [reasoning, text] of a message: models whose reasoning the server does not split off write it between marks. */
export function parts({ reasoning, content }) {
  const match = reasoning ? null : /^\s*<think>([\s\S]*?)(?:<\/think>([\s\S]*))?$/.exec(content);
  return match ? [match[1].trim(), (match[2] ?? "").trimStart()] : [reasoning, content];
}

/** What is known of the answer's speed, in words. */
export function figures({ stats, finish, state }) {
  const { first, writing, tokens, prompt, cached } = stats;
  const said = [];
  if (first !== undefined) said.push(`first token after ${duration(first)}`);
  if (tokens > 1 && writing > 0) said.push(`${speed(((tokens - 1) / writing) * 1000)} tokens/s`);
  if (tokens) said.push(`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`);
  if (prompt) said.push(`prompt ${prompt.toLocaleString("en")}${cached ? `, ${cached.toLocaleString("en")} from cache` : ""}`);
  if (state === "stopped") said.push("stopped");
  if (finish === "length") said.push("ended at the token limit");
  return said.join(" · ");
}

export const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const speed = (value) => (value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
