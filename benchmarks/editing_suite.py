"""What `benchmarks/editing.py` measures of one model, section by section; figures as JSON values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flexmemory.evaluate.edit_locality import TextWindows, logits_of, text_effect
from flexmemory.evaluate.edit_methods import (
    DENSE,
    PROTECTED,
    ROWS,
    WEIGHTS,
    Change,
    Method,
    Setting,
    Workbench,
    changed,
    down_weight,
    fine_tuned,
    joint,
    rank_one,
    row_gradient,
    weight_change,
)
from flexmemory.evaluate.edit_search import Search, fine_tune
from flexmemory.evaluate.editing import Case, Scores, Summary, make_case, score, summarise
from flexmemory.evaluate.questions import Questions
from flexmemory.interpret.patch import Patch, stack
from flexmemory.interpret.spill import spill
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts

GROUP = 50
"""Facts whose vectors are searched for at once."""
CHECKPOINTS = (1, 10, 100, 1000)
LIMITS = (0.1, 0.3, 1.0)
"""Of FT-L, in units of the root mean square of W_down."""
WINDOW = 128


class Suite:
    """A trained model, its facts, and text."""

    def __init__(self, work: Path, variant: str, *, device: torch.device, per_kind: int, dev: int) -> None:
        checkpoint = Checkpoint.open(work / variant)
        self.work, self.variant, self.fingerprint = work, variant, checkpoint.fingerprint
        self._settings: dict[str, Setting] | None = None
        self.model = checkpoint.load(device=device, dtype=torch.float32).requires_grad_(False)
        self.tokenizer = checkpoint.tokenizer()
        self.device = device
        english, facts = (TokenDataset.open(work / name).train for name in ("english", "facts"))
        vocab_size = self.model.config.vocab_size
        self.counts = sum(token_counts(stream, vocab_size=vocab_size) for stream in (english, facts))
        length = self.model.config.max_seq_len
        sample = torch.from_numpy(english.read(0, min(len(english), 200 * length)))
        held_out = TokenDataset.open(work / "held-out").train
        self.held_out = torch.from_numpy(held_out.read(0, len(held_out)))
        starts = [(), (100, 5), (200, 10)]
        contexts = [tuple(sample[s[0] : s[0] + s[1]].tolist()) if s else () for s in starts]
        self.bench = Workbench(
            self.model,
            self.tokenizer,
            contexts=contexts,
            counts=self.counts,
            text=sample[: len(sample) // length * length].view(-1, length).to(device),
        )
        records = [json.loads(line) for line in (work / "kb" / "records.jsonl").read_text().splitlines()]
        self.cases = [make_case(record, self.tokenizer, device=device) for record in records]
        asked = Questions.of(
            [case.prompt for case in self.cases], boundary_id=self.tokenizer.boundary_id, device=device
        )
        with torch.no_grad():
            said = asked.log_probs(self.model).argmax(dim=1).tolist()
        known = [case for case, answer in zip(self.cases, said, strict=True) if answer == case.true]
        by_kind = [_spread([c for c in known if len(c.subject) == n]) for n in (1, 2)]
        self.known = dict(zip((1, 2), by_kind, strict=True))
        self.dev = [case for cases in by_kind for case in cases[:dev]]
        self.test = [case for cases in by_kind for case in cases[dev : dev + per_kind]]

    @property
    def is_dense(self) -> bool:
        return not self.model.config.has_memory

    def knowledge(self) -> dict[str, Any]:
        """What the model knows before any edit."""
        scores = [score(self.model, case) for case in tqdm(self.cases, desc="knowledge", leave=False, disable=None)]
        return summarised_by_kind(self.cases, scores)

    # -- settings ---------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Setting]:
        """Of every method, as `chosen` found them."""
        if self._settings is None:
            found = json.loads((self.work / "results" / f"{self.variant}-settings.json").read_text())["found"]
            self._settings = {
                name: Setting(
                    layers=tuple(each["layers"]),
                    limit=each["limit"],
                    search=PROTECTED if "protected" in name else Search(),
                )
                for name, each in found.items()
            }
        return self._settings

    def chosen(self) -> dict[str, Any]:
        """The setting of every method, chosen on the development facts: the layer, and the limit of FT-L.

        The best has the largest harmonic mean of ES, PS, NS and the share of the subject's other facts that stay.
        """
        depth = self.model.config.num_layers
        rows = [] if self.is_dense else [Setting(layers=(layer,)) for layer in range(depth)]
        row = self._best(row_gradient, rows) if rows else None
        one = self._best(rank_one, [Setting(layers=(layer,)) for layer in range(depth)])
        places = dict.fromkeys((0, depth // 2, depth - 1, one.layers[0]))
        tuned = self._best(
            fine_tuned,
            [Setting(layers=(layer,), limit=limit * self._scale(layer)) for layer in places for limit in LIMITS],
        )

        def four(setting: Setting) -> Setting:
            first = max(0, min(setting.layers[0] - 1, depth - 4))
            return dataclasses.replace(setting, layers=tuple(range(first, min(first + 4, depth))))

        found = {}
        for name in DENSE if self.is_dense else (*ROWS, *WEIGHTS):
            base = tuned if name == "FT-L" else row if name in ROWS else one
            assert base is not None
            base = four(base) if "4 layers" in name else base
            found[name] = {"layers": base.layers, "limit": base.limit}
        return found

    def _best(self, method: Method, settings: Sequence[Setting]) -> Setting:
        def merit(setting: Setting) -> float:
            means = summarise(self.edited(method, self.dev, setting)).means
            rates = [means.get(name, 1.0) for name in ("ES", "PS", "NS", "same_subject_right")]
            return 4 / sum(1 / max(rate, 1e-3) for rate in rates)

        return max(tqdm(settings, desc=f"settings of {method.__name__}", leave=False, disable=None), key=merit)

    def _scale(self, layer: int) -> float:
        weight = down_weight(self.model, layer) if self.is_dense else TokenMemory(self.model).values(layer)
        return float(weight.square().mean().sqrt())

    def edited(self, method: Method, cases: Sequence[Case], setting: Setting) -> list[Scores]:
        """Each fact edited alone, and asked about."""
        found = []
        for group in groups_of(cases, GROUP):
            for case, change in zip(group, method(self.bench, group, setting), strict=True):
                with changed(self.model, change) as model:
                    found.append(score(model, case))
        return found

    # -- single edits ------------------------------------------------------------------------------------------------

    def edits(self) -> dict[str, Any]:
        """Every method on the test facts, one edit at a time."""
        settings = self.settings()
        windows = TextWindows(self.held_out, length=min(WINDOW, self.model.config.max_seq_len), device=self.device)
        none = summarised_by_kind(self.test, [score(self.model, case) for case in self.test])
        results: dict[str, Any] = {"none": {"figures": none}}
        for name, method in (DENSE if self.is_dense else ROWS | WEIGHTS).items():
            setting = settings[name]
            started = time.perf_counter()
            changes: list[Change] = []
            for group in groups_of(self.test, GROUP):
                changes += method(self.bench, group, setting)
            seconds = (time.perf_counter() - started) / len(changes)
            scores: list[Scores] = []
            for number, (case, change) in enumerate(zip(self.test, changes, strict=True)):
                with changed(self.model, change) as model:
                    figures = score(model, case)
                if number % 5 == 0:
                    figures |= self._on_text(windows, case, change)
                    figures |= self._spilled(case, change)
                scores.append(figures)
            results[name] = {
                "layers": setting.layers,
                "limit": setting.limit,
                "seconds": seconds,
                "figures": summarised_by_kind(self.test, scores),
            }
        return results

    def _on_text(self, windows: TextWindows, case: Case, change: Change) -> Scores:
        figures: Scores = {}
        for kind, found, token in (
            ("holding", windows.holding(case.token, count=8), case.token),
            ("lacking", windows.lacking(case.token, count=16), None),
        ):
            if len(found):
                before = logits_of(self.model, found)
                with changed(self.model, change) as model:
                    after = logits_of(model, found)
                effect = text_effect(before, after, found, token_id=token)
                figures |= {
                    f"{kind}_kl": effect.kl,
                    f"{kind}_argmax": effect.argmax_changed,
                    f"{kind}_nats": effect.nats,
                    f"{kind}_identical": float(effect.identical),
                }
        return figures

    def _spilled(self, case: Case, change: Change) -> Scores:
        if not isinstance(change, Patch):
            return {}
        patch = dataclasses.replace(change, tokens=(case.token,))
        entries = spill(TokenMemory(self.model), patch, progress=False).summary(counts=self.counts)
        return {
            "spill_moved": float(sum(entry["moved"] for entry in entries)),
            "spill_any": float(sum(entry["any"] for entry in entries)),
            "spill_max": max(entry["max"] / entry["row_length"] for entry in entries),
            "spill_mean": max(entry["mean"] / entry["row_length"] for entry in entries),
        }

    # -- many edits ----------------------------------------------------------------------------------------------

    def sequence(self) -> dict[str, Any]:
        """A thousand edits on top of each other, of subjects of one token and of two."""
        settings = self.settings()
        names = ("ROME", "FT-L") if self.is_dense else ("row, gradient", "row, protected", "rank one, exact C", "FT-L")
        results = {}
        for name in names:
            for kind in (1, 2):
                method = (DENSE if self.is_dense else ROWS | WEIGHTS)[name]
                saved = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
                results[f"{name}, {kind}"] = self._sequence(name, method, settings[name], kind)
                self.model.load_state_dict(saved)
        return results

    def _sequence(self, name: str, method: Method, setting: Setting, kind: int) -> list[dict[str, Any]]:
        model, lines = self.model, []
        done: list[Case] = []
        others = _evenly(self.known[3 - kind], 100)
        for group in tqdm(
            distinct_groups(self.known[kind][: CHECKPOINTS[-1]]), desc=f"{name}, {kind}", leave=False, disable=None
        ):
            bench = self.bench.on(model)
            if name == "FT-L":
                (change,) = fine_tune(
                    model, group, layer=setting.layers[0], limit=setting.limit, tokenizer=self.tokenizer, together=True
                )
                changes = [weight_change(bench, setting.layers[0], change)]
            elif name in ROWS:
                changes = method(bench, group, setting)
            else:
                changes = [joint(bench, group, setting)]
            model = applied(model, changes)
            done += group
            if len(done) in CHECKPOINTS or len(done) == len(self.known[kind]):
                asked = [score(model, case) for case in _evenly(done, 100)]
                first = [score(model, case) for case in done[:10]]
                rest = [score(model, case)["known"] for case in others]
                lines.append({
                    "edits": len(done),
                    "edited": dataclasses.asdict(summarise(asked)),
                    "first_ten": dataclasses.asdict(summarise(first)),
                    "untouched_known": _mean(rest),
                    "held_out_nats": self._held_out_nats(model),
                })  # fmt: skip
        return lines

    def _held_out_nats(self, model: Any) -> tuple[float, float]:
        length = self.model.config.max_seq_len
        windows = self.held_out[: len(self.held_out) // length * length].view(-1, length)[:100].to(self.device)
        nats = []
        with torch.no_grad():
            for part in windows.split(8):
                logits = model(part)[:, :-1].float()
                nats += torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), part[:, 1:], reduction="none"
                ).mean(dim=1).tolist()  # fmt: skip
        return _mean(nats)

    # -- undo ---------------------------------------------------------------------------------------------------------

    def undo(self) -> dict[str, Any]:
        """The weights' hash before and after edits that are taken back."""
        settings = self.settings()
        names = ("ROME", "FT-L") if self.is_dense else ("row, gradient", "rank one, exact C", "FT-L")
        table = DENSE if self.is_dense else ROWS | WEIGHTS
        before, same = state_hash(self.model), True
        for name in names:
            for change in table[name](self.bench, self.test[:4], settings[name]):
                with changed(self.model, change) as model:
                    same &= state_hash(model) != before
        return {"changed_each_time": same, "identical_after": state_hash(self.model) == before}


