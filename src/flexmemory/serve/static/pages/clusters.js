// Clusters of tokens by the keys they use: the list of a layer, and the members of one.
import * as data from "../data.js";
import { choice, h, number, paged, panel, percent, plainBar, token, whole } from "../dom.js";
import { address, go } from "../nav.js";

const MEMBERS = 240;
const ORDERS = [
  ["size", "size"],
  ["cohesion", "cohesion"],
  ["label", "number"],
];

export async function draw(box, [layerName, label], params) {
  const layers = data.meta.cluster_layers;
  if (!layers.length) throw new data.Failure("the index holds no clusters");
  const layer = layerName === undefined ? layers[0] : Number(layerName);
  if (!layers.includes(layer))
    throw new data.Failure(`tokens are not clustered in layer ${layerName}; they are in ${layers.join(", ")}`);
  const clusters = await data.clusters(layer);
  if (label !== undefined) return members(box, layer, clusters[Number(label)], label);
  const order = params.by ?? "size";
  clusters.sort((a, b) => (order === "label" ? a.label - b.label : b[order] - a[order]));
  const most = Math.max(...clusters.map((one) => one.size));
  box.dataset.title = `Clusters of layer ${layer}`;
  const lines = (some) =>
    h(
      "table",
      { class: "overview" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["", "tokens", "cohesion", "mostly", "nearest to the middle"].map((name) => h("th", {}, name)),
        ),
      ),
      h(
        "tbody",
        {},
        some.map((one) =>
          h(
            "tr",
            {
              onclick: (event) => {
                if (!event.target.closest("a")) go(`clusters/${layer}/${one.label}`);
              },
            },
            h("th", {}, h("a", { href: address(`clusters/${layer}/${one.label}`) }, one.label)),
            h("td", { class: "norm" }, plainBar(one.size, most), h("span", { class: "num" }, whole(one.size))),
            h("td", { class: "norm" }, plainBar(one.cohesion, 1), h("span", { class: "num" }, number(one.cohesion, 2))),
            h("td", { class: "kinds" }, kinds(one)),
            h(
              "td",
              {},
              one.medoids.map((id) => token(id)),
            ),
          ),
        ),
      ),
    );
  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, `${clusters.length} clusters of layer ${layer}`),
      h(
        "p",
        {},
        "K-means of the coefficients c(t): tokens that use the same keys. " +
          "Cohesion is the mean cosine of members with the middle; a shared mean alone makes it high, so compare clusters, not layers.",
      ),
      h(
        "span",
        { class: "turn" },
        choice(
          "layer",
          layers.map((one) => [one, one]),
          layer,
          (to) => go(`clusters/${to}`, params),
        ),
        choice("order", ORDERS, order, (by) => go(`clusters/${layer}`, { by })),
        h("a", { class: "button", href: address("map", { color: "cluster", layer }) }, "on the map"),
      ),
    ),
    h("section", { class: "panel" }, paged(clusters, 100, lines)),
  );
}

function kinds(one) {
  return (one.kinds ?? [])
    .slice(0, 2)
    .map(([name, count]) => `${name} ${percent(count / Math.max(1, one.size))}`)
    .join(", ");
}

async function members(box, layer, cluster, label) {
  if (!cluster) throw new data.Failure(`layer ${layer} has no cluster ${label}`);
  const labels = await data.labels(layer);
  const { counts } = data.tokens;
  const ids = [];
  for (let id = 0; id < labels.length; id++) if (labels[id] === cluster.label && data.isKept(id)) ids.push(id);
  if (counts) ids.sort((a, b) => counts[b] - counts[a]);
  box.dataset.title = `L${layer} cluster ${label}`;
  box.append(
    h(
      "div",
      { class: "title" },
      h("h1", {}, `Cluster ${label} of layer ${layer}`),
      h("p", {}, `${whole(cluster.size)} tokens · cohesion ${number(cluster.cohesion, 3)} · ${kinds(cluster)}`),
      h(
        "span",
        { class: "turn" },
        h("a", { class: "button", href: address(`clusters/${layer}`) }, "all clusters"),
        h("a", { class: "button", href: address("map", { color: "cluster", layer, only: label }) }, "on the map"),
      ),
    ),
    panel(
      "Nearest to the middle",
      "",
      h(
        "p",
        { class: "cloud" },
        cluster.medoids.map((id) => token(id)),
      ),
    ),
    panel(
      "Members",
      `${whole(ids.length)} that the mask keeps, ${counts ? "most frequent first" : "by id"}`,
      paged(ids, MEMBERS, (some) =>
        h(
          "p",
          { class: "cloud" },
          some.map((id) => token(id)),
        ),
      ),
    ),
  );
}
