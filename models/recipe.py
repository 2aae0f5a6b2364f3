"""Train, measure and export the models of this folder: mini-memory and mini-flex3.

    python models/recipe.py --corpus FILE... --held-out FILE --work DIR [--wikitext FILE]

Everything is made in DIR, and what is there already is not made again; the models and figures come to lie beside this
file. Both models are trained at once, as neither fills a GPU. Takes about ten minutes on one H200.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.storage import atomic_folder, read_json, write_json

HERE = Path(__file__).parent
MODELS = ("mini-memory", "mini-flex3")
VOCAB_SIZE = 8192


def flexmemory(*command: str | Path) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-m", "flexmemory", *map(str, command)]


def main() -> None:
    """Do what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, help="files of documents to train on")
    parser.add_argument("--held-out", required=True, help="documents of the same kinds to measure on")
    parser.add_argument("--wikitext", help="WikiText-2, raw test split")
    parser.add_argument("--tasks", type=Path, help="folder of task files (docs/evaluating.md) to score the models on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", help="a tokenizer.json to use instead of training one")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("train_options", nargs="*", help="after --: options of `flexmemory train` for both")
    options = parser.parse_args()
    data = options.work / "data"
    if not data.exists():
        tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else ["--vocab-size", str(VOCAB_SIZE)]
        command = ("prepare", *options.corpus, *tokenizer, "--val-fraction", "0.002", "--out", data)
        subprocess.run(flexmemory(*command), check=True)
    runs = {name: options.work / name for name in MODELS}
    training = []
    for name, run in runs.items():
        resume = ["--resume"] if (run / "checkpoints").exists() else []
        command = ("train", name, "--data", data, "--out", run, *options.train_options, *resume)
        training.append(subprocess.Popen(flexmemory(*command)))
    codes = [process.wait() for process in training]
    if any(codes):
        sys.exit("training did not end well; run this again to go on")
    texts = {"held-out": options.held_out} | ({"WikiText-2": options.wikitext} if options.wikitext else {})
    figures = {name: measure(run, texts, options.tasks) for name, run in runs.items()}
    for name, run in runs.items():
        export(run, options.out / name)
    subprocess.run(flexmemory("plot", *runs.values(), "--out", options.out / "losses.png"), check=True)
    write_json(options.out / "figures.json", figures)


def measure(run: Path, texts: dict[str, str], tasks: Path | None) -> dict[str, object]:
    """What the model card says of a run, in the precision in which it is exported."""
    config, checkpoint = read_json(run / "config.json"), Checkpoint.open(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens_per_s" in line]
    figures: dict[str, object] = {
        "parameters": count_parameters(checkpoint.config).total,
        "resident parameters": count_parameters(checkpoint.config).resident,
        "tokens": logged[-1]["tokens"],
        "training loss": logged[-1]["ce"],
        "training seconds": logged[-1]["train_s"],
        "train": config["train"],
        "provenance": config["provenance"],
    }
    for label, text in texts.items():
        command = flexmemory("eval", "ppl", run, "--data", text, "--dtype", "bf16")
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[label] = re.sub(r"\s+", " ", said).strip()
    if tasks is not None:
        out = run / "tasks.json"
        command = flexmemory("eval", "tasks", run, "--data", tasks, "--dtype", "fp32", "--out", out)
        subprocess.run(command, check=True)
        scores = read_json(out)["tasks"]
        figures["tasks"] = {
            name: {key: score[key] for key in ("documents", "metrics")} for name, score in scores.items()
        }
    return figures


def export(run: Path, folder: Path) -> None:
    """The newest checkpoint of `run` in bf16, as `folder`."""
    checkpoint = Checkpoint.open(run)
    if folder.exists():
        shutil.rmtree(folder)
    with atomic_folder(folder) as partial:
        save_checkpoint(partial, checkpoint.load(dtype=torch.bfloat16), checkpoint.tokenizer())


if __name__ == "__main__":
    main()
