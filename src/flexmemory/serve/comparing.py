"""Diff: this checkpoint's rows beside those of another checkpoint, a ToL store, a patch, or the edits of the bench.

Dimension key: V vocabulary, U token ids, P layers of the index that both have, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.interpret.apply import is_store
from flexmemory.interpret.kept import row_lengths
from flexmemory.interpret.patch import Patch, check_base, stack
from flexmemory.interpret.precise import precise_rows
from flexmemory.interpret.spill import spill
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.editing import Bench
from flexmemory.serve.fields import Fields
from flexmemory.serve.records import rounded
from flexmemory.tol.diff import compare
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.store import ToLStore

EDITS = "edits applied here"
"""The name of the bench's model."""
MOST_CHANGED = 500
"""Tokens that are listed."""
MOVED = 0.01
"""A row is counted that moved by more than this share of its length."""
LARGEST_SHARE = 1e6
"""What is told of a row that was nothing and is something."""

Other = Checkpoint | Patch | ToLStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """How far rows are apart."""

    of: object
    """What was compared."""
    share: Float[Tensor, "V P"]
    """How far each row is from ours, over the length of ours; 0 where the mask leaves a token out."""
    relative: Float[Tensor, " P"]
    """The root of the mean square over all tokens, over that of lengths."""


class Comparison:
    """What the checkpoint can be compared with, by name."""

    def __init__(self, bench: Bench, others: Mapping[str, Other]) -> None:
        """Compare the base of `bench` with `others`, each found `comparable`."""
        self._bench, self._others = bench, others
        self._base = TokenMemory(bench.base)
        self._sides: dict[str, Side] = {}
        self._found: dict[str, Change] = {}

    def verbs(self) -> dict[str, Callable[[Fields], Any]]:
        """What can be posted, by name."""
        return {"diff": self.overview, "diff/token": self.token, "diff/sizes": self.sizes}

    def names(self) -> list[str]:
        """What it can be compared with now."""
        return [*self._others, *([EDITS] if self._bench.applied else [])]

    def overview(self, fields: Fields) -> dict[str, Any]:
        """How far each layer's rows are apart, and the tokens that are farthest, by the largest share of any layer.

        Raises:
            ValueError: there is nothing of that name.
        """
        side, change = self._compared(fields.text("with"))
        share = change.share
        worst = share.amax(1).topk(min(MOST_CHANGED, len(share)))
        tokens = [
            [t, *rounded([size]), side.layers[int(share[t].argmax())]]
            for t, size in zip(worst.indices.tolist(), worst.values.tolist(), strict=True)
            if size > 0
        ]
        return {
            "layers": [
                {
                    "layer": layer,
                    "relative": rounded([float(change.relative[place])])[0],
                    "largest": rounded([float(share[:, place].max())])[0],
                    "moved": int((share[:, place] > MOVED).sum()),
                    "different": int((share[:, place] > 0).sum()),
                }
                for place, layer in enumerate(side.layers)
            ],
            "tokens": tokens,
            "changed": int((share.amax(1) > 0).sum()),
        }

    def sizes(self, fields: Fields) -> bytes:
        """For every token how far its row of `layer` moved over its length (-1: the largest of any layer), in float32.

        Raises:
            ValueError: there is nothing of that name, or it lacks the layer.
        """
        side, change = self._compared(fields.text("with"))
        layer = fields.integer("layer", -1)
        if layer != -1 and layer not in side.layers:
            raise ValueError(f"layer {layer} is not compared; there is {', '.join(map(str, side.layers))}")
        share = change.share.amax(1) if layer == -1 else change.share[:, side.layers.index(layer)]
        return share.numpy().astype("<f4").tobytes()

    def token(self, fields: Fields) -> dict[str, Any]:
        """One token's row in every layer, here and there: lengths, distance, cosine, and what is promoted.

        Raises:
            ValueError: there is nothing of that name, or no such token.
        """
        live = self._bench.live
        with live.lock:
            there = self._side(fields.text("with"))
            here = Side(self._base, layers=there.layers)
            ids = torch.tensor([fields.integer("token")])
            rows = [side.rows(ids)[0].float() for side in (here, there)]  # (P, D) each
            lists = [
                [live.lists(sign * side.project(row).float(), sign=sign) for sign in (1, -1)]
                for side, row in zip((here, there), rows, strict=True)
            ]
        ours, theirs = rows
        cosine = torch.nn.functional.cosine_similarity(ours, theirs)
        columns = [ours.norm(dim=1), theirs.norm(dim=1), (theirs - ours).norm(dim=1), cosine]
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
                    zip(there.layers, rounded(torch.stack(columns, 1).cpu().numpy()), strict=True)
                )
            ]
        }

    def _compared(self, name: str) -> tuple[Side, Change]:
        """All rows here and there; computed once, for the edits of the bench as often as they change."""
        live = self._bench.live
        with live.lock:
            side = self._side(name)
            found = self._found.get(name)
            if found is None or found.of is not side.of:
                patch = stack(self._bench.applied) if name == EDITS else self._others[name]
                found = self._moved_by(patch, side) if isinstance(patch, Patch) else self._apart(side)
                self._found[name] = found
            return side, found

    def _moved_by(self, patch: Patch, side: Side) -> Change:
        kept = self._bench.live.kept
        moved = spill(self._base, patch, kept=kept)
        lengths = torch.stack([row_lengths(self._base, layer=layer, kept=kept) for layer in side.layers], dim=1)
        apart = torch.zeros_like(lengths)
        for place, layer in enumerate(side.layers):
            if layer in moved.layers:
                apart[:, place] = moved.moved[:, moved.layers.index(layer)]
        relative = apart.norm(dim=0) / lengths.norm(dim=0)
        return self._change(side, torch.where(apart == 0, 0.0, apart / lengths), relative)

    def _apart(self, side: Side) -> Change:
        here = Side(self._base, layers=side.layers)
        names = tuple(map(str, side.layers))
        found = compare(here.rows, side.rows, names=names, vocab_size=self._base.vocab_size)
        return self._change(side, found.by_token, found.relative)

    def _change(self, side: Side, share: Float[Tensor, "V P"], relative: Float[Tensor, " P"]) -> Change:
        told = share.clamp(max=LARGEST_SHARE).masked_fill(~self._bench.live.mask[:, None], 0).float()
        return Change(of=side.of, share=told, relative=relative)

    def _side(self, name: str) -> Side:
        layers = self._bench.live.layers
        if name == EDITS and self._bench.applied:
            return Side(self._bench.live.memory, layers=layers)
        if name not in self._others:
            known = ", ".join(self.names()) or "nothing: start with --compare"
            raise ValueError(f"there is nothing called {name[:60]!r} to compare with; there is {known}")
        if name not in self._sides:
            other, base = self._others[name], self._bench.base
            if isinstance(other, ToLStore):
                self._sides[name] = StoreSide(other, head=self._base, layers=layers)
            else:
                same = {"device": base.device, "dtype": base.dtype}
                model = other.apply(base) if isinstance(other, Patch) else other.load(**same)
                self._sides[name] = Side(TokenMemory(model), layers=layers)
        return self._sides[name]


