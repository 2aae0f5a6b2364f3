// One token: its rows, the keys they are made of, what they promote, and the tokens like it.
import * as data from "../data.js";
import { strip } from "../charts.js";
import { h, keyLink, keyName, number, panel, problem, ranked, signed, text, token, whole } from "../dom.js";
import { address, note } from "../nav.js";

const CHIPS = 4;

export async function draw(box, [id], params) {
  const found = await data.token(id);
  const { layers } = data.meta;
  let chosen = layers.includes(Number(params.layer)) ? Number(params.layer) : layers[0];
  box.dataset.title = `T${id} ${data.shown(id)}`;

  const detail = h("div", { class: "detail" });
  const norms = h("div");
  const table = h("div", { class: "scroll" }, h("p", { class: "loading" }, "Projecting rows on the vocabulary …"));
  const rows = data.row(id).catch((error) => error);

  const choose = async (layer, first) => {
    chosen = layer;
    if (!first) note(`T${id}`, { layer: layer === layers[0] ? null : layer });
    norms.replaceChildren(strip(found.norms, layers, { chosen, onchoose: choose }));
    for (const line of table.querySelectorAll("tr[data-layer]"))
      line.classList.toggle("chosen", Number(line.dataset.layer) === layer);
    detail.replaceChildren(keysOf(found, layers.indexOf(layer), layer));
    const projected = await rows;
    if (chosen === layer)
      detail.replaceChildren(keysOf(found, layers.indexOf(layer), layer), wordsOf(projected, layers.indexOf(layer)));
  };

  box.append(
    head(id, found),
    h("div", { class: "panel" }, h("h2", {}, "Length of the row, by layer", h("small", {}, "choose a layer")), norms),
    detail,
    panel(
      "Every layer",
      `the strongest keys of either sign${data.meta.live ? ", and what the row says of the next token" : ""}`,
      table,
    ),
    neighbours(id, found),
  );
  await choose(chosen, true);
  rows.then((projected) =>
    table.replaceChildren(
      overview(
        found,
        projected,
        (layer) => choose(layer),
        () => chosen,
      ),
    ),
  );
}

function head(id, found) {
  const facts = [`T${id}`, data.kind(id), found.bytes ? `bytes ${found.bytes}` : "no bytes"];
  if (data.tokens.counts) facts.push(`${whole(data.tokens.counts[id])} in the counted text`);
  const warnings = [
    !found.reachable && "no text gives this token",
    found.undertrained && "the counted text lacks this token",
  ].filter(Boolean);
  const clusters = Object.entries(found.clusters)
    .filter(([, label]) => label !== null)
    .map(([layer, label]) => h("a", { href: address(`clusters/${layer}/${label}`) }, `L${layer} cluster ${label}`));
  return h(
    "div",
    { class: "title" },
    h("h1", { class: "tok big" }, text(id)),
    h(
      "p",
      {},
      facts.join(" · "),
      clusters.length ? [" · ", clusters.map((link, i) => [i ? ", " : "", link])] : null,
      warnings.length ? h("em", { class: "warning" }, ` ${warnings.join("; ")}: rows mean little`) : null,
    ),
    h(
      "span",
      { class: "turn" },
      id > 0 ? h("a", { href: `#/T${id - 1}`, title: "previous id" }, "‹") : null,
      id + 1 < data.meta.vocab_size ? h("a", { href: `#/T${id + 1}`, title: "next id" }, "›") : null,
      data.meta.live ? h("a", { href: address("edit", { token: id }), class: "button" }, "edit") : null,
    ),
  );
}

function keysOf(found, place, layer) {
  const rows = found.keys[place];
  const most = Math.max(...rows.map(([, , weight]) => weight), 1e-30);
  const list = (sign) =>
    rows.filter(([, c]) => sign * c > 0).map(([key, c, weight]) => [key, Math.sign(c) * weight, c]);
  const column = (sign, name) => {
    const entries = list(sign);
    const values = new Map(entries.map(([key, , c]) => [key, c]));
    return h(
      "div",
      {},
      h("h3", {}, name),
      entries.length
        ? ranked(entries, {
            most,
            label: (key) => [keyLink(layer, key, {}, `K${key}`), h("small", {}, `c ${signed(values.get(key))}`)],
            format: (v) => number(Math.abs(v)),
          })
        : h("p", { class: "none" }, "none among the strongest"),
    );
  };
  return panel(
    `Keys of layer ${layer}`,
    `the ${rows.length} largest by |c|·‖v‖: how long a vector the cell adds`,
    h("div", { class: "two" }, column(1, "c positive (+)"), column(-1, "c negative (−)")),
  );
}

