// One key and its value: which tokens it fires on, how often, and what it then says of the next token.
import * as data from "../data.js";
import { histogram } from "../charts.js";
import { h, keyLink, keyName, number, panel, problem, ranked, signed, whole } from "../dom.js";
import { address } from "../nav.js";

const NAMES = {
  mean: "mean of c",
  std: "deviation of c",
  min: "smallest c",
  max: "largest c",
  kurtosis: "kurtosis",
  active: "active tokens",
  entropy: "entropy of |c|",
  value_norm: "length of the value ‖v‖",
};
const FEW = 16;

export async function draw(box, [layer, key], params) {
  const found = await data.key(layer, key);
  const { layers, num_keys: last, mask } = data.meta;
  box.dataset.title = keyName(layer, key);
  const place = layers.indexOf(layer);
  const turn = (l, k, mark, title) =>
    l !== undefined && k >= 0 && k < last
      ? h("a", { href: `#/${keyName(l, k)}`, title }, mark)
      : h("span", { class: "off" }, mark);
  const like = h("div", {}, h("p", { class: "loading" }, "Comparing keys …"));

  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, keyName(layer, key)),
      h("p", {}, `key ${key} of ${last} in layer ${layer} · fires on tokens by c(t), adds c·v to their rows`),
      h(
        "span",
        { class: "turn" },
        turn(layer, key - 1, "‹", "previous key"),
        turn(layer, key + 1, "›", "next key"),
        turn(layers[place - 1], key, "↑", "same key, layer above"),
        turn(layers[place + 1], key, "↓", "same key, layer below"),
        h("a", { class: "button", href: address("layers", { layer }) }, "all keys"),
        data.meta.live
          ? h("a", { class: "button", href: address("edit", { key: keyName(layer, key) }) }, "edit")
          : null,
      ),
    ),
    h(
      "div",
      { class: "grid sided" },
      panel(
        "Tokens it fires on",
        `exact over ${whole(mask.tokens)} tokens`,
        h(
          "div",
          { class: "two" },
          side("c positive (+)", found.positive, params.all),
          side("c negative (−)", found.negative, params.all),
        ),
        found.positive.length > FEW
          ? h(
              "a",
              { class: "more", href: address(keyName(layer, key), params.all ? {} : { all: 1 }) },
              params.all ? "fewer" : `all ${found.positive.length} of either side`,
            )
          : null,
      ),
      h(
        "div",
        {},
        panel("c over the vocabulary", "logarithmic", histogram(found.histogram, found.edges)),
        panel("Statistics", "over tokens", statistics(found.statistics)),
      ),
    ),
    h(
      "div",
      { class: "grid sided" },
      panel(
        "Its value, on the vocabulary",
        "direct: later layers and the final norm's scale are left out; where c is negative, the sides change places",
        h(
          "div",
          { class: "two" },
          side("promotes (+)", found.promoted, true),
          side("suppresses (−)", found.suppressed, true),
        ),
      ),
      panel("Cells like it", `cosine within layer ${layer}`, like),
    ),
  );
  data.similar(layer, key).then(
    (cells) =>
      like.replaceChildren(
        h(
          "div",
          { class: "two" },
          h("div", {}, h("h3", {}, "values"), cellList(layer, cells.values)),
          h("div", {}, h("h3", {}, "keys"), cellList(layer, cells.keys)),
        ),
      ),
    (error) => like.replaceChildren(problem(error)),
  );
}

function side(name, rows, all) {
  return h("div", {}, h("h3", {}, name), ranked(all ? rows : rows.slice(0, FEW)));
}

function cellList(layer, rows) {
  return ranked(rows, { most: 1, label: (key) => keyLink(layer, key), format: (v) => signed(v, 2) });
}

function statistics(values) {
  const lines = data.meta.statistics.map((name, i) =>
    h(
      "tr",
      {},
      h("th", {}, NAMES[name] ?? name),
      h("td", { class: "num" }, name === "active" ? `${number(100 * values[i])}%` : number(values[i])),
    ),
  );
  return h("table", { class: "facts" }, h("tbody", {}, lines));
}
