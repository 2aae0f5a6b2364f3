// A text: how long the rows of its tokens are, what they promote, and what the model expects next when rows are scaled.
import * as data from "../data.js";
import { h, keyLink, needsServer, panel, problem, ranked, token } from "../dom.js";
import { note } from "../nav.js";
import { attribution, expected, heat } from "../prompted.js";

const WAIT = 180;
const EXAMPLE = "The capital of France is";

export async function draw(box, _, params) {
  if (!data.meta.live) return void box.append(needsServer());
  const { depth, can_scale: scales, max_text_length: longest } = data.meta;
  const given = (params.alphas ?? "").split(",").map(Number);
  const alphas = given.length === depth && given.every(Number.isFinite) ? given : Array(depth).fill(1);
  const off = new Map();
  let position = params.at === undefined ? -1 : Number(params.at);
  let last = null,
    target = null,
    cell = null,
    waiting = 0,
    running = null;

  const field = h("textarea", {
    rows: 1,
    maxlength: longest,
    spellcheck: false,
    "aria-label": "Text",
    oninput: () => {
      position = -1;
      target = cell = null;
      later();
    },
  });
  field.value = params.text ?? EXAMPLE;
  const state = h("span", { class: "hint" });
  const strip = h("div", { class: "scroll" }),
    next = h("div"),
    parts = h("div"),
    row = h("div"),
    sliders = h("div", { class: "sliders" });
  const save = () =>
    note("prompt", {
      text: field.value === EXAMPLE ? null : field.value,
      alphas: alphas.every((a) => a === 1) ? null : alphas.join(","),
      at: position < 0 ? null : position,
    });

  const run = async () => {
    running?.abort();
    running = new AbortController();
    state.textContent = "computing …";
    save();
    try {
      last = await data.post("prompt", { text: field.value, alphas, position }, running.signal);
      state.textContent = `${last.ids.length} of at most ${data.meta.max_prompt_tokens} tokens`;
      await show();
    } catch (error) {
      state.textContent = "";
      strip.replaceChildren(problem(error));
    }
  };
  const later = () => {
    clearTimeout(waiting);
    waiting = setTimeout(run, WAIT);
  };
  const choose = (at, layer) => {
    const moved = at !== last.position;
    position = at;
    cell = layer === undefined ? null : { id: last.ids[at], layer };
    if (moved) run();
    else {
      save();
      show();
    }
  };
  const show = async () => {
    const found = await Promise.all(last.ids.map((id) => data.token(id)));
    strip.replaceChildren(heat(found, last, cell, choose));
    next.replaceChildren(
      ...expected(last, target, (id) => {
        target = id;
        show();
      }),
    );
    parts.replaceChildren(...attribution(last, target ?? last.next[0][0]));
    row.replaceChildren(await promoted(cell ?? { id: last.ids[last.position], layer: data.meta.layers.at(-1) }));
  };

  if (scales) {
    const all = h("input", {
      type: "range",
      min: -1,
      max: 2,
      step: 0.05,
      value: 1,
      "aria-label": "Factor of every layer",
      oninput: () => {
        alphas.fill(Number(all.value));
        off.clear();
        settings();
        later();
      },
    });
    const settings = () =>
      sliders.replaceChildren(
        h(
          "div",
          { class: "slider all" },
          h("b", {}, "all"),
          all,
          h("output", {}, ""),
          h(
            "button",
            {
              type: "button",
              onclick: () => {
                alphas.fill(1);
                off.clear();
                all.value = 1;
                settings();
                run();
              },
            },
            "reset",
          ),
        ),
        ...alphas.map((alpha, layer) => {
          const told = h("output", { class: alpha === 1 ? "" : "changed" }, alpha.toFixed(2));
          const range = h("input", {
            type: "range",
            min: -1,
            max: 2,
            step: 0.05,
            value: alpha,
            "aria-label": `Factor of layer ${layer}`,
            oninput: () => {
              alphas[layer] = Number(range.value);
              told.textContent = alphas[layer].toFixed(2);
              told.className = alphas[layer] === 1 ? "" : "changed";
              toggle.setAttribute("aria-pressed", String(alphas[layer] !== 0));
              later();
            },
          });
          const toggle = h(
            "button",
            {
              type: "button",
              "aria-pressed": String(alpha !== 0),
              title: "with or without this layer's rows",
              onclick: () => {
                if (alphas[layer] === 0) alphas[layer] = off.get(layer) ?? 1;
                else {
                  off.set(layer, alphas[layer]);
                  alphas[layer] = 0;
                }
                settings();
                run();
              },
            },
            `L${layer}`,
          );
          return h("div", { class: "slider" }, toggle, range, told);
        }),
      );
    settings();
  }
  box.append(
    h("div", { class: "prompt-top" }, field, state),
    h(
      "section",
      { class: "panel" },
      h(
        "h2",
        {},
        "Length of rows",
        h("small", {}, "by token and layer; choose a token to ask what follows it, a cell for what its row promotes"),
      ),
      strip,
    ),
    h(
      "div",
      { class: "prompt-body" },
      scales
        ? panel("Rows times α", "0 leaves a layer's rows out", sliders)
        : panel("A dense model", "", h("p", { class: "hint" }, "It has no rows to scale.")),
      h("div", { class: "stack" }, panel("Next token", "from the model itself", next), row),
      panel("What adds to its logit", "exact: parts sum to the logit", parts),
    ),
    h(
      "p",
      { class: "limits" },
      `Lengths and what rows promote are facts of the token, in every context. What comes next also depends on attention${data.meta.architecture === "flex" ? " and on FFN-C, which reads the context" : ""}: α scales rows alone.`,
    ),
  );
  await run();
  return () => {
    clearTimeout(waiting);
    running?.abort();
  };
}

async function promoted({ id, layer }) {
  const place = data.meta.layers.indexOf(layer);
  const [projected, record] = await Promise.all([data.row(id), data.token(id)]);
  const { promoted: up, suppressed: down } = projected.layers[place];
  const most = Math.max(Math.abs(up[0][1]), Math.abs(down[0][1]));
  return panel(
    `Row of layer ${layer}`,
    "direct: later layers are left out",
    h(
      "p",
      { class: "hint" },
      token(id),
      " keys ",
      record.keys[place]
        .slice(0, 4)
        .map(([key, c]) => [keyLink(layer, key), h("small", { class: c > 0 ? "pos" : "neg" }, c > 0 ? "+ " : "− ")]),
    ),
    h(
      "div",
      { class: "two" },
      h("div", {}, h("h3", {}, "promotes (+)"), ranked(up.slice(0, 8), { most })),
      h("div", {}, h("h3", {}, "suppresses (−)"), ranked(down.slice(0, 8), { most })),
    ),
  );
}
