// The server's figures from /metrics, asked for every two seconds while somebody looks, as small lines over the last two minutes.

import { request } from "./api.js";
import { byId, el, svg } from "./dom.js";

const EVERY = 2000;
const POINTS = 60;
const [WIDTH, HEIGHT] = [88, 22];

// name, value of a scrape and the one before ({name: number, at: ms}), how it is written, the top of its scale (null: its own highest)
const FIGURES = [
  ["Running", (now) => now.num_requests_running, String, null],
  ["Waiting", (now) => now.num_requests_waiting, String, null],
  ["KV cache", (now) => now.kv_cache_usage_perc, percent, 1],
  ["Prefix hits", (now, before) => share(now, before, "prefix_cache_hits_total", "prefix_cache_queries_total"), percent, 1],
  ["Tokens/s", (now, before) => before && rate(now, before, "generation_tokens_total"), (value) => value.toFixed(value > 0 && value < 10 ? 1 : 0), null],
];

const rate = (now, before, name) => (Math.max(now[name] - before[name], 0) / (now.at - before.at)) * 1000;

/** Of the time between two scrapes; before the second, of all time. Null where nothing was asked. */
function share(now, before, part, whole) {
  const of = (name) => now[name] - (before?.[name] ?? 0);
  return of(whole) > 0 ? of(part) / of(whole) : null;
}

function percent(value) {
  return `${(value * 100).toFixed(value > 0 && value < 0.1 ? 1 : 0)}%`;
}

/** The last value of every metric of ours, labels aside: there is one engine. */
export function read(text) {
  const found = { at: performance.now() };
  for (const [, name, value] of text.matchAll(/^jaxllm:(\w+)(?:\{[^\n]*\})? (\S+)/gm)) found[name] = Number(value);
  return found;
}

/** Whether the figures are shown: as it was left. */
function preference(value) {
  try {
    if (value) localStorage.setItem("jaxllm.live", value);
    return localStorage.getItem("jaxllm.live");
  } catch {
    return null;
  }
}

export class Live {
  constructor() {
    this.last = null;
    this.wanted = false; // somebody waits for an answer, and wants to know of the queue
    this.asking = false;
    this.rows = FIGURES.map(([name]) => new Row(name));
    byId("figures").append(...this.rows.map((row) => row.root));
    byId("live").open = preference() !== "closed";
    byId("live").addEventListener("toggle", () => {
      preference(byId("live").open ? "open" : "closed");
      this.ask();
    });
    document.addEventListener("visibilitychange", () => this.ask());
    setInterval(() => this.ask(), EVERY);
  }

  get queue() {
    return this.last && { running: this.last.num_requests_running, waiting: this.last.num_requests_waiting };
  }

  async ask() {
    const seen = byId("live").open && byId("live").checkVisibility({ checkVisibilityCSS: true });
    if (this.asking || document.hidden || !(seen || this.wanted)) return;
    this.asking = true;
    try {
      const now = read(await (await request("metrics")).text());
      this.show(now);
      byId("live-note").textContent = "";
    } catch (error) {
      this.last = null;
      byId("live-note").textContent = error.message;
    } finally {
      this.asking = false;
    }
  }

  show(now) {
    const before = this.last && now.at - this.last.at < 5 * EVERY ? this.last : null; // after a pause a rate would be of the pause
    FIGURES.forEach(([, value, written, top], i) => this.rows[i].add(value(now, before), written, top));
    this.last = now;
  }
}

class Row {
  constructor(name) {
    this.values = [];
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.value = el("dd", {}, "–");
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);
    this.root = el("div", {}, el("dt", {}, name), picture, this.value);
  }

  add(value, written, top) {
    this.values.push(value ?? this.values.at(-1) ?? null);
    this.values = this.values.slice(-POINTS);
    const known = this.values.filter((each) => each !== null);
    this.value.textContent = known.length ? written(known.at(-1)) : "–";
    const scale = top ?? Math.max(...known, 1);
    const x = (i) => (WIDTH * (POINTS - known.length + i)) / (POINTS - 1);
    const y = (each) => HEIGHT - 1 - (HEIGHT - 2) * Math.min(each / scale, 1);
    const points = known.map((each, i) => `${x(i).toFixed(1)} ${y(each).toFixed(1)}`);
    this.line.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    this.area.setAttribute("d", points.length > 1 ? `M${points.join("L")}L${WIDTH} ${HEIGHT}L${x(0).toFixed(1)} ${HEIGHT}Z` : "");
  }
}