function wordsOf(projected, place) {
  if (projected instanceof Error) return problem(projected);
  const { promoted, suppressed } = projected.layers[place];
  const most = Math.max(Math.abs(promoted[0]?.[1] ?? 0), Math.abs(suppressed[0]?.[1] ?? 0));
  return panel(
    "The row, on the vocabulary",
    "direct: later layers and the final norm's scale are left out",
    h(
      "div",
      { class: "two" },
      h("div", {}, h("h3", {}, "promotes (+)"), ranked(promoted, { most })),
      h("div", {}, h("h3", {}, "suppresses (−)"), ranked(suppressed, { most })),
    ),
  );
}

function overview(found, projected, choose, chosen) {
  const most = Math.max(...found.norms, 1e-30);
  const chips = (rows, layer, sign) =>
    rows
      .filter(([, c]) => sign * c > 0)
      .slice(0, CHIPS)
      .map(([key, c]) =>
        h(
          "a",
          { class: `key small`, href: `#/${keyName(layer, key)}`, title: `${keyName(layer, key)}, c ${signed(c)}` },
          `K${key}`,
          h("i", { class: sign > 0 ? "pos" : "neg" }, sign > 0 ? "+" : "−"),
        ),
      );
  const words = (list) => list.slice(0, CHIPS + 1).map(([id]) => token(id));
  const known = !(projected instanceof Error);
  const lines = data.meta.layers.map((layer, place) =>
    h(
      "tr",
      {
        "data-layer": layer,
        class: layer === chosen() ? "chosen" : "",
        onclick: (event) => {
          if (!event.target.closest("a")) choose(layer);
        },
      },
      h("th", {}, `L${layer}`),
      h(
        "td",
        { class: "norm" },
        h(
          "span",
          { class: "bar plain" },
          h("b", { style: { left: "0", width: `${(100 * found.norms[place]) / most}%` } }),
        ),
        h("span", { class: "num" }, number(found.norms[place])),
      ),
      h("td", {}, chips(found.keys[place], layer, 1)),
      h("td", {}, chips(found.keys[place], layer, -1)),
      known
        ? [h("td", {}, words(projected.layers[place].promoted)), h("td", {}, words(projected.layers[place].suppressed))]
        : null,
    ),
  );
  return h(
    "table",
    { class: "overview" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["", "‖row‖", "keys +", "keys −", ...(known ? ["promotes +", "suppresses −"] : [])].map((name) =>
          h("th", {}, name),
        ),
      ),
    ),
    h("tbody", {}, lines),
  );
}

function neighbours(id, found) {
  const byKeys = new Map(found.near),
    byEmbedding = new Map(found.near_embedding);
  const both = found.near.filter(([other]) => byEmbedding.has(other));
  const list = (rows) =>
    rows.length ? ranked(rows, { most: 1, format: (v) => number(v) }) : h("p", { class: "none" }, "none");
  const bothList = both.length
    ? h(
        "ol",
        { class: "ranked" },
        both.map(([other, cosine]) =>
          h(
            "li",
            {},
            h("span", { class: "label" }, token(other)),
            h("span"),
            h("span", { class: "num" }, `${number(cosine, 2)} · ${number(byEmbedding.get(other), 2)}`),
          ),
        ),
      )
    : h("p", { class: "none" }, "none");
  return panel(
    "Tokens like it",
    `the ${found.near.length} nearest by cosine: of the keys they use (c, layer ${data.meta.layers[0]}), and of the embedding`,
    h(
      "div",
      { class: "three" },
      h("div", {}, h("h3", {}, "only by keys"), list(found.near.filter(([other]) => !byEmbedding.has(other)))),
      h("div", {}, h("h3", {}, "by both", h("small", {}, "keys · embedding")), bothList),
      h(
        "div",
        {},
        h("h3", {}, "only by embedding"),
        list(found.near_embedding.filter(([other]) => !byKeys.has(other))),
      ),
    ),
  );
}
