// The vocabulary as a map: a point a token, near where they use the same keys (or have like embeddings).
import * as data from "../data.js";
import { css, ofGroup, ofScale } from "../colors.js";
import { choice, h, number, paged, s, text, token, whole } from "../dom.js";
import { address, go, note } from "../nav.js";
import { Scatter } from "../scatter.js";

const COLORS = [
  ["kind", "kind of token"],
  ["cluster", "cluster"],
  ["norm", "length of the row"],
  ["diff", "difference"],
];
const LISTED = 120;
const MARKED = 100;

const layersOf = (color) => [
  ...(color === "diff" ? [[-1, "the most changed"]] : []),
  ...(color === "cluster" ? data.meta.cluster_layers : data.meta.layers).map((one) => [one, one]),
];

export async function draw(box, _, params) {
  const { spaces, cluster_layers: clustered, layers } = data.meta;
  if (!spaces.length) throw new data.Failure("the index holds no maps");
  const comparable = data.meta.live && data.meta.can_scale ? (await data.state()).comparable : [];
  const state = {
    space: spaces.includes(params.space)
      ? params.space
      : (spaces.find((name) => name.startsWith("layer")) ?? spaces[0]),
    color: COLORS.some(([name]) => name === params.color) ? params.color : "kind",
    layer: Number(params.layer ?? (params.color === "diff" ? -1 : layers[0])),
    with: comparable.includes(params.with) ? params.with : comparable[0],
    only: params.only ?? "",
    find: params.find ?? "",
    at: params.at ?? "",
  };
  if (state.color === "cluster" && !clustered.includes(state.layer)) state.layer = clustered[0];
  if (state.color === "diff" && !comparable.length)
    throw new data.Failure(
      data.meta.live
        ? "there is nothing to compare with: start with --compare, or apply an edit on the page Edit"
        : "a difference needs the model: run flexmemory explore",
    );
  if (!layers.includes(state.layer)) state.layer = state.color === "diff" ? -1 : layers[0];
  box.dataset.title = `Map of ${state.space}`;
  const places = await data.map(state.space);
  const legend = h("div", { class: "maplegend" }),
    chosen = h("div", { class: "chosenlist" }),
    tip = h("div", { class: "tip", hidden: true });
  const canvas = h("canvas", {
    tabindex: 0,
    "aria-label": "Map of the vocabulary: drag to move, wheel or + and − to zoom, shift and drag to select",
  });
  const lasso = s("svg", { class: "lasso" });
  const frame = h("div", { class: "frame" }, canvas, lasso, tip);
  const plot = new Scatter(canvas, places);
  const save = () =>
    note("map", {
      ...state,
      color: state.color === "kind" ? null : state.color,
      layer: state.color === "kind" ? null : state.layer,
      with: state.color === "diff" ? state.with : null,
    });
  const again = (change) => go("map", { ...state, only: "", ...change });
  const list = (ids, name) => chosen.replaceChildren(...listed(ids, name));
  let changed = null;
  const paint = async () => {
    const painted = await coloured(state);
    plot.setColors(painted.colors, painted.hidden);
    changed = painted.changed;
    const chooseGroup = (group) => {
      state.only = String(group) === state.only ? "" : String(group);
      save();
      paint();
    };
    legend.replaceChildren(...painted.legend(chooseGroup, state.only).filter(Boolean));
  };
  const search = (query, move) => {
    state.find = query;
    save();
    const found = query ? data.find(query, 500) : [];
    plot.setMarks(found);
    if (found.length && move) plot.show(found.slice(0, 1));
    if (query) list(found, `like “${query}”`);
    else rest();
  };
  // Nothing searched or selected: of a difference, the tokens that changed, marked where they are few.
  const rest = () => {
    if (!changed) return list([], "");
    plot.setMarks(changed.length <= MARKED ? changed : []);
    list(changed, "changed, the most first");
  };
  const field = h("input", {
    type: "search",
    placeholder: "mark tokens",
    value: state.find,
    "aria-label": "Mark tokens on the map",
    oninput: () => search(field.value, false),
    onkeydown: (event) => {
      if (event.key === "Enter") search(field.value, true);
    },
  });
  const lassoButton = h(
    "button",
    {
      type: "button",
      "aria-pressed": "false",
      title: "or hold shift",
      onclick: () => {
        plot.lasso = !plot.lasso;
        lassoButton.setAttribute("aria-pressed", String(plot.lasso));
      },
    },
    "lasso",
  );
  const button = (label, title, onclick) => h("button", { type: "button", title, "aria-label": title, onclick }, label);

  plot.onhover = (id, x, y) => {
    tip.hidden = id === null;
    canvas.classList.toggle("on", id !== null);
    if (id === null) return;
    tip.replaceChildren(h("span", { class: "tok" }, text(id)), h("small", {}, `T${id} · ${data.kind(id)}`));
    tip.style.setProperty("left", `${Math.min(x + 14, frame.clientWidth - 210)}px`);
    tip.style.setProperty("top", `${y + 14}px`);
  };
  plot.onpick = (id) => {
    if (id !== null) location.hash = `#/T${id}`;
  };
  plot.onselect = (ids) => {
    plot.setMarks(ids);
    list(ids, "selected");
  };
  plot.onlasso = (line) =>
    lasso.replaceChildren(...(line ? [s("polygon", { points: line.map((p) => p.join(",")).join(" ") })] : []));
  let waiting = 0;
  plot.onmove = (view) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.at = [view.x, view.y, view.zoom].map((v) => v.toFixed(4)).join(",");
      save();
    }, 250);
  };

  box.append(
    frame,
    h(
      "aside",
      {},
      h(
        "div",
        { class: "controls" },
        choice(
          "space",
          spaces.map((name) => [name, name === "embedding" ? "embedding" : name.replace("layer", "keys of layer ")]),
          state.space,
          (space) => again({ space, at: "" }),
        ),
        choice(
          "colour",
          COLORS.filter(([name]) => !{ cluster: !clustered.length, diff: !comparable.length }[name]),
          state.color,
          (color) => again({ color, layer: color === "diff" ? -1 : Math.max(0, state.layer) }),
        ),
        state.color === "diff"
          ? choice(
              "with",
              comparable.map((name) => [name, name]),
              state.with,
              (name) => again({ with: name }),
            )
          : null,
        state.color === "kind"
          ? null
          : choice(
              "layer",
              layersOf(state.color),
              state.layer,
              (layer) => again({ layer }),
            ),
      ),
      h(
        "div",
        { class: "controls" },
        field,
        lassoButton,
        button("+", "Zoom in", () => plot.zoomBy(1.5)),
        button("−", "Zoom out", () => plot.zoomBy(1 / 1.5)),
        button("◻", "Whole map", () => {
          plot.view = { x: 0.5, y: 0.5, zoom: 1 };
          plot.moved();
        }),
      ),
      legend,
      chosen,
      h(
        "p",
        { class: "limits" },
        "Neighbours on a map are like each other; distances between far groups and the sizes of groups mean nothing.",
      ),
    ),
  );
  await paint();
  if (state.find) search(state.find, false);
  else rest();
  const view = state.at.split(",").map(Number);
  if (view.length === 3 && view.every(Number.isFinite)) {
    plot.view = { x: view[0], y: view[1], zoom: Math.max(0.5, Math.min(400, view[2])) };
  }
  box.addEventListener("shown", () => plot.draw());
  return () => {
    clearTimeout(waiting);
    plot.end();
  };
}

