"""The edit bench: edits are tried on a copy, applied to the model that answers, taken back, and saved as a patch."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flexmemory.interpret.edit import Editor
from flexmemory.interpret.patch import Patch, check_base, stack
from flexmemory.interpret.precise import precise_rows
from flexmemory.interpret.promotion import direction_of
from flexmemory.interpret.spill import Spill, spill
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.serve.fields import Fields
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records, rounded

MAX_STEPS = 16
MAX_PATCHES = 64
MAX_PATCH_BYTES = 32 << 20
"""Of a file that is loaded."""
MAX_SET = 64
"""Tokens to suppress at once."""
MAX_LOWERED = 512
"""Values or rows that are lowered for them."""
MAX_VOCABULARY_OF_ROWS = 32_768
"""Rows are looked at one by one for what they promote: V times V numbers a layer."""
WORST = 64
"""Tokens that move although the edit is not about them, listed."""


class Bench:
    """Edits of one live model."""

    def __init__(
        self, live: LiveModel, records: Records, checkpoint: Checkpoint, *, patches: Mapping[str, Patch]
    ) -> None:
        """Edit what `live` answers with; patches name `checkpoint` as their base, and so do those that have names."""
        self.live = live
        self.base = live.model
        """The model of the checkpoint."""
        self._checkpoint = checkpoint
        self._patches = patches
        self._counts = counts_of(records)
        self.applied: list[Patch] = []

    def verbs(self) -> dict[str, Callable[[Fields], Any]]:
        """What can be posted, by name."""
        return {
            "edit/preview": self.preview,
            "edit/continued": self.continued,
            "edit/apply": self.apply,
            "edit/revert": self.revert,
            "edit/patch": self.saved,
        }

    def state(self) -> dict[str, Any]:
        """What is applied, the oldest first, and the patches that can be named."""
        applied = [{"what": list(patch.what), "bytes": patch.nbytes} for patch in self.applied]
        return {"applied": applied, "patches": list(self._patches), "max_patch_bytes": MAX_PATCH_BYTES}

    def preview(self, fields: Fields) -> dict[str, Any]:
        """What steps would do: who moves, by how much, and what the model says of `text` before and after.

        Raises:
            ValueError: a step is impossible, or the text too long.
        """
        live, text = self.live, fields.text("text", "")
        with live.lock:
            patch, edited = self.patch_of(fields)
            moved = spill(live.memory, patch, edited=edited, kept=live.kept, progress=False)
            return {
                "what": list(patch.what),
                "description": patch.description,
                "bytes": patch.nbytes,
                "rows_only": patch.rows_only,
                "tokens": list(patch.tokens[:WORST]),
                "about": self._about(moved),
                "others": int((moved.moved[moved.others] > 0).any(1).sum()),
                "layers": moved.summary(counts=self._counts),
                "worst": [[token, layer, *rounded([size])] for token, layer, size in moved.worst(WORST)],
                "next": live.compared(text, edited),
            }

    def continued(self, fields: Fields) -> dict[str, Any]:
        """How the model goes on with `text`, before and after what steps would do.

        Raises:
            ValueError: a step is impossible, or the text or `max_new_tokens` too long.
        """
        live, text, length = self.live, fields.text("text"), fields.integer("max_new_tokens", 24)
        with live.lock:
            _, edited = self.patch_of(fields)
            both = [live.continued(text, max_new_tokens=length, model=model) for model in (None, edited)]
            return {"continued": both}

    def _about(self, moved: Spill) -> list[list[Any]]:
        """[token, layer, how far its row moves, its length] of the tokens that an edit is about."""
        ids, about = torch.tensor(moved.tokens[:WORST], dtype=torch.int64), []
        for place, layer in enumerate(moved.layers if len(ids) else ()):
            lengths = precise_rows(self.live.model, ids, layer=layer).norm(dim=1)  # those of `moved` may be rounded
            sizes = rounded(torch.stack((moved.moved[ids, place], lengths.cpu().double()), dim=1).numpy())
            about += [[token, layer, *both] for token, both in zip(ids.tolist(), sizes, strict=True)]
        return about

    def apply(self, fields: Fields) -> dict[str, Any]:
        """Let the model answer with steps on top of those that are applied.

        Raises:
            ValueError: a step is impossible, or there are too many patches.
        """
        with self.live.lock:
            if len(self.applied) >= MAX_PATCHES:
                raise ValueError(
                    f"{MAX_PATCHES} edits are applied; save the patch and start from the edited checkpoint"
                )
            patch, _ = self.patch_of(fields)
            self._use([*self.applied, patch])
            return self.state()

    def revert(self, fields: Fields) -> dict[str, Any]:
        """Take back the last `count` edits; without any left, the model is the checkpoint's, bit for bit."""
        with self.live.lock:
            count = fields.integer("count", 1)
            if not 1 <= count <= max(1, len(self.applied)):
                raise ValueError(f"count should be 1 to {len(self.applied)}, got {count}")
            self._use(self.applied[:-count])
            return self.state()

    def saved(self, fields: Fields) -> bytes:
        """All that is applied as a patch file.

        Raises:
            ValueError: nothing is.
        """
        with self.live.lock:
            return stack(self.applied).to_bytes()

    def patch_of(self, fields: Fields) -> tuple[Patch, Transformer]:
        """The patch of a request: a file in base64 (`file`), one that has a name (`patch`), or what `steps` make.

        Steps are made on top of what is applied. With it comes what it makes of the model that answers.

        Raises:
            ValueError: a step is impossible, or there are too many; a file is no patch, or of another checkpoint.
        """
        if file := fields.text("file", ""):
            patch = self._of_file(file, name=fields.text("name", "the file")[:100])
            return patch, patch.apply(self.live.model)
        if named := fields.text("patch", ""):
            if named not in self._patches:
                known = ", ".join(self._patches) or "none: start with --compare PATCH, or send a file"
                raise ValueError(f"there is no patch called {named[:60]!r}; there is {known}")
            patch = self._fitting(self._patches[named])
            return patch, patch.apply(self.live.model)
        steps = fields.objects("steps")
        if not 1 <= len(steps) <= MAX_STEPS:
            raise ValueError(f"expected 1 to {MAX_STEPS} steps, got {len(steps)}")
        editor = Editor(self.live.memory, self._checkpoint, kept=self.live.kept)
        for step in steps:
            take(editor, step, counts=self._counts)
        return editor.patch, editor.memory.model

    def _of_file(self, file: str, *, name: str) -> Patch:
        try:
            content = base64.b64decode(file, validate=True)
        except ValueError as error:
            raise ValueError(f"{name} is not in base64 ({error})") from error
        if len(content) > MAX_PATCH_BYTES:
            raise ValueError(f"{name} has {len(content)} bytes; at most {MAX_PATCH_BYTES} are taken")
        return self._fitting(Patch.from_bytes(content, name=name))

    def _fitting(self, patch: Patch) -> Patch:
        """The patch, found to be of this checkpoint or of one that it was edited from."""
        check_base(
            patch,
            fingerprints=[self._checkpoint.fingerprint, *self._checkpoint.lineage],
            tokenizer=self._checkpoint.tokenizer_fingerprint,
            target=Path(self._checkpoint.path.name),
        )
        return dataclasses.replace(patch, base=self._checkpoint.fingerprint)

    def _use(self, patches: list[Patch]) -> None:
        self.live.use(stack(patches).apply(self.base) if patches else self.base)
        self.applied = patches


