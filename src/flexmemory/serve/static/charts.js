// Charts as SVG, drawn by hand: bars of layers, histograms, lines.
import { h, number, s } from "./dom.js";

// One bar a layer; a click chooses the layer.
export function strip(values, names, { chosen, onchoose, height = 74 }) {
  const most = Math.max(...values, 1e-30);
  const width = 100 / values.length;
  const bars = values.map((value, i) => {
    const tall = (height - 20) * (value / most);
    return s(
      "g",
      {
        class: names[i] === chosen ? "layer chosen" : "layer",
        role: "button",
        tabindex: 0,
        "aria-label": `layer ${names[i]}: ${number(value)}`,
        onclick: () => onchoose(names[i]),
        onkeydown: (event) => {
          if (event.key === "Enter" || event.key === " ") {
            event.preventDefault();
            onchoose(names[i]);
          }
        },
      },
      s("title", {}, `layer ${names[i]}: ${number(value)}`),
      s("rect", { class: "hit", x: `${i * width}%`, y: 0, width: `${width}%`, height }),
      s("rect", {
        class: "fill",
        x: `${i * width + width * 0.12}%`,
        y: height - 16 - tall,
        width: `${width * 0.76}%`,
        height: Math.max(tall, 1),
        rx: 1,
      }),
      s("text", { x: `${(i + 0.5) * width}%`, y: height - 4, "text-anchor": "middle" }, names[i]),
    );
  });
  return s(
    "svg",
    { class: "strip", height, width: "100%", role: "group", "aria-label": "Length of the row by layer" },
    bars,
  );
}

// Counts of equal bins; heights are logarithmic, for most tokens are near zero.
export function histogram(counts, [low, high], { width = 460, height = 150 } = {}) {
  const base = height - 18;
  const most = Math.log1p(Math.max(...counts));
  const step = width / counts.length;
  const zero = low < 0 && high > 0 ? ((0 - low) / (high - low)) * width : null;
  const bars = counts.map((count, i) => {
    const tall = count ? Math.max(1.5, ((base - 6) * Math.log1p(count)) / most) : 0;
    const from = low + ((high - low) * i) / counts.length;
    const to = low + ((high - low) * (i + 1)) / counts.length;
    const tone = (from + to) / 2 > 0 ? "pos" : "neg";
    return s(
      "g",
      {},
      s("title", {}, `${count} tokens with c from ${number(from)} to ${number(to)}`),
      s("rect", { class: "hit", x: i * step, y: 0, width: step, height: base }),
      s("rect", { class: tone, x: i * step + 0.5, y: base - tall, width: Math.max(step - 1, 0.5), height: tall }),
    );
  });
  const label = (x, anchor, text) => s("text", { x, y: height - 4, "text-anchor": anchor }, text);
  return s(
    "svg",
    {
      class: "chart histogram",
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": "Histogram of the coefficient over the vocabulary",
    },
    bars,
    s("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }),
    zero === null
      ? null
      : [
          s("line", { class: "zero", x1: zero, x2: zero, y1: 0, y2: base }),
          zero > 40 && zero < width - 40 ? label(zero, "middle", "0") : null,
        ],
    label(0, "start", number(low)),
    label(width, "end", number(high)),
  );
}

// Lines over layers: series are [{name, values, tone}], a band is {low, high}.
export function lines(xs, series, { band, width = 340, height = 130, floor, log = false } = {}) {
  const left = 44,
    base = height - 18,
    top = 8;
  const all = [...series.flatMap((one) => one.values), ...(band ? [...band.low, ...band.high] : [])].filter(
    (v) => v !== null && Number.isFinite(v),
  );
  const scaled = log ? (v) => Math.log10(Math.max(v, 1e-12)) : (v) => v,
    back = log ? (v) => 10 ** v : (v) => v;
  let low = scaled(Math.min(...all, floor ?? Infinity)),
    high = scaled(Math.max(...all));
  if (!(high > low)) [low, high] = [low - 0.5, high + 0.5];
  const x = (i) => left + (width - left - 10) * (xs.length > 1 ? i / (xs.length - 1) : 0.5);
  const y = (v) => top + (base - top) * (1 - (scaled(v) - low) / (high - low));
  const path = (values) =>
    values
      .map((v, i) =>
        v === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`,
      )
      .join("");
  const area = band
    ? `${path(band.low)}${[...band.high]
        .map((v, i) => [v, i])
        .reverse()
        .map(([v, i]) => `L${x(i).toFixed(1)} ${y(v).toFixed(1)}`)
        .join("")}Z`
    : null;
  const every = Math.ceil(xs.length / 12);
  return s(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" },
    s("line", { class: "axis", x1: left, x2: width - 10, y1: base, y2: base }),
    [low, (low + high) / 2, high]
      .map(back)
      .map((v) => [
        s("line", { class: "grid", x1: left, x2: width - 10, y1: y(v), y2: y(v) }),
        s("text", { x: left - 6, y: y(v) + 3.5, "text-anchor": "end" }, number(v, 2)),
      ]),
    xs.map((name, i) => (i % every ? null : s("text", { x: x(i), y: height - 4, "text-anchor": "middle" }, name))),
    area ? s("path", { class: "band", d: area }) : null,
    series.map((one) => [
      s("path", { class: `line ${one.tone ?? ""}`, d: path(one.values) }),
      one.values.map((v, i) =>
        v === null
          ? null
          : s(
              "circle",
              { class: one.tone ?? "", cx: x(i), cy: y(v), r: 2 },
              s("title", {}, `${one.name}, layer ${xs[i]}: ${number(v, 4)}`),
            ),
      ),
    ]),
  );
}

export const legend = (entries) =>
  h(
    "p",
    { class: "legend" },
    entries.map(([tone, name]) => h("span", {}, h("b", { class: tone }), name)),
  );
