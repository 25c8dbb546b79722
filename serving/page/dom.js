// Elements from data. Text only ever becomes a text node; the page's policy forbids markup from strings altogether.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `on` holds listeners, `class` a class list, true and false switch attributes; children are nodes or strings. */
export function el(tag, { on = {}, ...attributes } = {}, ...children) {
  return furnish(document.createElement(tag), on, attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), {}, attributes, children);
}

function furnish(element, on, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) element.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function quiet(label, click, attributes = {}) {
  return el("button", { type: "button", class: "quiet", on: { click }, ...attributes }, label);
}

/** Copies text, and says so on the button for a moment. */
export function copyButton(text, label = "Copy") {
  const button = quiet(label, async () => {
    button.textContent = (await copied(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have no clipboard for pages that came over plain http from another machine; this old way they still allow.
    const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
