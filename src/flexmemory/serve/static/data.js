// Everything the page knows: from a live server record by record, from an export in shards of records.

export let meta = null;
export let tokens = null;

const kept = new Map();
const MOST = 400;

export class Failure extends Error {}

async function fetched(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Failure("the server does not answer; is the command still running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Failure(told?.error ?? `${path}: ${response.status} ${response.statusText}`);
  }
  return response;
}

function remembered(path, read) {
  if (!kept.has(path)) {
    const promise = fetched(path).then(read);
    promise.catch(() => kept.delete(path));
    kept.set(path, promise);
    if (kept.size > MOST) kept.delete(kept.keys().next().value);
  }
  return kept.get(path);
}

const json = (path) => remembered(path, (response) => response.json());
const bytes = (path) => remembered(path, (response) => response.arrayBuffer());

// What came from the model is another after an edit.
export function forget(prefix) {
  for (const path of kept.keys()) if (path.startsWith(prefix)) kept.delete(path);
}

export async function begin() {
  [meta, tokens] = await Promise.all([json("api/meta.json"), json("api/tokens.json")]);
}

async function record(kind, parts, size) {
  if (meta.live) return json(`api/${kind}/${parts.join("/")}`);
  const last = parts.at(-1);
  const shard = await json(`api/${kind}/${[...parts.slice(0, -1), Math.floor(last / size)].join("/")}.json`);
  const found = shard[last % size];
  if (!found) throw new Failure(`${kind} ${parts.join(" ")} does not exist`);
  return found;
}

function checkedToken(id) {
  if (!(id >= 0 && id < meta.vocab_size))
    throw new Failure(`T${id} does not exist: ids are 0 to ${meta.vocab_size - 1}`);
  return id;
}

function checkedKey(layer, key) {
  if (!meta.layers.includes(layer))
    throw new Failure(`layer ${layer} is not in the index: it has ${meta.layers.join(", ")}`);
  if (!(key >= 0 && key < meta.num_keys))
    throw new Failure(`L${layer}K${key} does not exist: a layer has ${meta.num_keys} keys`);
  return [layer, key];
}

export const token = async (id) => record("token", [checkedToken(id)], meta.shard);
export const row = async (id) => record("row", [checkedToken(id)], meta.shard);
export const key = async (layer, k) => record("key", checkedKey(layer, k), meta.shard);
export const similar = async (layer, k) => record("similar", checkedKey(layer, k), meta.shard);
export const state = async () => (await fetched("api/state")).json();
export const layers = () => json("api/layers.json");
// Of a layer its clusters, with their numbers.
export async function clusters(layer) {
  const found = (await json("api/clusters.json"))[layer];
  return (Array.isArray(found) ? found : found.clusters).map((one, label) => ({ ...one, label }));
}
export const map = async (space) => new Uint16Array(await bytes(`api/map/${space}.bin`));
export const labels = async (layer) => new Uint16Array(await bytes(`api/labels/${layer}.bin`));
export const norms = async (layer) => new Float32Array(await bytes(`api/norms/${layer}.bin`));
export const statistics = async (layer) => new Float32Array(await bytes(`api/keys/${layer}.bin`));

export async function post(verb, fields, signal) {
  const options = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(fields),
    signal,
  };
  const response = await fetched(`api/${verb}`, options).catch((error) => {
    if (signal?.aborted) return new Promise(() => {});
    throw error;
  });
  const type = response.headers.get("Content-Type") ?? "";
  return type.startsWith("application/json") ? response.json() : response.blob();
}

// How far each token's row of a layer ("-1": of any) is from ours, over the length of ours; edits change it.
export const differences = async (name, layer) =>
  new Float32Array(await (await post("diff/sizes", { with: name, layer: Number(layer) })).arrayBuffer());

export const shown = (id) => tokens.shown[id] ?? `T${id}`;
export const kind = (id) => tokens.kinds[tokens.kind[id]];
export const isKept = (id) => tokens.kept[id] === "1";

// The ids whose text or name is like what was typed: equal first, then by beginning, then containing.
export function find(query, most) {
  const name = /^T(\d+)$/i.exec(query);
  if (name && Number(name[1]) < meta.vocab_size) return [Number(name[1])];
  const wanted = query.replaceAll(" ", "␣");
  const plain = wanted.toLowerCase();
  const ranks = [[], [], [], []];
  for (let id = 0; id < tokens.shown.length; id++) {
    const text = tokens.shown[id];
    const low = text.toLowerCase();
    if (!low.includes(plain)) continue;
    const bare = low.startsWith("␣") && !plain.startsWith("␣") ? low.slice(1) : low;
    const rank =
      text === wanted || (bare === plain && bare !== low && text.slice(1) === wanted)
        ? 0
        : bare === plain
          ? 1
          : bare.startsWith(plain)
            ? 2
            : 3;
    ranks[rank].push(id);
    if (rank === 0 && ranks[0].length >= most) break;
  }
  ranks[2].sort((a, b) => tokens.shown[a].length - tokens.shown[b].length || a - b);
  return ranks.flat().slice(0, most);
}
