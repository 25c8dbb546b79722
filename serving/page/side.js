// The side of the page: the list of conversations, its export and import, the theme, and how it opens where there is little room.

import { askName, toast } from "./dialogs.js";
import { byId, el, quiet } from "./dom.js";
import * as store from "./store.js";

const narrow = matchMedia("(max-width: 800px)");

export class Side {
  /** chat: what is shown beside it, see app.js. */
  constructor(chat) {
    this.chat = chat;
    byId("new").addEventListener("click", () => chat.begin());
    byId("open-side").addEventListener("click", () => this.toggle(true));
    byId("close-side").addEventListener("click", () => this.toggle(false));
    byId("shade").addEventListener("click", () => this.toggle(false));
    byId("export").addEventListener("click", download);
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", () => this.import());
    narrow.addEventListener("change", () => this.toggle(false));
    themeSwitch();
  }

  get open() {
    return narrow.matches && !byId("shade").hidden;
  }

  /** Only where there is little room: elsewhere the side is always there. */
  toggle(open) {
    const shown = open && narrow.matches;
    if (shown === this.open) return;
    byId("shade").hidden = !shown;
    byId("side").classList.toggle("open", shown);
    byId("main").inert = shown;
    byId("open-side").setAttribute("aria-expanded", String(shown));
    byId(shown ? "close-side" : "open-side").focus();
  }

  show(current) {
    const focused = document.activeElement?.getAttribute("href");
    byId("list").replaceChildren(...store.list().map((conversation) => this.row(conversation, conversation.id === current.id)));
    if (focused) byId("list").querySelector(`[href="${focused}"]`)?.focus();
  }

  row(conversation, current) {
    const link = el("a", { href: `#${conversation.id}`, "aria-current": current ? "page" : null, on: { click: () => this.toggle(false) } }, titleOf(conversation));
    if (!current) return el("li", {}, link);
    const rename = quiet("Rename", () => this.rename(conversation));
    const remove = quiet("Delete", () => this.remove(conversation), { "aria-label": `Delete the conversation ${titleOf(conversation)}` });
    return el("li", {}, link, el("div", { class: "actions" }, rename, remove));
  }

  async rename(conversation) {
    const name = await askName(titleOf(conversation));
    if (!name) return;
    conversation.title = name;
    this.chat.keep(conversation);
  }

  remove(conversation) {
    this.chat.stop(conversation.id);
    store.remove(conversation.id);
    this.chat.begin();
    toast(`Deleted “${titleOf(conversation)}”.`, () => {
      store.save(conversation);
      location.hash = conversation.id;
    });
  }

  async import() {
    const [file] = byId("import-file").files;
    byId("import-file").value = "";
    if (!file) return;
    toast(store.imported(await file.text()));
    this.show(this.chat.conversation);
  }
}

export const titleOf = ({ title, messages }) => title || messages[0]?.content.trim().replace(/\s+/g, " ").slice(0, 60) || "New chat";

function download() {
  const address = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  el("a", { href: address, download: `jaxllm-conversations-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function themeSwitch() {
  const select = byId("theme");
  const root = document.documentElement;
  select.value = root.dataset.theme ?? "";
  select.addEventListener("change", () => {
    if (select.value) root.dataset.theme = select.value;
    else delete root.dataset.theme;
    try {
      localStorage.setItem("jaxllm.theme", select.value);
    } catch { /* until the page is closed */ }
  });
}