def counts_of(records: Records) -> Tensor | None:
    """How often each token occurs, as far as the index knows."""
    counts = records.index.tokens["count"]
    return None if counts[0] is None else torch.tensor(counts)


def take(editor: Editor, step: Fields, *, counts: Tensor | None) -> None:
    """Carry out one step, described by `op` and the fields that it needs; `layer` -1 is all layers.

    Raises:
        ValueError: it is unknown or impossible.
    """
    op = step.text("op")
    match op:
        case "scale_value":
            layer, key = step.integer("layer"), step.integer("key")
            editor.scale_value(layer=layer, key=key, factor=step.number("factor"))
        case "scale_key":
            layer, key = step.integer("layer"), step.integer("key")
            editor.scale_key(layer=layer, key=key, factor=step.number("factor"))
        case "scale_key_for":
            tokens = torch.tensor([step.integer("token")])
            layer, key = step.integer("layer"), step.integer("key")
            editor.scale_key(layer=layer, key=key, factor=step.number("factor"), token_ids=tokens)
        case "swap_rows":
            editor.swap_rows(step.integer("token"), step.integer("other"), layers=layers_of(editor, step))
        case "suppress":
            suppress(editor, step)
        case "scale_row" | "copy_row":
            for layer in layers_of(editor, step):
                take_row(editor, op, step, layer=layer)
        case "steer_row" | "rank_one":
            toward = direction_of(editor.memory, checked_tokens(editor, [step.integer("other")]))
            for layer in layers_of(editor, step):
                steer(editor, op, step, layer=layer, toward=toward / toward.norm(), counts=counts)
        case _:
            raise ValueError(f"there is no edit {op[:40]!r}")


