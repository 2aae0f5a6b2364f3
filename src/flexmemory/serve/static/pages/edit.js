// The edit bench: choose an edit, see exactly who else moves and what the model then says, apply it, save it, take it back.
import * as data from "../data.js";
import { choice, h, keyLink, needsServer, panel, problem, token, whole } from "../dom.js";
import { announce, note } from "../nav.js";
import { goesOn, report } from "../report.js";

// What each edit needs, and what it does to whom.
const EDITS = {
  scale_row: [
    "Scale a row",
    ["token", "layer", "factor"],
    "One token's row, times a factor; 0 removes it. No other token's row changes by a bit.",
  ],
  copy_row: [
    "Copy a row",
    ["token", "other", "layer"],
    "The token gets the row of another. No third token's row changes.",
  ],
  swap_rows: ["Swap two rows", ["token", "other", "layer"], "Two tokens exchange their rows."],
  steer_row: [
    "Steer a row",
    ["token", "other", "layer", "strength"],
    "Adds to the row what raises another token's logit; strength is in lengths of the row.",
  ],
  rank_one: [
    "Steer through W_down",
    ["token", "other", "layer", "strength"],
    "The same change of the row, made by the rank-one change of W_down that moves other rows least (exact second moment): others do move.",
  ],
  scale_value: [
    "Scale a value",
    ["key", "factor"],
    "What one cell adds, times a factor, for every token that uses it.",
  ],
  scale_key: ["Scale a key", ["key", "factor"], "One cell's coefficient, times a factor, for every token."],
  scale_key_for: [
    "Scale a key for a token",
    ["key", "token", "factor"],
    "One cell's coefficient, in one token's row alone.",
  ],
  suppress: [
    "Suppress tokens",
    ["tokens", "level", "layer", "strength", "count"],
    "Lowers the values (for all tokens) or rows that most promote some tokens.",
  ],
  patch: ["Load a patch", ["patch"], "What a patch file of this checkpoint does; drop one here, or choose it."],
};
const FIELDS = {
  token: ["token", "text"],
  other: ["other token", "text"],
  tokens: ["tokens", "text"],
  key: ["key", "text"],
  factor: ["factor", "number"],
  strength: ["strength", "number"],
  count: ["at most", "number"],
};
const DEFAULTS = {
  factor: "0",
  strength: "1",
  count: "64",
  layer: "-1",
  level: "values",
  text: "The city of London is",
  length: "24",
};

