"""What the study is run on: sizes, texts and tasks, and how a model is judged.

Every script of this package takes a `Study` and writes one JSON of `Results`, entry by entry, so that it goes on where
it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from flexmemory.engine.reference import RowSource
from flexmemory.evaluate.gain import block_means, graded
from flexmemory.evaluate.perplexity import perplexity
from flexmemory.evaluate.tasks import EncodedTasks, load_task, score_tasks
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.provenance import provenance
from flexmemory.reproduce.deal import deal
from flexmemory.reproduce.runs import ABLATIONS, Run, Size, best_rate, outcome, reference_runs, sweep, trained
from flexmemory.storage import read_json, write_json
from flexmemory.train.data import TokenDataset

TASKS = ("lambada_openai", "arc_easy", "sciq", "social_iqa", "hellaswag", "winogrande", "boolq", "piqa")
"""The paper's eight tasks; where it says "SiQA" both SciQ and SocialIQA stand. The first four are its recall tasks."""
RECALL = TASKS[:4]
BATCH_SIZE = 64
"""Windows in one forward pass."""
BLOCKS = 40
"""Of a task's documents, whose mean gains are kept."""

FULL = (
    Size(
        family="mini", tokens=65_536_000, lrs=(1.5e-3, 3e-3, 6e-3), seeds=2, ablations=ABLATIONS, budgets=(0.5, 2.0)
    ),
    Size(
        family="small", tokens=65_536_000, lrs=(7.5e-4, 1.5e-3, 3e-3),
        ablations=("base-as-memory", "base-as-flex3"),
    ),
)  # fmt: skip
"""6.3 and 21 million parameters beside embedding and head."""
QUICK = (
    Size(
        family="nano", tokens=8192, lrs=(3e-3, 6e-3), ablations=("table", "base-as-memory"),
        seq_len=256, batch_tokens=1024, micro_batch_size=4, warmup_steps=4, lr_final=3e-4, validations=1,
    ),
)  # fmt: skip
"""To see that everything runs: nothing is learnt from its numbers."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Where everything is, and how much of it to do."""

    work: Path
    """Folder of data and runs (`reproduce.runs`)."""
    results: Path
    """Folder of the JSON files."""
    sizes: tuple[Size, ...]
    tasks: Path | None = None
    """Folder of task files; without it models are judged by perplexity alone."""
    task_limit: int | None = None
    """Documents of each task, at most."""
    devices: tuple[str, ...] = ("cpu",)
    at_once: int = 1
    """Models trained or measured at the same time on each device."""
    quick: bool = False
    models: tuple[Path, ...] = ()
    """Checkpoints from elsewhere with the same tokenizer, to be probed too."""

    @property
    def device(self) -> str:
        """That of what is done alone."""
        return self.devices[0]

    @functools.cached_property
    def train_data(self) -> TokenDataset:
        """What models were trained on."""
        return TokenDataset.open(self.work / "data" / "train")

    def wanted(self, size: Size) -> list[Run]:
        """All reference runs of a size; those of equal time once `speed` was measured.

        Raises:
            FileNotFoundError: the sweep was not run.
        """
        entries = Results(self, "speed").entries
        speed = {entry["variant"]: entry["tokens_per_s"] for entry in entries.values() if entry["size"] == size.family}
        return reference_runs(size, lr=best_rate(size, self.work), speed=speed)

    def runs(self, size: Size) -> list[Run]:
        """All of a size that were trained to their end, those of the sweep too."""
        return trained(list(dict.fromkeys([*sweep(size), *self.wanted(size)])), self.work)

    def run(self, size: Size, variant: str) -> Run:
        """The reference run of a variant: seed 0, at the size's tokens and learning rate.

        Raises:
            FileNotFoundError: it was not trained.
        """
        lr = best_rate(size, self.work)
        run = Run(size=size, variant=variant, tokens=size.tokens, lr=lr)
        outcome(run, self.work)
        return run

    def checkpoint(self, run: Run) -> Checkpoint:
        """Of a run, opened."""
        return Checkpoint.open(self.work / "runs" / run.name)

    def load(self, run: Run) -> Transformer:
        """Its model, in fp32 on the study's device."""
        return self.checkpoint(run).load(device=self.device, dtype=torch.float32).requires_grad_(False)

    @functools.cached_property
    def judge(self) -> Judge:
        """Texts and tasks, read once."""
        return Judge(self)

    def calibration(self, seq_len: int, *, tokens: int) -> Int64[Tensor, "N T"]:
        """Windows of the training text, evenly spread over it."""
        stream = self.train_data.train
        count = stream.num_windows(seq_len)
        wanted = min(count, max(1, tokens // seq_len))
        windows = [stream.window(count * i // wanted, seq_len=seq_len) for i in range(wanted)]
        return torch.stack([torch.from_numpy(window) for window in windows])[:, :-1]


class Judge:
    """Texts that no model was trained on, and tasks, in the study's tokens."""

    def __init__(self, study: Study) -> None:
        """Read them."""
        self.streams: dict[str, tuple[Any, int]] = {}
        others = [folder for folder in sorted((study.work / "data").iterdir()) if folder.name != "train"]
        texts = {folder.name: TokenDataset.open(folder).train for folder in others}
        if "held-out" not in texts and study.train_data.validation is not None:
            texts["held-out"] = study.train_data.validation
        for name, tokens in texts.items():
            self.streams[name] = (tokens.read(0, len(tokens)), tokens.num_bytes)
        self.encoded: EncodedTasks | None = None
        if study.tasks is not None:
            tasks = [load_task(name, study.tasks, limit=study.task_limit) for name in TASKS]
            longest = min(size.seq_len for size in study.sizes)
            encoded = EncodedTasks.of([*tasks, *map(graded, tasks)], study.train_data.tokenizer(), max_len=longest)
            self.encoded = dataclasses.replace(
                encoded, continuations=encoded.continuations.to(torch.device(study.device))
            )

    @torch.inference_mode()
    def __call__(
        self, model: Transformer, row_source: RowSource | None = None, *, tasks: bool = True
    ) -> dict[str, Any]:
        """Of each text nats a token with its standard error and bits a byte; of each task all metrics and its gain."""
        found: dict[str, Any] = {"texts": {}, "tasks": {}}
        for name, (stream, num_bytes) in self.streams.items():
            result = perplexity(model, stream, batch_size=BATCH_SIZE, row_source=row_source, num_bytes=num_bytes)
            found["texts"][name] = {
                "nats": result.loss,
                "stderr": result.stderr,
                "perplexity": result.perplexity,
                "perplexity_stderr": result.perplexity_stderr,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.num_tokens,
            }
        if tasks and self.encoded is not None:
            # Texts in fp32, as differences are small there; tasks in the precision of training.
            with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
                scores = score_tasks(model, self.encoded, row_source=row_source)
            for name in TASKS:
                score, gain = scores[name], scores[f"{name} gain"]
                found["tasks"][name] = {
                    "documents": score.num_documents,
                    "metrics": score.to_json()["metrics"],
                    "gain": gain.to_json()["metrics"]["gain"] | {"blocks": block_means(gain, "gain", count=BLOCKS)},
                }
        return found


class Results:
    """One JSON of entries by name; what is there is not made again."""

    def __init__(self, study: Study, name: str) -> None:
        """Open `NAME.json` of the study's results, or begin it."""
        self.path = study.results / f"{name}.json"
        found = read_json(self.path) if self.path.exists() else {}
        self.entries: dict[str, Any] = found.get("entries", {})
        self.provenance: list[dict[str, str]] = found.get("provenance", [])
        """Of all entries: machines and commits."""

    def entry(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry called `name`, made and written unless it is there."""
        if name not in self.entries:
            logger.info("%s: %s", self.path.stem, name)
            self.entries[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (here := provenance()) not in self.provenance:
                self.provenance.append(here)
            write_json(self.path, {"provenance": self.provenance, "entries": self.entries})
        return self.entries[name]


Job = Callable[[Study], dict[str, Any]]
"""What makes an entry."""


def fill(study: Study, parts: Mapping[str, Mapping[str, Job]]) -> None:
    """Make the entries of some parts, by part and name, that are not there; on all devices, several at once.

    Raises:
        RuntimeError: some could not be made; the others were.
    """
    results = {part: Results(study, part) for part in parts}
    plain = dataclasses.replace(study)  # without the data that it has read
    left = {
        f"{part}/{name}": functools.partial(_made, plain, job)
        for part, jobs in parts.items()
        for name, job in jobs.items()
        if name not in results[part].entries
    }
    dealt = deal(left, devices=study.devices, at_once=study.at_once)
    for key, entry in tqdm(dealt, desc="measuring", total=len(left)):
        part, _, name = key.partition("/")
        results[part].entry(name, lambda entry=entry: entry)


def _made(study: Study, job: Job, device: str) -> dict[str, Any]:
    return job(_on(study, device))


@functools.lru_cache(maxsize=1)
def _on(study: Study, device: str) -> Study:
    """The study on one device; kept, as what it reads takes longer than a measurement."""
    return dataclasses.replace(study, devices=(device,))


def reference(study: Study, variants: Sequence[str]) -> Iterator[tuple[Size, Run]]:
    """The reference runs of some variants at every size, where they were trained."""
    for size in study.sizes:
        for variant in variants:
            try:
                yield size, study.run(size, variant)
            except FileNotFoundError:
                logger.warning("%s-%s was not trained", size.family, variant)
