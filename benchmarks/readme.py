"""Write the tables of the README and of documents from the committed results; `--check` only compares them."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: dict) -> str:
    """The demo's figures as Markdown, and where they come from."""
    models = results["models"]
    labels = list(dict.fromkeys(label for figures in models.values() for label in figures))
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for label in labels:
        cells = [f"{figures[label]:,.4g}" if label in figures else "" for figures in models.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    where = results["provenance"]
    lines += ["", f"{where['cpu']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    return "\n".join(lines)


def train_table(results: dict) -> str:
    """Training speed, its bound and memory as Markdown, each model beside the dense one of its size and step."""
    entries = results["entries"]
    dense = {(entry["size"], entry["batch_tokens"]): entry for entry in entries if entry["variant"] == "dense"}
    lines = [
        "| | tokens a step | tokens/s | to dense | bounds, to dense | of its bound | FLOPs a token, to dense | "
        "of the matrix rate | peak memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        base = dense[entry["size"], entry["batch_tokens"]]
        name = {"flex3": "flex-3"}.get(entry["variant"], entry["variant"])
        cells = [
            f"{entry['size']} {name}",
            f"{entry['batch_tokens']:,}",
            f"{entry['tokens_per_s']:,.0f}",
            f"{entry['tokens_per_s'] / base['tokens_per_s']:.2f}",
            f"{entry['bound_tokens_per_s'] / base['bound_tokens_per_s']:.2f}",
            f"{entry['tokens_per_s'] / entry['bound_tokens_per_s']:.0%}",
            f"1 / {base['flops_per_token'] / entry['flops_per_token']:.2f}",
            f"{entry['mfu']:.0%}",
            f"{entry['peak_memory_bytes'] / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = results["provenance"]
    lines += ["", f"{where['gpu']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    return "\n".join(lines)


def decode_table(results: dict) -> str:
    """Decoding, its bound and memory, then prompts, as Markdown; what could not be measured is named."""
    entries = [entry for entry in results["entries"] if "error" not in entry]
    decodes = [entry for entry in entries if entry["bench"] in ("decode", "memory")]
    models = ("dense", "memory", "flex-3")
    decodes.sort(key=lambda entry: (entry["bench"], entry["batch"], models.index(entry["model"])))
    dense = {entry["batch"]: entry for entry in decodes if _is_base(entry)}
    lines = [
        "| | batch | ms/token, median | mean | tokens/s | speed, to dense | GB a step | of its bound | "
        "first token, ms | peak beyond KV cache, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in decodes:
        base = dense.get(entry["batch"])
        cells = [
            _decode_label(entry),
            f"{entry['batch']}",
            f"{entry['ms_per_token']:.3f}",
            f"{entry['mean_ms_per_token']:.3f}",
            f"{entry['tokens_per_s']:,.0f}",
            f"{base['ms_per_token'] / entry['ms_per_token']:.2f}" if base else "",
            f"{entry['step_bytes'] / 1e9:.3f}",
            f"{entry['bound_share']:.0%}",
            f"{entry['first_token_ms']:.1f}",
            f"{(entry['peak_bytes'] - entry['kv_cache_bytes']) / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for entry in entries:
        if entry["bench"] == "hugging face":
            ms = entry["ms_per_token"]
            ratio = f"{dense[1]['ms_per_token'] / ms:.3f}" if 1 in dense else ""
            lines.append(
                f"| dense, Hugging Face {entry['mode']} | 1 | {ms:.3f} | | {1e3 / ms:,.0f} | {ratio} | | | | |"
            )
    prompts = [entry for entry in entries if entry["bench"] == "prefill"]
    if prompts:
        lines += ["", f"| prompt of {prompts[0]['prompt']:,} tokens | ms | speed, to dense |", "|---|---:|---:|"]
    dense_ms = next((entry["ms"] for entry in prompts if entry["model"] == "dense"), None)
    for entry in prompts:
        ratio = f"{dense_ms / entry['ms']:.2f}" if dense_ms else ""
        lines.append(f"| {_decode_label(entry)} | {entry['ms']:.2f} | {ratio} |")
    where = results["provenance"]
    device = next((entry for entry in entries if entry["bench"] == "device"), None)
    rate = f", copies at {device['copy_bytes_per_s'] / 1e12:.2f} TB/s" if device else ""
    lines += ["", f"{where['gpu']}{rate}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    missing = [f"{entry['bench']} {entry['call']}".strip() for entry in results["entries"] if "error" in entry]
    if missing:
        lines += ["", f"Not measured in this run: {'; '.join(missing)}."]
    return "\n".join(lines)


def _is_base(entry: dict) -> bool:
    return entry["bench"] == "decode" and entry["model"] == "dense"


def _decode_label(entry: dict) -> str:
    places = {
        "none": "",
        "host": "rows in host memory",
        "device": "rows on the device",
        "disk": "rows on disk",
        "carried host": "rows and embedding in host memory",
    }
    place, _, hot = entry["rows"].partition(" + ")
    codec = ""
    if place not in places:
        codec, _, place = place.partition(" ")
    parts = [entry["model"], f"{codec} {places[place]}".strip(), "hot set" if hot else ""]
    parts += [f"{entry['cached_share_before']:.0%} of them in the page cache" if "cache" in entry else ""]
    parts += [f"int8 {entry['int8']}" if entry.get("int8") else ""]
    parts += ["prompt in small chunks" if entry["bench"] == "memory" else ""]
    return ", ".join(part for part in parts if part)


def decode_cpu_table(results: dict) -> str:
    """Decoding on a CPU, a MemoryLLM beside its dense base, as Markdown: the median over rounds."""
    rounds: dict[tuple, list[dict]] = {}
    for entry in results["entries"]:
        rounds.setdefault((entry["model"], entry["dtype"], entry["int8"], entry["rows"]), []).append(entry)
    contexts = sorted({int(key.split("_")[1]) for entry in results["entries"] for key in entry if "context_" in key})

    def median(key: tuple, context: int, of: Callable[[dict], float]) -> float:
        return statistics.median(of(entry[f"context_{context}"]) for entry in rounds[key])

    columns = [
        f"{what} at {context}" for context in contexts for what in ("ms/token", "speed, to dense,", "resident, MB,")
    ]
    heads = [*columns, "of the read rate"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for key in rounds:
        model, dtype, int8, rows = key
        places = {"disk": "rows on disk", "host": "rows in memory", "compute": "rows computed"}
        label = ["dense" if model == "base" else model, dtype, f"int8 {int8}" if int8 else "", places.get(rows, "")]
        base, cells = ("base", dtype, int8, None), []
        for context in contexts:
            ms = median(key, context, lambda figures: figures["ms_per_token"])
            dense_ms = median(base, context, lambda figures: figures["ms_per_token"]) if base in rounds else None
            resident = median(key, context, lambda figures: figures["memory"]["resident"])
            cells += [f"{ms:.2f}", f"{dense_ms / ms:.2f}" if dense_ms else "", f"{resident / 1e6:,.0f}"]
        first = contexts[0]
        moved = median(key, first, lambda figures: figures["bytes_per_token"])
        ms = median(key, first, lambda figures: figures["ms_per_token"])
        cells.append(f"{moved / results['read_bytes_s'] / ms * 1e3:.0%}")
        lines.append(f"| {', '.join(part for part in label if part)} | {' | '.join(cells)} |")
    where = results["provenance"]
    where_text = f"{where['cpu']}, {results['threads']} threads, torch {where['torch']}, commit {where['commit']}."
    return "\n".join([*lines, "", where_text])


def frontier_table(results: dict) -> str:
    """What rows in fewer bytes cost, for the model of `results` and its sibling, as Markdown."""
    models = [results, json.loads((RESULTS / "tol_frontier_mini-flex3.json").read_text())]
    figures = [{each["name"]: each for each in model["results"]} for model in models]
    heads = "".join(f" {model['model']} |" for model in models)
    lines = [f"| rows | times smaller |{heads}", f"|---|---:|{'---:|' * len(models)}"]
    runs = list(zip(*(model["runs"] for model in models), strict=True))
    marks = {name: "\\*" * number for number, (run, _) in enumerate(runs) for name in run["measured"]}
    for name, first in figures[0].items():
        rises = [f"{each[name]['rise_percent']:+.3f} ± {each[name]['stderr']:.3f}" for each in figures]
        lines.append(f"| {name}{marks[name]} | {first['times_smaller']:.2f} | {' | '.join(rises)} |")
    perplexities = " and ".join(f"{model['perplexity']:.2f}" for model in models)
    text = f"{results['tokens']:,} tokens of unseen text, perplexity {perplexities}"
    lines += ["", f"{text}; {_run_of_both(runs[0])}."]
    for run in runs[1:]:
        lines += ["", f"{marks[run[0]['measured'][0]]} Measured later, by newer code: {_run_of_both(run)}."]
    return "\n".join(lines)


def _run_of_both(run: tuple[dict, ...]) -> str:
    where = run[0]["provenance"]
    commits = " and ".join(dict.fromkeys(each["provenance"]["commit"] for each in run))
    tokens = f"{run[0]['calibration_tokens']:,} tokens of calibration"
    return f"{tokens}, {where['gpu']}, torch {where['torch']}, commit {commits}"


def coded_table(results: dict) -> str:
    """Decoding with rows in few bits beside bf16 rows of the same place, as Markdown."""
    heads = {("decode", 1): "ms/token at batch 1", ("decode", 64): "at batch 64", ("prefill", None): "prompt, ms"}
    found: dict[str, dict[tuple, float]] = {}
    for entry in results["entries"]:
        if "rows" in entry:
            ms = entry["ms" if entry["bench"] == "prefill" else "ms_per_token"]
            found.setdefault(entry["rows"], {})[entry["bench"], entry.get("batch")] = ms
    lines = [
        f"| |{''.join(f' {head} | to bf16 |' for head in heads.values())}",
        f"|---|{'---:|---:|' * len(heads)}",
    ]
    for rows in sorted(found, key=lambda rows: rows.split()[-1]):
        *codec, place = rows.split()
        cells = [f"{' '.join(codec) or 'bf16'} rows {'on the device' if place == 'device' else 'in host memory'}"]
        for key in heads:
            ms = found[rows].get(key)
            cells += [f"{ms:.3f}", f"{ms / found[place][key] - 1:+.1%}" if codec else ""] if ms else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    where = results["provenance"]
    lines += ["", f"{where['gpu']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    return "\n".join(lines)


def convert_table(results: dict) -> str:
    """Perplexities of converted models and of those beside them."""
    kinds = {"memory": "MemoryLLM", "flex3": "Flex-3"}
    rows = {
        "right after conversion": [math.exp(results["untrained"][kind]["converted"]) for kind in kinds],
        "the same, keys as they were": [math.exp(results["untrained"][kind]["copied"]) for kind in kinds],
    }
    long, short = (f"{results[name] / 1e6:.1f}M tokens" for name in ("long_tokens", "short_tokens"))
    names = {
        "distilled": f"converted, {short} by the teacher",
        "text": f"converted, {short} of text",
        "drawn": f"from scratch, {short}",
        "long": f"from scratch, {long}",
    }
    rows |= {name: [results["val_ppl"][f"{kind}-{how}"] for kind in kinds] for how, name in names.items()}
    lines = [f"| | {' | '.join(kinds.values())} |", "|---|---:|---:|"]
    lines += [f"| {name} | {' | '.join(f'{ppl:,.1f}' for ppl in values)} |" for name, values in rows.items()]
    explained = ", ".join(f"{100 * share:.0f}" for share in results["untrained"]["explained"])
    where = results["provenance"]
    return "\n".join(
        [
            *lines,
            "",
            f"The dense model: {results['val_ppl']['base-long']:.1f}. Explained by the token of what each layer's FFN "
            f"reads: {explained} %. {where['gpu']}, torch {where['torch']}, commit {where['commit']}.",
        ]
    )


def index_table(results: dict) -> str:
    """How long an index takes to build, and what it takes."""
    steps = results["steps_s"]
    layers = sum(seconds for name, seconds in steps.items() if name.startswith("layer "))
    rows = {
        "whole build, s": results["build_s"],
        "of it the lists of all layers, s": layers,
        "nearest tokens by c and by embedding, s": steps["neighbors"] + steps["embedding neighbors"],
        "matrix products of all alone, at the measured fp32 rate, s": results["products_bound_s"],
        "size, MB": results["bytes"] / 1e6,
        "largest device memory, fp32 weights included, GB": max(results["peak_device_bytes"].values()) / 1e9,
    }
    where = results["provenance"]
    lines = [
        f"| {results['preset']} | |",
        "|---|---:|",
        *(f"| {name} | {value:,.1f} |" for name, value in rows.items()),
    ]
    return "\n".join([*lines, "", f"{where['gpu']}, torch {where['torch']}, commit {where['commit']}."])


def explorer_table(results: dict) -> str:
    """How long the explorer's answers take."""
    lines = ["| answer | first, ms | p50, ms | p95, ms | kB |", "|---|---:|---:|---:|---:|"]
    for name, found in results["endpoints"].items():
        times = " | ".join(f"{found[each]:,.1f}" for each in ("first_ms", "p50_ms", "p95_ms"))
        lines.append(f"| {name} | {times} | {found['bytes'] / 1e3:,.1f} |")
    count = results.get("threads", 1)  # earlier results are of one
    threads = f"{count} thread{'s' if count > 1 else ''}"
    shape = f"V {results['vocab_size']:,}, {results['layers']} layers of {results['keys']:,} keys"
    place = results["gpu"] if results.get("device", "cpu") != "cpu" else results["cpu"]
    where = f"{place}, {threads}, load average {results['load_average']:.1f}, commit {results['commit']}"
    return "\n".join([*lines, "", f"{shape}, an index of {results['index_bytes'] / 1e6:,.0f} MB; {where}."])


DOCUMENTS: dict[str, dict[str, Callable[[dict], str]]] = {
    "README.md": {
        "demo": demo_table,
        "train": train_table,
        "decode": decode_table,
        "decode_cpu": decode_cpu_table,
        "tol_frontier_mini-memory": frontier_table,
    },
    "docs/converting.md": {"convert": convert_table},
    "docs/engine.md": {"decode_coded": coded_table},
    "docs/index-format.md": {"index": index_table},
    "docs/explorer.md": {
        "explorer-1b": explorer_table,
        "explorer-mini": explorer_table,
        "explorer-1b-model": explorer_table,
    },
}


def render(text: str, document: str = "README.md") -> str:
    """`text` with every section of `document` made anew of which there are results."""
    for name, table in DOCUMENTS[document].items():
        path = RESULTS / f"{name}.json"
        content = table(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{document} has {count} sections {name!r}"
    return text


def main() -> int:
    stale = 0
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text()
        after = render(before, document)
        if "--check" in sys.argv:
            print(f"{document} {'agrees with' if before == after else 'is not up to date with'} benchmarks/results")
            stale |= before != after
        else:
            path.write_text(after)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