class Side:
    """Rows that a model computes."""

    def __init__(self, memory: TokenMemory, *, layers: Sequence[int]) -> None:
        """Of some layers of `memory`."""
        self.of: object = memory
        self.layers = tuple(layers)
        self._head = memory

    def rows(self, token_ids: Int[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """Rows of some tokens, in at least fp32 on the CPU.

        Raises:
            ValueError: there is no such token.
        """
        model = self._head.model
        return torch.stack([precise_rows(model, token_ids, layer=layer) for layer in self.layers], dim=1).cpu()

    def project(self, rows: Float[Tensor, "P D"]) -> Float[Tensor, "P V"]:
        """What they promote: `TokenMemory.project`."""
        return self._head.project(rows.to(self._head.model.device))


class StoreSide(Side):
    """Rows that are looked up, decoded; what they promote is told by the head of another model."""

    def __init__(self, store: ToLStore, *, head: TokenMemory, layers: Sequence[int]) -> None:
        """Of those of `layers` that the store has."""
        super().__init__(head, layers=[layer for layer in layers if layer in store.layers])
        self.of = store
        self._tier = DiskRows(store)
        self._slices = [store.embedding + store.layers.index(layer) for layer in self.layers]

    def rows(self, token_ids: Int[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """See `Side.rows`."""
        tier = self._tier
        whole = torch.empty((len(token_ids), tier.num_slices, tier.hidden_size), dtype=tier.dtype)
        tier.gather(token_ids, whole)
        return whole[:, self._slices].float()


def all_comparable(paths: Sequence[Path], checkpoint: Checkpoint) -> dict[str, Other]:
    """What is at some paths, by the names of files and folders; errors as for `comparable`, and for equal names."""
    found: dict[str, Other] = {}
    for path in paths:
        if path.name in found:
            raise ValueError(f"two things to compare with are called {path.name}; rename one")
        found[path.name] = comparable(path, checkpoint)
    return found


def comparable(path: Path, checkpoint: Checkpoint) -> Other:
    """The checkpoint, store or patch at `path`, found fit to be compared with `checkpoint`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model.
    """
    if path.is_file():
        patch = Patch.load(path)
        check_base(
            patch,
            fingerprints=[checkpoint.fingerprint, *checkpoint.lineage],
            tokenizer=checkpoint.tokenizer_fingerprint,
            target=checkpoint.path,
        )
        return patch
    if not checkpoint.config.has_memory:
        raise ValueError(f"{path} and {checkpoint.path} must both have a memory to be compared")
    if is_store(path):
        other = ToLStore.open(path)
        theirs, tokenizer = other.manifest, other.manifest.tokenizer_fingerprint
    else:
        other = Checkpoint.open(path)
        theirs, tokenizer = other.config, other.tokenizer_fingerprint
        if not other.config.has_memory:
            raise ValueError(f"{path} and {checkpoint.path} must both have a memory to be compared")
    if tokenizer != checkpoint.tokenizer_fingerprint:
        raise ValueError(
            f"{path} has another tokenizer than {checkpoint.path}: their tokens cannot be compared one by one"
        )
    for field in ("vocab_size", "num_layers", "hidden_size"):
        ours, other_size = getattr(checkpoint.config, field), getattr(theirs, field)
        if ours != other_size:
            raise ValueError(
                f"{path} has {field} {other_size}, {checkpoint.path} has {ours}: their rows cannot be compared"
            )
    return other
