// What an edit does: who moves, by how much, and what the model then says.
import * as data from "./data.js";
import { h, number, paged, panel, percent, token, whole } from "./dom.js";
import { expectations } from "./next.js";

// `ahead` is where the text goes on, when that is known.
export function report(found, ahead) {
  const { about, layers, worst, next } = found;
  const byToken = new Map();
  for (const [id, layer, moved, length] of about)
    byToken.set(id, [...(byToken.get(id) ?? []), { layer, moved, length }]);
  return [
    panel(
      "Who moves",
      found.rows_only
        ? "rows alone: other tokens stay bit for bit"
        : `exact over ${whole(data.meta.vocab_size)} tokens`,
      h(
        "p",
        { class: "verdict" },
        found.others
          ? [h("strong", {}, whole(found.others)), " other tokens' rows move."]
          : [h("strong", {}, "No other token"), "'s row moves."],
      ),
      byToken.size
        ? h(
            "table",
            { class: "numbers" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                ["edited", "layers", "moves by", "of its length"].map((name, i) =>
                  h("th", { class: i > 1 ? "num" : "" }, name),
                ),
              ),
            ),
            h(
              "tbody",
              {},
              [...byToken].slice(0, 12).map(([id, rows]) => {
                const far = rows.reduce((a, b) => (a.moved / a.length > b.moved / b.length ? a : b));
                return h(
                  "tr",
                  {},
                  h("td", {}, token(id)),
                  h("td", {}, rows.length > 1 ? `${rows.length}, most L${far.layer}` : `L${far.layer}`),
                  h("td", { class: "num" }, number(far.moved)),
                  h("td", { class: "num" }, percent(far.moved / far.length)),
                );
              }),
            ),
          )
        : null,
      found.others
        ? h(
            "table",
            { class: "numbers" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                ["layer", "others that move over 1 %", "largest", "mean", "mean length of rows"].map((name, i) =>
                  h("th", { class: i ? "num" : "" }, name),
                ),
              ),
            ),
            h(
              "tbody",
              {},
              layers.map((one) =>
                h(
                  "tr",
                  {},
                  h("th", {}, `L${one.layer}`),
                  h("td", { class: "num" }, whole(one.moved)),
                  h("td", { class: "num" }, number(one.max)),
                  h("td", { class: "num" }, number(one.mean)),
                  h("td", { class: "num" }, number(one.row_length)),
                ),
              ),
            ),
          )
        : null,
      worst.length
        ? [
            h("h3", {}, "others that move farthest"),
            paged(worst, 24, (some) =>
              h(
                "p",
                { class: "cloud" },
                some.map(([id, layer, moved]) => [token(id), h("small", {}, `L${layer} ${number(moved, 2)}  `)]),
              ),
            ),
          ]
        : null,
    ),
    panel(
      "Next token",
      "after the text, before and after the edit",
      expectations(next.slice(0, 10), ["before", "after"]),
    ),
    ahead,
    panel(
      "As a patch",
      "",
      h(
        "p",
        { class: "hint" },
        `${whole(found.bytes)} bytes of numbers: `,
        found.what.slice(0, 8).join("; "),
        found.what.length > 8 ? ` and ${found.what.length - 8} more` : "",
      ),
      found.description ? h("p", {}, found.description) : null,
    ),
  ].filter(Boolean);
}

export const goesOn = (texts) =>
  panel(
    "Goes on",
    "greedy",
    h(
      "div",
      { class: "two" },
      ["before", "after"].map((name, i) => h("div", {}, h("h3", {}, name), h("p", { class: "continued" }, texts[i]))),
    ),
  );
