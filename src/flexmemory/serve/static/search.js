// Search over token texts, token ids and key names; `/` focuses, arrows choose, Enter opens.
import * as data from "./data.js";
import { h, text } from "./dom.js";

const MOST = 12;

function found(query) {
  const key = /^L(\d+)K(\d+)$/i.exec(query.trim());
  const isKey = key && data.meta.layers.includes(Number(key[1])) && Number(key[2]) < data.meta.num_keys;
  const keys = isKey
    ? [{ href: `#/L${Number(key[1])}K${Number(key[2])}`, label: [`L${Number(key[1])}K${Number(key[2])}`], hint: "key" }]
    : [];
  const tokens = query ? data.find(/^T\d+$/i.test(query.trim()) ? query.trim() : query, MOST) : [];
  return [...keys, ...tokens.map((id) => ({ href: `#/T${id}`, label: text(id), hint: `T${id} · ${data.kind(id)}` }))];
}

export function search(input, list) {
  let entries = [],
    at = 0;
  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
  };
  const mark = () =>
    [...list.children].forEach((item, i) => {
      item.setAttribute("aria-selected", i === at);
      if (i === at) {
        item.scrollIntoView({ block: "nearest" });
        input.setAttribute("aria-activedescendant", item.id);
      }
    });
  const open = (entry) => {
    close();
    input.blur();
    location.hash = entry.href;
  };
  const update = () => {
    entries = found(input.value);
    at = 0;
    const nothing = input.value && !entries.length;
    list.replaceChildren(
      ...entries.map((entry, i) =>
        h(
          "li",
          {
            id: `found-${i}`,
            role: "option",
            onmousedown: (event) => {
              event.preventDefault();
              open(entry);
            },
          },
          h("span", { class: "tok" }, entry.label),
          h("small", {}, entry.hint),
        ),
      ),
      ...(nothing ? [h("li", { class: "none" }, "no token or key is called that")] : []),
    );
    list.hidden = !input.value;
    input.setAttribute("aria-expanded", String(!list.hidden));
    if (entries.length) mark();
  };
  input.addEventListener("input", update);
  input.addEventListener("focus", () => {
    input.select();
    if (input.value) update();
  });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      close();
      input.blur();
    } else if (event.key === "Enter" && entries[at]) open(entries[at]);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (entries.length) {
        at = (at + (event.key === "ArrowDown" ? 1 : entries.length - 1)) % entries.length;
        mark();
      }
    }
  });
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      input.focus();
    }
  });
}
