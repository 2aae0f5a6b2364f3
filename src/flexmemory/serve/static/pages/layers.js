// Layers: how long rows are, which keys stick out, curves that were measured; and the keys of one layer as a table.
import * as data from "../data.js";
import { legend, lines } from "../charts.js";
import { choice, h, keyLink, number, paged, panel, token } from "../dom.js";
import { go } from "../nav.js";

// In charts of their own.
const SHOWN = new Set(["layer", "row_norm_mean", "row_norm_median", "row_norm_max", "kurtosis_median", "active_mean"]);
const NAMES = { largest: "Largest |c|", silent_keys: "Keys that are active on no token" };

export async function draw(box, _, params) {
  const found = await data.layers();
  const names = data.meta.layers;
  if (params.layer !== undefined) return keysOf(box, Number(params.layer), params.by ?? "kurtosis", params.up === "1");
  const at = (q) => found.layers.map((one) => one.norms[found.quantiles.indexOf(q)]);
  const of = (field, i) => found.layers.map((one) => one[field][i]);
  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, `${names.length} layers`),
      h(
        "p",
        {},
        `${data.meta.num_keys} keys a layer. ${data.meta.scope ? `Statements about tokens hold for ${data.meta.scope}.` : ""}`,
      ),
    ),
    h(
      "div",
      { class: "cards" },
      panel(
        "Length of rows",
        "over all tokens",
        lines(
          names,
          [
            { name: "median", values: at(50) },
            { name: "longest", values: at(100), tone: "pos" },
          ],
          { band: { low: at(5), high: at(95) }, floor: 0 },
        ),
        legend([
          ["", "median"],
          ["band", "5–95 %"],
          ["pos", "longest"],
        ]),
      ),
      panel(
        "Kurtosis of keys",
        "logarithmic; 3 if normal",
        lines(
          names,
          [
            { name: "median", values: of("kurtosis", 0) },
            { name: "95 %", values: of("kurtosis", 1), tone: "neg" },
            { name: "largest", values: of("kurtosis", 2), tone: "pos" },
          ],
          { log: true },
        ),
        legend([
          ["", "median key"],
          ["neg", "95 %"],
          ["pos", "largest"],
        ]),
      ),
      panel(
        "Active tokens of a key",
        "|c| above 1 % of the layer's largest",
        lines(names, [{ name: "median", values: of("active", 1) }], {
          band: { low: of("active", 0), high: of("active", 2) },
          floor: 0,
        }),
        legend([
          ["", "median key"],
          ["band", "5–95 %"],
        ]),
      ),
      curves(found.facts, names),
    ),
    panel(
      "What sticks out",
      "keys of the largest |c|, tokens of the longest rows",
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "overview" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ["", "keys, largest |c|", "tokens, longest row", ""].map((name) => h("th", {}, name)),
            ),
          ),
          h(
            "tbody",
            {},
            found.layers.map((one) =>
              h(
                "tr",
                {},
                h("th", {}, `L${one.layer}`),
                h(
                  "td",
                  {},
                  one.extreme
                    .slice(0, 6)
                    .map(([key, c]) =>
                      h("span", { class: "pairs" }, keyLink(one.layer, key), h("small", {}, number(c, 2))),
                    ),
                ),
                h(
                  "td",
                  {},
                  one.longest
                    .slice(0, 6)
                    .map(([id, length]) => h("span", { class: "pairs" }, token(id), h("small", {}, number(length, 2)))),
                ),
                h("td", { class: "whole" }, h("a", { href: `#/layers?layer=${one.layer}` }, "all keys")),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function curves(rows, names) {
  const list = rows.filter((one) => names.includes(one.layer));
  const fields = [...new Set(list.flatMap(Object.keys))].filter(
    (field) => !SHOWN.has(field) && list.some((one) => typeof one[field] === "number"),
  );
  return fields.map((field) =>
    panel(
      NAMES[field] ?? field.replaceAll("_", " "),
      "",
      lines(
        list.map((one) => one.layer),
        [{ name: field, values: list.map((one) => (typeof one[field] === "number" ? one[field] : null)) }],
      ),
    ),
  );
}

async function keysOf(box, layer, by, up) {
  const { statistics: names, num_keys: count } = data.meta;
  if (!data.meta.layers.includes(layer)) throw new data.Failure(`layer ${layer} is not in the index`);
  const column = names.indexOf(by);
  if (column < 0) throw new data.Failure(`keys have no ${by}; they have ${names.join(", ")}`);
  const values = await data.statistics(layer);
  const order = [...Array(count).keys()].sort(
    (a, b) => (up ? 1 : -1) * (values[a * names.length + column] - values[b * names.length + column]),
  );
  box.dataset.title = `Keys of layer ${layer}`;
  const sort = (name) => go("layers", { layer, by: name, up: name === by && !up ? 1 : null });
  const draw = (keys) =>
    h(
      "table",
      { class: "numbers" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", {}, "key"),
          names.map((name) =>
            h(
              "th",
              { class: "num" },
              h(
                "button",
                { type: "button", onclick: () => sort(name), "aria-pressed": name === by },
                name,
                name === by ? (up ? " ↑" : " ↓") : "",
              ),
            ),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        keys.map((key) =>
          h(
            "tr",
            {},
            h("th", {}, keyLink(layer, key)),
            names.map((name, i) =>
              h(
                "td",
                { class: "num" },
                name === "active"
                  ? `${number(100 * values[key * names.length + i])}%`
                  : number(values[key * names.length + i]),
              ),
            ),
          ),
        ),
      ),
    );
  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, `Keys of layer ${layer}`),
      h("p", {}, "Statistics of c over the vocabulary. A heading orders by it; again, the other way."),
      h(
        "span",
        { class: "turn" },
        choice(
          "layer",
          data.meta.layers.map((one) => [one, one]),
          layer,
          (to) => go("layers", { layer: to, by, up: up ? 1 : null }),
        ),
        h("a", { class: "button", href: "#/layers" }, "all layers"),
      ),
    ),
    h("section", { class: "panel" }, paged(order, 50, draw)),
  );
}