export async function draw(box, _, params) {
  if (!data.meta.live) return void box.append(needsServer());
  if (!data.meta.can_scale)
    throw new data.Failure(
      "a dense model has no rows to edit: its FFN reads the residual stream, so no token has one output",
    );
  const now = await data.state();
  const patches = now.patches;
  const state = { ...DEFAULTS, ...params };
  if (!(state.op in EDITS)) state.op = params.key ? "scale_value" : "steer_row";
  if (state.token === undefined) state.token = String(data.find("␣London", 1)[0] ?? 1);
  if (/^\d+$/.test(state.token)) state.token = `T${state.token}`;
  state.other ??= "";
  const form = h("div", { class: "form" }),
    result = h("div", { class: "stack" }),
    bench = h("div");
  const save = () =>
    note(
      "edit",
      Object.fromEntries(
        ["op", "layer", "level", "text", "length", ...EDITS[state.op][1]].map((name) => [
          name,
          state[name] === DEFAULTS[name] ? null : state[name],
        ]),
      ),
    );
  // What is asked: a file, a patch that the server knows, or steps.
  let file = null;
  const asked = () => {
    if (state.op !== "patch") return { steps: [stepOf(state)] };
    if (state.patch) return { patch: state.patch };
    if (!file) throw new data.Failure("no patch was chosen");
    return { file: file.content, name: file.name };
  };
  const load = (given) =>
    attempt(async () => {
      if (given.size > now.max_patch_bytes)
        throw new data.Failure(
          `${given.name} has ${whole(given.size)} bytes; at most ${whole(now.max_patch_bytes)} are taken`,
        );
      if (!given.size) throw new data.Failure(`${given.name} is empty`);
      file = { name: given.name, size: given.size, content: await inBase64(given) };
      Object.assign(state, { op: "patch", patch: "" });
      save();
      draft();
      await preview();
    });

  const draft = () => {
    const [, fields, what] = EDITS[state.op];
    const one = (name) => {
      if (name === "layer")
        return choice(
          "layer",
          [["-1", "all"], ...data.meta.layers.map((layer) => [layer, layer])],
          state.layer,
          (value) => {
            state.layer = value;
            save();
          },
        );
      if (name === "level")
        return choice(
          "lower",
          [
            ["values", "values"],
            ["rows", "rows"],
          ],
          state.level,
          (value) => {
            state.level = value;
            save();
          },
        );
      if (name === "patch")
        return h(
          "div",
          { class: "line" },
          patches.length
            ? choice("patch", [["", "a file"], ...patches.map((one) => [one, one])], state.patch ?? "", (value) => {
                state.patch = value;
                save();
                draft();
                if (value) preview();
              })
            : null,
          state.patch
            ? null
            : [
                h(
                  "label",
                  { class: "field" },
                  h("span", {}, "file"),
                  h("input", {
                    type: "file",
                    id: "patchfile",
                    accept: ".safetensors",
                    onchange: (event) => event.target.files.length && load(event.target.files[0]),
                  }),
                ),
                file ? h("span", { class: "told" }, `${file.name}, ${whole(file.size)} bytes`) : null,
              ],
        );
      const [label, type] = FIELDS[name];
      const told = h("span", { class: "told" });
      const tell = () => told.replaceChildren(...read(name, state[name] ?? ""));
      const input = h("input", {
        type,
        step: "any",
        value: state[name] ?? "",
        placeholder:
          name === "key" ? "L3K12" : name === "tokens" ? "T12 T13, or words" : type === "text" ? "T512 or a word" : "",
        oninput: () => {
          state[name] = input.value;
          tell();
          save();
        },
      });
      tell();
      return h("div", { class: "line" }, h("label", { class: "field" }, h("span", {}, label), input), told);
    };
    form.replaceChildren(
      choice(
        "edit",
        Object.entries(EDITS).map(([op, [label]]) => [op, label]),
        state.op,
        (op) => {
          state.op = op;
          save();
          draft();
        },
      ),
      h("p", { class: "hint" }, what),
      ...fields.map(one),
      h("div", { class: "line" }, prompt, ...[lengthField]),
      h(
        "div",
        { class: "actions" },
        h("button", { type: "button", class: "main", id: "preview", onclick: preview }, "Preview"),
        h("button", { type: "button", id: "apply", onclick: apply }, "Apply in memory"),
      ),
    );
  };
  const prompt = h(
    "label",
    { class: "field tall" },
    h("span", {}, "try on"),
    h("textarea", {
      rows: 2,
      spellcheck: false,
      oninput: (event) => {
        state.text = event.target.value;
        save();
      },
    }),
  );
  prompt.querySelector("textarea").value = state.text;
  const lengthField = choice(
    "go on for",
    [
      ["0", "no tokens"],
      ["24", "24 tokens"],
      ["48", "48 tokens"],
    ],
    state.length,
    (value) => {
      state.length = value;
      save();
    },
  );

  const attempt = async (act) => {
    try {
      await act();
    } catch (error) {
      if (!(error instanceof data.Failure)) console.error(error);
      result.replaceChildren(problem(error));
    }
  };
  const preview = () =>
    attempt(async () => {
      const what = { ...asked(), text: state.text };
      result.replaceChildren(h("p", { class: "loading" }, "Computing every row that moves …"));
      const found = await data.post("edit/preview", what);
      const count = Number(state.length);
      const ahead = count ? h("p", { class: "loading" }, "Going on …") : null;
      result.replaceChildren(...report(found, ahead));
      if (count)
        ahead.replaceWith(goesOn((await data.post("edit/continued", { ...what, max_new_tokens: count })).continued));
    });
  const apply = () => attempt(async () => changed(await data.post("edit/apply", asked())));
  const changed = (state) => {
    data.forget("api/row/");
    data.forget("api/similar/");
    announce(state);
    applied(state);
  };
  const applied = ({ applied: patches }) =>
    bench.replaceChildren(
      panel(
        "Applied in memory",
        patches.length ? "the model that answers on Prompt and here" : "",
        patches.length
          ? [
              h(
                "ol",
                { class: "patches" },
                patches.map(({ what, bytes }) =>
                  h(
                    "li",
                    {},
                    what.slice(0, 2).join("; "),
                    what.length > 2 ? ` and ${what.length - 2} more` : "",
                    h("small", {}, ` ${whole(bytes)} bytes`),
                  ),
                ),
              ),
              h(
                "div",
                { class: "actions" },
                h(
                  "button",
                  {
                    type: "button",
                    id: "revert",
                    onclick: () => attempt(async () => changed(await data.post("edit/revert", { count: 1 }))),
                  },
                  "Take back the last",
                ),
                h(
                  "button",
                  {
                    type: "button",
                    onclick: () =>
                      attempt(async () => changed(await data.post("edit/revert", { count: patches.length }))),
                  },
                  "Take back all",
                ),
                h("button", { type: "button", onclick: () => attempt(saved) }, "Save as a patch"),
              ),
            ]
          : h("p", { class: "hint" }, "Nothing. The model is the checkpoint's, bit for bit."),
      ),
    );

  draft();
  applied(now);
  result.append(
    h(
      "p",
      { class: "hint" },
      "A preview tells how far every token's row would move, exactly, before anything is applied.",
    ),
  );
  box.append(
    h(
      "div",
      { class: "grid bench" },
      h(
        "div",
        { class: "stack" },
        panel("Edit", "", form),
        bench,
        h(
          "p",
          { class: "limits" },
          "An edit is of a token, in all its contexts: not of a person or place. " +
            "Words of several tokens share them with other words. Claims hold for the rows; what attention makes of a changed row at later positions is in the text that the model goes on with, not in the report.",
        ),
      ),
      result,
    ),
  );
  box.addEventListener("dragover", (event) => event.preventDefault());
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) load(event.dataTransfer.files[0]);
  });
  if (state.op === "patch" && state.patch) preview();
}

