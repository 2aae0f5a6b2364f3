// Small pieces that every page is made of. Texts are always set as text, never as markup.
import * as data from "./data.js";

const SVG = "http://www.w3.org/2000/svg";

function made(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [rule, given] of Object.entries(value)) element.style.setProperty(rule, given);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export const h = (tag, props, ...children) => made(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => made(document.createElementNS(SVG, tag), props, children);

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e").replaceAll("-", "−");
  const text = size >= 10 ** digits ? whole(Math.round(value)) : value.toPrecision(digits);
  return text.replace("-", "−");
}

export const whole = (value) => value.toLocaleString("en-GB").replaceAll(",", " ");
export const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);
export const side = (value) => (value > 0 ? "pos" : value < 0 ? "neg" : "nil");
export const percent = (value) =>
  value >= 0.0995
    ? `${(100 * value).toFixed(0)}%`
    : value >= 0.001
      ? `${(100 * value).toFixed(1)}%`
      : `${number(100 * value, 1)}%`;

// Visible spaces are dimmed, so that the letters stand out.
export function text(id) {
  const parts = data.shown(id).split(/(␣+)/).filter(Boolean);
  return parts.map((part) => (part.startsWith("␣") ? h("i", {}, part) : part));
}

export function token(id, props = {}) {
  const flags = data.isKept(id) ? "" : " · left out by the mask";
  const lost = data.isKept(id) ? "" : " lost";
  return h(
    "a",
    { class: `tok${lost}`, href: `#/T${id}`, title: `T${id} · ${data.kind(id)}${flags}`, ...props },
    text(id),
  );
}

export const keyName = (layer, key) => `L${layer}K${key}`;
export const keyLink = (layer, key, props = {}, label = keyName(layer, key)) =>
  h("a", { class: "key", href: `#/${keyName(layer, key)}`, ...props }, label);

export function panel(title, note, ...children) {
  return h("section", { class: "panel" }, h("h2", {}, title, note ? h("small", {}, note) : null), ...children);
}

// A bar from the middle: right and red for plus, left and blue for minus; the sign is written too.
export function signedBar(value, most) {
  const share = most ? Math.min(1, Math.abs(value) / most) : 0;
  const from = value >= 0 ? 50 : 50 - 50 * share;
  return h(
    "span",
    { class: "bar" },
    h("b", { class: side(value), style: { left: `${from}%`, width: `${50 * share}%` } }),
  );
}

export function plainBar(value, most, tone = "") {
  return h(
    "span",
    { class: "bar plain" },
    h("b", { class: tone, style: { left: "0", width: `${most ? Math.min(100, (100 * value) / most) : 0}%` } }),
  );
}

// Rows of [label, value]: one side of a list, bars in proportion to the largest.
export function ranked(rows, { most, label = (id) => token(id), format = signed } = {}) {
  const top = most ?? Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-30);
  return h(
    "ol",
    { class: "ranked" },
    rows.map(([id, value]) =>
      h(
        "li",
        {},
        h("span", { class: "label" }, label(id)),
        plainBar(Math.abs(value), top, side(value)),
        h("span", { class: `num ${side(value)}` }, format(value)),
      ),
    ),
  );
}

export function choice(name, options, value, onchange) {
  const select = h(
    "select",
    { onchange: () => onchange(select.value) },
    options.map(([key, label]) => h("option", { value: key, selected: String(key) === String(value) }, label)),
  );
  return h("label", { class: "field" }, h("span", {}, name), select);
}

// A list a page at a time, so that a cluster of 100 000 tokens is as light as one of ten.
export function paged(items, size, draw) {
  const box = h("div", { class: "paged" });
  const show = (page) => {
    const last = Math.max(0, Math.ceil(items.length / size) - 1);
    const from = page * size;
    const turn = (label, to, text) =>
      h(
        "button",
        { type: "button", disabled: to < 0 || to > last || to === page, "aria-label": label, onclick: () => show(to) },
        text,
      );
    const bar =
      last > 0
        ? h(
            "div",
            { class: "pager" },
            turn("First page", 0, "«"),
            turn("Previous page", page - 1, "‹"),
            h("span", {}, `${whole(from + 1)}–${whole(Math.min(items.length, from + size))} of ${whole(items.length)}`),
            turn("Next page", page + 1, "›"),
            turn("Last page", last, "»"),
          )
        : null;
    box.replaceChildren(draw(items.slice(from, from + size)), ...(bar ? [bar] : []));
  };
  show(0);
  return box;
}

export function problem(error) {
  return h("div", { class: "problem", role: "alert" }, h("strong", {}, "This did not work. "), error.message);
}

export const needsServer = () =>
  h(
    "div",
    { class: "problem" },
    h("strong", {}, "This page needs the model. "),
    "What you see is an export of the index. Run ",
    h("code", {}, "flexmemory explore CHECKPOINT"),
    " to type prompts and edit.",
  );
