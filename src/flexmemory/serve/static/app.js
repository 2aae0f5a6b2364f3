// Starts the page and leads to what an address names.
import * as data from "./data.js";
import { h, problem, whole } from "./dom.js";
import { announce } from "./nav.js";
import { search } from "./search.js";

const PAGES = [
  ["map", "Map"],
  ["clusters", "Clusters"],
  ["layers", "Layers"],
  ["prompt", "Prompt"],
  ["edit", "Edit"],
  ["diff", "Diff"],
];
const main = document.getElementById("main");
let leave = null;
let visit = 0;

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const params = Object.fromEntries(new URLSearchParams(query));
  const parts = decodeURIComponent(path).split("/").filter(Boolean);
  const first = parts[0] ?? "";
  if (/^T\d+$/i.test(first)) return ["token", [Number(first.slice(1))], params];
  const key = /^L(\d+)K(\d+)$/i.exec(first);
  if (key) return ["key", [Number(key[1]), Number(key[2])], params];
  if (!first) return [data.meta.spaces.length ? "map" : "layers", [], params];
  return [first, parts.slice(1), params];
}

async function show() {
  const mine = ++visit;
  const [name, args, params] = route();
  for (const link of document.querySelectorAll("#nav a"))
    link.setAttribute("aria-current", link.dataset.page === name ? "page" : "false");
  const box = h("div", { class: `page page-${name}` });
  let ended = null;
  try {
    if (![...PAGES.map(([page]) => page), "token", "key"].includes(name))
      throw new data.Failure(`there is no page ${name}`);
    const page = await import(`./pages/${name}.js`);
    ended = await page.draw(box, args, params);
  } catch (error) {
    if (!(error instanceof data.Failure)) console.error(error);
    box.replaceChildren(problem(error));
  }
  if (mine !== visit) {
    ended?.();
    return;
  }
  leave?.();
  leave = ended ?? null;
  main.replaceChildren(box);
  box.dispatchEvent(new Event("shown"));
  document.title = `${box.dataset.title ?? PAGES.find(([page]) => page === name)?.[1] ?? ""} · ${data.meta.name}`;
  if (box.dataset.keep === undefined) scrollTo(0, 0);
}

function footer() {
  const { mask, vocab_size, counts, fingerprint } = data.meta;
  const lost = vocab_size - mask.tokens;
  document
    .getElementById("footer")
    .replaceChildren(
      h(
        "span",
        {},
        h("strong", {}, `exact over ${whole(mask.tokens)} of ${whole(vocab_size)} tokens`),
        lost ? ` · lists leave out ${whole(lost)}: ${mask.rule}` : " · none left out",
      ),
      h(
        "span",
        { class: "right" },
        data.meta.live ? "live" : "export",
        counts ? ` · counts of ${whole(counts.total)} tokens` : "",
        " · ",
        h("code", { title: fingerprint }, fingerprint.slice(0, 12)),
      ),
    );
}

function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("flexmemory-theme", next);
  dispatchEvent(new Event("themechange"));
}

async function start() {
  document.getElementById("theme").addEventListener("click", switchTheme);
  try {
    await data.begin();
  } catch (error) {
    main.replaceChildren(problem(error));
    return;
  }
  document.getElementById("model-name").textContent = data.meta.name;
  document
    .getElementById("nav")
    .replaceChildren(...PAGES.map(([page, label]) => h("a", { href: `#/${page}`, "data-page": page }, label)));
  footer();
  search(document.getElementById("search"), document.getElementById("found"));
  if (data.meta.live) data.state().then(announce);
  addEventListener("hashchange", show);
  await show();
}

start();