def take_row(editor: Editor, op: str, step: Fields, *, layer: int) -> None:
    """One token's row in one layer, scaled or that of another."""
    token = step.integer("token")
    if op == "scale_row":
        editor.scale_row(token, layer=layer, factor=step.number("factor"))
    else:
        editor.set_row(token, layer=layer, row=editor.row(step.integer("other"), layer=layer))


def steer(
    editor: Editor, op: str, step: Fields, *, layer: int, toward: Float[Tensor, " D"], counts: Tensor | None
) -> None:
    """Add a direction to one token's row in one layer: to the row itself, or through W_down."""
    token = step.integer("token")
    row = editor.row(token, layer=layer)
    steered = row + step.number("strength") * row.norm() * toward.to(row)
    if op == "steer_row":
        editor.set_row(token, layer=layer, row=steered)
    else:
        editor.rank_one(token, layer=layer, row=steered, counts=counts)


def suppress(editor: Editor, step: Fields) -> None:
    """Lower what promotes some tokens."""
    tokens, level, count = checked_tokens(editor, step.integers("tokens")), step.text("level", "values"), 64
    count = step.integer("count", count)
    if not 1 <= count <= MAX_LOWERED:
        raise ValueError(f"count should be 1 to {MAX_LOWERED}, got {count}")
    if level not in ("values", "rows"):
        raise ValueError(f"level should be values or rows, got {level[:40]!r}")
    if level == "rows" and editor.memory.vocab_size > MAX_VOCABULARY_OF_ROWS:
        raise ValueError(f"rows are looked through only for vocabularies up to {MAX_VOCABULARY_OF_ROWS}; take values")
    layers = layers_of(editor, step)
    found = editor.suppress(
        tokens,
        level="rows" if level == "rows" else "values",
        strength=step.number("strength", 1.0),
        count=count,
        layers=layers,
    )
    if not found:
        raise ValueError(f"no {level} promote these tokens among their largest logits: there is nothing to lower")


def layers_of(editor: Editor, step: Fields) -> Sequence[int]:
    """The layers that a step names: one, or with -1 all."""
    layer = step.integer("layer", -1)
    return editor.memory.layers if layer == -1 else (layer,)


def checked_tokens(editor: Editor, token_ids: list[int]) -> Tensor:
    """Distinct ids as a tensor.

    Raises:
        ValueError: there are none, too many, or one is out of range.
    """
    size = editor.memory.vocab_size
    if not 1 <= len(token_ids) <= MAX_SET or not all(0 <= token < size for token in token_ids):
        raise ValueError(f"expected 1 to {MAX_SET} token ids from 0 to {size - 1}, got {str(token_ids)[:60]}")
    return torch.tensor(list(dict.fromkeys(token_ids)))
