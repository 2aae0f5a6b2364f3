"""Diff: this checkpoint's rows beside those of another checkpoint, a patch, or the edits of the bench.

Dimension key: V vocabulary, L layers of the index, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexmemory.interpret.difference import memory_difference
from flexmemory.interpret.patch import Patch, check_base
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.editing import Bench
from flexmemory.serve.fields import Fields
from flexmemory.serve.records import rounded
from flexmemory.tol.diff import Difference

EDITS = "edits applied here"
"""The name of the bench's model."""
LISTED = 12
MOST_CHANGED = 500
"""Tokens that are listed."""
MOVED = 0.01
"""A row is counted that moved by more than this share of its length."""


LARGEST_SHARE = 1e6
"""What is told of a row that was nothing and is something."""


class Comparison:
    """What the checkpoint can be compared with, by name."""

    def __init__(self, bench: Bench, checkpoint: Checkpoint, *, others: Sequence[Path] = ()) -> None:
        """Compare the base of `bench` with `others`: checkpoints of the same shape and tokenizer, or patches.

        Raises:
            FileNotFoundError: there is nothing at one of them.
            ValueError: one cannot be compared, or two have one name.
        """
        self._bench = bench
        self._base = TokenMemory(bench.base)
        self._layers = bench.live.layers
        self._others: dict[str, Checkpoint | Patch] = {}
        for path in others:
            if path.name in self._others:
                raise ValueError(f"two things to compare with are called {path.name}; rename one")
            self._others[path.name] = comparable(path, checkpoint)
        self._memories: dict[str, TokenMemory] = {}
        self._found: dict[str, Difference] = {}

    def verbs(self) -> dict[str, Callable[[Fields], Any]]:
        """What can be posted, by name."""
        return {"diff": self.overview, "diff/token": self.token}

    def names(self) -> list[str]:
        """What it can be compared with now."""
        return [*self._others, *([EDITS] if self._bench.applied else [])]

    def overview(self, fields: Fields) -> dict[str, Any]:
        """How far each layer's rows are apart, and the tokens that are farthest, by the largest share of any layer.

        Raises:
            ValueError: there is nothing of that name.
        """
        with self._bench.live.lock:
            name = fields.text("with")
            memory = self._memory(name)
            found = self._found.get(name) or memory_difference(self._base, memory)
            if name != EDITS:
                self._found[name] = found
        mask = self._bench.live.mask
        places = [found.names.index(f"layer {layer}") for layer in self._layers]
        kept = found.by_token[:, places].clamp(max=LARGEST_SHARE).masked_fill(~mask[:, None], 0)  # (V, L)
        worst = kept.amax(1).topk(min(MOST_CHANGED, len(kept)))
        tokens = [
            [t, *rounded([size]), self._layers[int(kept[t].argmax())]]
            for t, size in zip(worst.indices.tolist(), worst.values.tolist(), strict=True)
            if size > 0
        ]
        return {
            "layers": [
                {
                    "layer": layer,
                    "relative": rounded([float(found.relative[place])])[0],
                    "largest": rounded([float(kept[:, p].max())])[0],
                    "moved": int((kept[:, p] > MOVED).sum()),
                    "different": int((kept[:, p] > 0).sum()),
                }
                for p, (layer, place) in enumerate(zip(self._layers, places, strict=True))
            ],
            "tokens": tokens,
            "changed": int((kept.amax(1) > 0).sum()),
        }

    def token(self, fields: Fields) -> dict[str, Any]:
        """One token's row in every layer, here and there: lengths, distance, cosine, and what is promoted.

        Raises:
            ValueError: there is nothing of that name, or no such token.
        """
        live = self._bench.live
        with live.lock:
            memories = (self._base, self._memory(fields.text("with")))
            ids = torch.tensor([fields.integer("token")])
            rows = [torch.cat([memory.rows(ids, layer=layer) for layer in self._layers]).float() for memory in memories]
            here, there = rows
            lists = [
                [live.lists(sign * memory.project(row).float(), sign=sign) for sign in (1, -1)]
                for memory, row in zip(memories, rows, strict=True)
            ]
        cosine = torch.nn.functional.cosine_similarity(here, there)
        columns = [here.norm(dim=1), there.norm(dim=1), (there - here).norm(dim=1), cosine]
        return {
            "layers": [
                {
                    "layer": layer,
                    "lengths": numbers[:2],
                    "moved": numbers[2],
                    "cosine": numbers[3],
                    "promoted": [side[0][place] for side in lists],
                    "suppressed": [side[1][place] for side in lists],
                }
                for place, (layer, numbers) in enumerate(
                    zip(self._layers, rounded(torch.stack(columns, 1).numpy()), strict=True)
                )
            ]
        }

    def _memory(self, name: str) -> TokenMemory:
        if name == EDITS and self._bench.applied:
            return self._bench.live.memory
        if name not in self._others:
            known = ", ".join(self.names()) or "nothing: start with --compare"
            raise ValueError(f"there is nothing called {name[:60]!r} to compare with; there is {known}")
        if name not in self._memories:
            other, base = self._others[name], self._bench.base
            model = other.apply(base) if isinstance(other, Patch) else other.load(device=base.device, dtype=base.dtype)
            self._memories[name] = TokenMemory(model)
        return self._memories[name]


def comparable(path: Path, checkpoint: Checkpoint) -> Checkpoint | Patch:
    """The checkpoint or patch at `path`, found fit to be compared with `checkpoint`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model.
    """
    if path.is_file():
        patch = Patch.load(path)
        check_base(
            patch,
            fingerprints=[checkpoint.fingerprint],
            tokenizer=checkpoint.tokenizer_fingerprint,
            target=checkpoint.path,
        )
        return patch
    other = Checkpoint.open(path)
    if other.tokenizer_fingerprint != checkpoint.tokenizer_fingerprint:
        raise ValueError(
            f"{path} has another tokenizer than {checkpoint.path}: their tokens cannot be compared one by one"
        )
    for field in ("vocab_size", "num_layers", "hidden_size"):
        ours, theirs = getattr(checkpoint.config, field), getattr(other.config, field)
        if ours != theirs:
            raise ValueError(
                f"{path} has {field} {theirs}, {checkpoint.path} has {ours}: their rows cannot be compared"
            )
    if not other.config.has_memory or not checkpoint.config.has_memory:
        raise ValueError(f"{path} and {checkpoint.path} must both have a memory to be compared")
    return other
