// What asks and what tells: the dialogs for a key and for a name, and the line that says what was done and offers to undo it.

import { saveKey } from "./api.js";
import { byId } from "./dom.js";

const SHOWN_MS = 10_000;

/** Whether the dialog was answered rather than left. */
function answered(dialog) {
  return new Promise((settle) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => settle(dialog.returnValue === "save"), { once: true });
    dialog.querySelector("[data-cancel]").onclick = () => dialog.close("");
    dialog.showModal();
  });
}

let asking = null;

/** Asks for a key, once for all who need one, and keeps it. why: the server's sentence. Resolves to whether there is one. */
export function askKey(why) {
  asking ??= (async () => {
    saveKey(""); // what there was has been refused
    byId("key-why").textContent = why;
    byId("key").value = "";
    const given = await answered(byId("ask-key"));
    if (given) saveKey(byId("key").value.trim(), byId("keep-key").checked);
    byId("key").value = "";
    asking = null;
    return given;
  })();
  return asking;
}

/** The new name, or null. */
export async function askName(name) {
  byId("name").value = name;
  const promise = answered(byId("ask-name"));
  byId("name").select();
  return (await promise) && byId("name").value.trim() ? byId("name").value.trim() : null;
}

let timer = 0;

/** Says something for a while; `undo`, if given, is offered beside it. */
export function toast(text, undo = null) {
  const [line, button] = byId("toast").children;
  line.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    byId("toast").hidden = true;
    undo();
  };
  byId("toast").hidden = false;
  byId("status").textContent = text;
  clearTimeout(timer);
  timer = setTimeout(() => (byId("toast").hidden = true), SHOWN_MS);
}
