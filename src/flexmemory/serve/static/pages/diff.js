// Two memories row by row: this checkpoint beside another, a patch, or the edits of the bench.
import * as data from "../data.js";
import {
  choice,
  h,
  needsServer,
  number,
  paged,
  panel,
  percent,
  plainBar,
  problem,
  ranked,
  token,
  whole,
} from "../dom.js";
import { address, go } from "../nav.js";

export async function draw(box, _, params) {
  if (!data.meta.live) return void box.append(needsServer());
  const { comparable } = await data.state();
  if (!comparable.length) {
    return void box.append(
      h(
        "div",
        { class: "problem" },
        h("strong", {}, "Nothing to compare with. "),
        "Start with ",
        h("code", {}, "flexmemory explore CHECKPOINT --compare OTHER"),
        " (a checkpoint of the same shape and tokenizer, a store or a patch), or apply an edit on the page Edit.",
      ),
    );
  }
  const name = comparable.includes(params.with) ? params.with : comparable[0];
  const id = params.token === undefined ? null : Number(params.token);
  box.dataset.title = `Diff with ${name}`;
  const body = h("div", { class: "stack" }, h("p", { class: "loading" }, "Comparing every row …"));
  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, "Diff"),
      h(
        "p",
        {},
        `Rows of ${data.meta.name}'s memory beside those of `,
        h("strong", {}, name),
        `, exact over ${whole(data.meta.mask.tokens)} tokens. Attention and head are not compared.`,
      ),
      h(
        "span",
        { class: "turn" },
        choice(
          "with",
          comparable.map((one) => [one, one]),
          name,
          (to) => go("diff", { with: to, token: params.token }),
        ),
        data.meta.spaces.length ? h("a", { href: address("map", { color: "diff", with: name }) }, "on the map") : null,
      ),
    ),
    body,
  );
  const draw = id === null ? overview(name) : oneToken(name, id, Number(params.layer ?? -1));
  draw.then(
    (parts) => body.replaceChildren(...parts),
    (error) => body.replaceChildren(problem(error)),
  );
}

async function overview(name) {
  const found = await data.post("diff", { with: name });
  const most = Math.max(...found.layers.map((one) => one.relative), 1e-30);
  const table = h(
    "table",
    { class: "overview" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["", "change, of rows' length", "largest", "tokens changed over 1 %", "not equal bit for bit"].map((name) =>
          h("th", {}, name),
        ),
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
          h("td", { class: "norm" }, plainBar(one.relative, most), h("span", { class: "num" }, percent(one.relative))),
          h("td", {}, percent(one.largest)),
          h("td", {}, whole(one.moved)),
          h("td", {}, whole(one.different)),
        ),
      ),
    ),
  );
  const top = Math.max(...found.tokens.map(([, size]) => size), 1e-30);
  const list = found.tokens.length
    ? paged(found.tokens, 60, (some) =>
        h(
          "ol",
          { class: "ranked columns" },
          some.map(([id, size, layer]) =>
            h(
              "li",
              {},
              h("span", { class: "label" }, token(id, { href: address("diff", { with: name, token: id, layer }) })),
              plainBar(size, top),
              h("span", { class: "num" }, `${percent(size)} L${layer}`),
            ),
          ),
        ),
      )
    : h("p", { class: "none" }, "no row differs");
  return [
    panel("Layers", "root mean square over tokens", table),
    panel(
      "Tokens that changed most",
      `${whole(found.changed)} changed at all${found.tokens.length < found.changed ? `; the first ${whole(found.tokens.length)}` : ""}; by the layer where the change is the largest share of the row`,
      list,
    ),
  ];
}

async function oneToken(name, id, chosen) {
  const found = await data.post("diff/token", { with: name, token: id });
  const share = (one) => one.moved / (one.lengths[0] || 1e-30);
  const layer =
    found.layers.find((one) => one.layer === chosen) ?? found.layers.reduce((a, b) => (share(a) > share(b) ? a : b));
  const most = Math.max(...found.layers.map(share), 1e-30);
  const table = h(
    "table",
    { class: "overview" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["", "change, of its length", "‖row‖ here", "there", "cosine"].map((label) => h("th", {}, label)),
      ),
    ),
    h(
      "tbody",
      {},
      found.layers.map((one) =>
        h(
          "tr",
          {
            "data-layer": one.layer,
            class: one === layer ? "chosen" : "",
            onclick: () => go("diff", { with: name, token: id, layer: one.layer }),
          },
          h("th", {}, `L${one.layer}`),
          h("td", { class: "norm" }, plainBar(share(one), most), h("span", { class: "num" }, percent(share(one)))),
          h("td", {}, number(one.lengths[0])),
          h("td", {}, number(one.lengths[1])),
          h("td", {}, number(one.cosine)),
        ),
      ),
    ),
  );
  const side = (at) =>
    h(
      "div",
      {},
      h("h3", {}, at ? `in ${name}` : "here"),
      h(
        "div",
        { class: "two" },
        h("div", {}, h("h3", {}, "promotes (+)"), ranked(layer.promoted[at])),
        h("div", {}, h("h3", {}, "suppresses (−)"), ranked(layer.suppressed[at])),
      ),
    );
  return [
    panel(
      "Token",
      "",
      h(
        "p",
        {},
        token(id),
        h("small", {}, ` T${id} · ${data.kind(id)} · `),
        h("a", { href: address("diff", { with: name }) }, "all tokens"),
      ),
    ),
    panel("Its row in every layer", "", table),
    panel(
      `What its row of layer ${layer.layer} promotes`,
      "direct: later layers are left out",
      h("div", { class: "two" }, side(0), side(1)),
    ),
  ];
}