const inBase64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new data.Failure(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });

function idOf(typed) {
  const wanted = typed.trim();
  const id = /^T?\d+$/i.test(wanted) ? Number(wanted.replace(/^T/i, "")) : (data.find(wanted, 1)[0] ?? NaN);
  if (!(id >= 0 && id < data.meta.vocab_size)) throw new data.Failure(`there is no token ${typed || "given"}`);
  return id;
}

function keyOf(typed) {
  const found = /^L(\d+)K(\d+)$/i.exec((typed ?? "").trim());
  if (!found) throw new data.Failure(`a key is written L3K12, got ${typed || "nothing"}`);
  return { layer: Number(found[1]), key: Number(found[2]) };
}

const idsOf = (typed) =>
  typed
    .split(/[\s,]+/)
    .filter(Boolean)
    .map(idOf);

function stepOf(state) {
  const step = { op: state.op };
  for (const name of EDITS[state.op][1]) {
    if (name === "key") Object.assign(step, keyOf(state.key));
    else if (name === "tokens") step.tokens = idsOf(state.tokens ?? "");
    else if (name === "token" || name === "other") step[name] = idOf(state[name] ?? "");
    else if (name === "level") step.level = state.level;
    else step[name] = Number(state[name]);
  }
  return step;
}

// What a field means, beside it.
function read(name, typed) {
  try {
    if (name === "token" || name === "other") return [token(idOf(typed)), " "];
    if (name === "tokens") return idsOf(typed).map((id) => token(id));
    if (name === "key") {
      const { layer, key } = keyOf(typed);
      return [keyLink(layer, key)];
    }
  } catch {
    return typed ? [h("small", { class: "warning" }, "not found")] : [];
  }
  return [];
}

async function saved() {
  const file = await data.post("edit/patch", {});
  const address = URL.createObjectURL(file);
  h("a", { href: address, download: `${data.meta.name}.patch.safetensors` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
