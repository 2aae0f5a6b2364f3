// Parts of the page of a prompt: rows by token and layer, and what adds up to a logit.
import * as data from "./data.js";
import { h, number, signed, text, token } from "./dom.js";
import { expectations } from "./next.js";

export function heat(found, last, cell, choose) {
  const { layers } = data.meta;
  const most = layers.map((_, place) => Math.max(...found.map((one) => one.norms[place])));
  const surprise = last.surprise[1],
    before = last.surprise[0];
  const ceiling = Math.max(...surprise.slice(1), ...before.slice(1), 1);
  return h(
    "table",
    { class: "heat" },
    h(
      "tbody",
      {},
      h(
        "tr",
        {},
        h("th", {}, ""),
        last.ids.map((id, at) =>
          h(
            "th",
            { class: at === last.position ? "at" : "" },
            h(
              "button",
              { type: "button", class: "tok", title: `T${id}: what follows it?`, onclick: () => choose(at) },
              text(id),
            ),
          ),
        ),
      ),
      h(
        "tr",
        {},
        h("th", { title: "minus log probability of the token, in nats" }, "surprise"),
        surprise.map((value, at) =>
          h(
            "td",
            {
              class: "num",
              title: value === null ? "given" : `${number(value)} nats; with α = 1: ${number(before[at])}`,
            },
            value === null
              ? "–"
              : [
                  h(
                    "span",
                    { class: "bar plain" },
                    h("b", { style: { left: "0", width: `${(100 * value) / ceiling}%` } }),
                  ),
                  number(value, 2),
                ],
          ),
        ),
      ),
      layers.map((layer, place) =>
        h(
          "tr",
          {},
          h("th", {}, `L${layer}`),
          found.map((one, at) =>
            h(
              "td",
              {},
              h(
                "button",
                {
                  type: "button",
                  class: `cell ${cell?.layer === layer && last.position === at ? "on" : ""}`,
                  title: `‖row‖ of T${one.id} in layer ${layer}: ${number(one.norms[place])}`,
                  "aria-label": `row of token ${at}, layer ${layer}`,
                  style: { "--share": `${Math.round((100 * one.norms[place]) / (most[place] || 1))}%` },
                  onclick: () => choose(at, layer),
                },
                number(one.norms[place], 2),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

export function expected(last, target, choose) {
  const told = ` · KL to α = 1: ${number(last.divergence)} nats`;
  const chosen = target ?? last.next[0][0];
  return [
    h("p", { class: "hint" }, "after ", token(last.ids[last.position]), told),
    expectations(last.next, ["α = 1", "now"], { chosen, choose }),
  ];
}

const PART = { hook_embed: "embedding", hook_attn_out: "attention", hook_mlp_out: "rows", hook_ffn_c_out: "FFN-C" };

export function attribution(last, id) {
  const values = last.parts[id];
  if (!values) return [h("p", { class: "none" }, "not computed for this token")];
  const named = last.labels.map((label, i) => {
    const at = /^blocks\.(\d+)\.(.*)$/.exec(label);
    return { layer: at ? Number(at[1]) : null, what: PART[at ? at[2] : label], value: values[i] };
  });
  const most = Math.max(...values.map(Math.abs), 1e-30);
  const bar = (value) =>
    value === undefined
      ? h("td")
      : h(
          "td",
          { class: "wide", title: signed(value) },
          h(
            "span",
            { class: "bar" },
            h("b", {
              class: value > 0 ? "pos" : "neg",
              style: {
                left: `${value >= 0 ? 50 : 50 - (50 * Math.abs(value)) / most}%`,
                width: `${(50 * Math.abs(value)) / most}%`,
              },
            }),
          ),
          h("small", { class: value > 0 ? "pos" : "neg" }, signed(value, 2)),
        );
  const of = (layer, what) => named.find((part) => part.layer === layer && part.what === what)?.value;
  const kinds = ["attention", "rows", "FFN-C"].filter((what) => named.some((part) => part.what === what));
  const total = values.reduce((sum, value) => sum + value, 0);
  const sums = kinds.map((what) =>
    named.filter((part) => part.what === what).reduce((sum, part) => sum + part.value, 0),
  );
  return [
    h(
      "p",
      { class: "hint" },
      "logit of ",
      token(id),
      ` ${signed(total)} = embedding ${signed(of(null, "embedding") ?? 0, 2)}`,
      kinds.map((what, i) => `, ${what} ${signed(sums[i], 2)}`),
    ),
    h(
      "table",
      { class: "parts" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", {}, ""),
          kinds.map((what) => h("th", {}, what)),
        ),
      ),
      h(
        "tbody",
        {},
        [...Array(data.meta.depth).keys()].map((layer) =>
          h(
            "tr",
            {},
            h("th", {}, `L${layer}`),
            kinds.map((what) => bar(of(layer, what))),
          ),
        ),
      ),
    ),
  ];
}
