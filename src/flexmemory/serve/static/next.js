// What the model expects next, before and after something: a bar for after, a mark for before.
import { h, percent, token } from "./dom.js";

const SMALL = 5e-4;

// rows are [token, probability before, after]; names head the two columns.
export function expectations(rows, names, { chosen, choose } = {}) {
  const most = Math.max(...rows.flatMap(([, before, after]) => [before, after]));
  const width = (share) => `${(100 * share) / most}%`;
  const line = ([id, before, after]) => {
    const change = after - before;
    const told = Math.abs(change) < SMALL ? "" : `${change > 0 ? "+" : "−"}${percent(Math.abs(change))}`;
    const bar = h("span", { class: "bar plain" });
    bar.append(h("b", { style: { left: "0", width: width(after) } }));
    bar.append(h("i", { class: "was", style: { left: width(before) } }));
    const onclick = choose && ((event) => event.target.closest("a") ?? choose(id));
    return h("tr", { class: id === chosen ? "chosen" : "", onclick }, [
      h("td", {}, token(id)),
      h("td", { class: "num" }, percent(before)),
      h("td", { class: "wide" }, bar),
      h("td", { class: "num" }, percent(after)),
      h("td", { class: `num ${change > 0 ? "pos" : "neg"}` }, told),
    ]);
  };
  const heads = ["", names[0], "", names[1], ""].map((name, i) => h("th", { class: i ? "num" : "" }, name));
  return h("table", { class: "next" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows.map(line)));
}
