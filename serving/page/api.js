// The server, as the page sees it: requests with the key, errors as the server's sentence, and server-sent events.

const KEY = "jaxllm.key";

/** What went wrong, in a sentence. status 0: no answer came. retryAfter: seconds the server asks to wait. lost: it broke off midway. */
export class Failure extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let key = storedKey();

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is forbidden
  }
}

/** keep: in this browser, and not only in this tab. An empty key forgets both. */
export function saveKey(given, keep = false) {
  key = given;
  try {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (key) (keep ? localStorage : sessionStorage).setItem(KEY, key);
  } catch { /* it lasts as long as the page */ }
}

/** The response to a GET, or to a POST of `body`. Paths are relative, so that the page works under a proxy's prefix. Throws Failure. */
export async function request(path, { body, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. It may have stopped, or the network is down.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const getJson = async (path) => (await request(path)).json();

async function failure(response) {
  let message = `The server answered ${response.status}, without saying why.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* a proxy's page, which is no sentence */ }
  return new Failure(message, { status: response.status, retryAfter: Number(response.headers.get("retry-after")) || 0 });
}

/** The objects of a stream of server-sent events, up to [DONE]. Throws Failure for an error event, or if it breaks off. */
export async function* events(response) {
  const broken = () => new Failure("The connection to the server was lost in the middle of the answer. What had come is kept.");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : broken();
      });
      if (done) throw broken();
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // event names and comments: the data says all
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failure(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