def applied(model: Any, changes: Sequence[Change]) -> Any:
    """The model with all changes: a new one where there is a memory, else itself."""
    patches = [change for change in changes if isinstance(change, Patch)]
    if patches:
        return stack(patches).apply(model)
    for change in changes:
        assert not isinstance(change, Patch)
        for layer, delta in change.items():
            down_weight(model, layer).add_(delta)
    return model


def state_hash(model: Any) -> str:
    """SHA-256 of all weights and given rows."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    for name, tensor in model.named_buffers():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def summarised_by_kind(cases: Sequence[Case], scores: Sequence[Scores]) -> dict[str, Any]:
    """Summaries of subjects of one token and of two, apart."""
    found = {}
    for kind in (1, 2):
        chosen = [each for case, each in zip(cases, scores, strict=True) if len(case.subject) == kind]
        if chosen:
            found[str(kind)] = _plain(summarise(chosen))
    return found


def _plain(summary: Summary) -> dict[str, Any]:
    return dataclasses.asdict(summary)


def groups_of(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    return [cases[first : first + size] for first in range(0, len(cases), size)]


def distinct_groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Groups of at most `GROUP` facts about different last tokens, cut at every checkpoint."""
    rounds: dict[int, list[Case]] = {}
    seen: dict[int, int] = {}
    for case in cases:
        number = seen[case.token] = seen.get(case.token, -1) + 1
        rounds.setdefault(number, []).append(case)
    groups: list[list[Case]] = []
    count = 0
    for _, members in sorted(rounds.items()):
        group: list[Case] = []
        for case in members:
            group.append(case)
            count += 1
            if len(group) == GROUP or count in CHECKPOINTS:
                groups.append(group)
                group = []
        if group:
            groups.append(group)
    return groups


def _spread(cases: Sequence[Case]) -> list[Case]:
    """The cases in an order that has nothing to do with that of the records."""
    return sorted(cases, key=lambda case: hashlib.sha256(str(case.record["case_id"]).encode()).hexdigest())


def _evenly(cases: Sequence[Case], count: int) -> list[Case]:
    return [cases[len(cases) * number // count] for number in range(count)] if len(cases) > count else list(cases)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
