"use strict";
// Elements and words. Whatever comes from outside (tokens, names, titles) reaches the page as text nodes only.

/** An element. `settings`: attributes; `class`; `style` as an object; functions are listeners. */
function element(name, settings = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(settings)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") made.addEventListener(key, value);
    else if (key === "style") for (const [property, set] of Object.entries(value)) made.style.setProperty(property, set);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb]|[\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]|\p{Cs}/gu;
const SHOWN = { "\n": "⏎", "\t": "⇥", "\r": "␍" };

/** Text with what has no shape of its own, or changes the direction of the text around it, written out. */
function visible(text) {
  return text.replace(HIDDEN, (character) => {
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return SHOWN[character] ?? `⟨U+${code}⟩`;
  });
}

/** A token by its number: its spaces are marked when it stands alone. */
function tokenChip(text, number) {
  const word = number ? text.words[number - 1] : "";
  return element("bdi", { class: "token" }, visible(word).replace(/^ | $/g, "␣") || "␣");
}

function shortNumber(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  return size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
}

function percent(value) {
  const of = 100 * value;
  return `${of !== 0 && of < 0.01 ? of.toExponential(1) : Number(of.toPrecision(3))} %`;
}

function address(sae, latent) {
  return `#${encodeURIComponent(sae.name)}${latent === undefined ? "" : `/${latent}`}`;
}

function link(sae, latent, ...children) {
  return element("a", { href: address(sae, latent) }, children.length ? children : visible(sae.name));
}

/** A table. Headers are texts; rows hold lists of cells: texts, numbers or elements. */
function table(headers, rows, caption) {
  const cell = (content) =>
    element("td", { class: typeof content === "number" ? "number" : null },
      typeof content === "number" ? shortNumber(content) : content);
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element("table", {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, headers.map((header) => element("th", { scope: "col" }, header)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell))))));
}