function listed(ids, name) {
  if (!name)
    return [
      h(
        "p",
        { class: "hint" },
        "Click a point to open its token. Shift and drag, or lasso, to select; the list comes here.",
      ),
    ];
  const kinds = new Map();
  for (const id of ids) kinds.set(data.kind(id), (kinds.get(data.kind(id)) ?? 0) + 1);
  const shares = [...kinds]
    .sort((a, b) => b[1] - a[1])
    .slice(0, 4)
    .map(([kind, count]) => `${kind} ${whole(count)}`);
  return [
    h("h3", {}, `${whole(ids.length)} ${name}`),
    h("p", { class: "hint" }, shares.join(" · ")),
    paged(ids, LISTED, (some) =>
      h(
        "p",
        { class: "cloud" },
        some.map((id) => token(id)),
      ),
    ),
  ];
}

async function coloured(state) {
  const { color, layer, only } = state;
  const count = data.meta.vocab_size;
  const colors = new Uint8Array(4 * count),
    hidden = new Uint8Array(count);
  const put = (id, rgb, alpha) => colors.set([...rgb, alpha], 4 * id);
  if (color === "norm" || color === "diff") {
    const values = color === "norm" ? await data.norms(layer) : await data.differences(state.with, layer);
    const ids = [...Array(count).keys()].filter((id) => data.isKept(id));
    const told = color === "norm" ? ids : ids.filter((id) => values[id] > 0).sort((a, b) => values[b] - values[a]);
    const sorted = Float32Array.from(told, (id) => values[id]).sort();
    const at = (share) => sorted[Math.floor(share * (sorted.length - 1))] ?? 0;
    const [low, high] = [color === "norm" ? at(0.01) : 0, at(0.99)];
    hidden.fill(1);
    for (const id of ids) {
      hidden[id] = 0;
      if (color === "diff") put(id, [150, 150, 150], 40);
    }
    for (const id of told) put(id, ofScale((values[id] - low) / (high - low || 1)), 210);
    const steps = [...Array(32).keys()].map((i) => h("b", { style: { background: css(ofScale(i / 31)) } }));
    const name = color === "norm" ? `‖row‖, layer ${layer}, 1–99 %` : "‖change‖ / ‖row‖, to 99 %";
    return {
      colors,
      hidden,
      changed: color === "diff" ? told : null,
      legend: () => [
        h("div", { class: "scale" }, steps),
        h("div", { class: "ends" }, h("span", {}, number(low)), h("span", {}, name), h("span", {}, number(high))),
        color === "diff" ? h("p", { class: "hint" }, "grey: not changed by a bit") : null,
      ],
    };
  }
  const groups = color === "cluster" ? await data.labels(layer) : data.tokens.kind;
  const sizes = new Map();
  for (let id = 0; id < count; id++) {
    const group = groups[id];
    const faded = only !== "" && String(group) !== only;
    hidden[id] = data.isKept(id) ? 0 : 1;
    if (!hidden[id]) sizes.set(group, (sizes.get(group) ?? 0) + 1);
    put(id, faded ? [150, 150, 150] : ofGroup(group), hidden[id] ? 0 : faded ? 40 : 200);
  }
  const clusters = color === "cluster" ? await data.clusters(layer) : [];
  const name = (group) =>
    color === "cluster"
      ? [
          h("small", {}, `${group} `),
          clusters[group].medoids.slice(0, 3).map((id) => h("span", { class: "tok" }, text(id))),
        ]
      : data.tokens.kinds[group];
  const order = [...sizes].sort((a, b) => b[1] - a[1]);
  const entry = ([group, size], choose) =>
    h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: "group",
          "aria-pressed": String(group) === only ? "true" : "false",
          onclick: () => choose(group),
        },
        h("b", { style: { background: css(ofGroup(group)) } }),
        h("span", {}, name(group)),
        h("small", {}, whole(size)),
      ),
      color === "cluster" ? h("a", { href: address(`clusters/${layer}/${group}`), title: "members" }, "›") : null,
    );
  return {
    colors,
    hidden,
    legend: (choose) => [
      h(
        "ul",
        { class: "groups" },
        order.map((one) => entry(one, choose)),
      ),
    ],
  };
}
