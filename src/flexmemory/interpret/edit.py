"""Edit a memory: rows of tokens, or the values and keys that all rows are made of.

    with memory.edit(checkpoint) as edit:
        edit.scale_row(token, layer=3, factor=0.5)
        edit.set_value(layer=3, key=17, value=vector)
    edit.patch.save(path)                # what was changed, as a small file
    edited = edit.patch.apply(model)     # a copy; the model stays as it is

Operations see what earlier ones did. A row that was set stays as it was set, whatever happens to values and keys.
Dimension key: U token ids, V vocabulary, L layers, K cells, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexmemory.interpret.kept import Kept, Tensors, coefficient_weights
from flexmemory.interpret.patch import EVERY_LAYER, Kind, Patch, Step, module_of, shape_of, shared_copy, take_step
from flexmemory.interpret.precise import precise_memory, precise_rows
from flexmemory.interpret.promotion import Level, lowered_rows, most_promoting
from flexmemory.interpret.rank_one import RIDGE, moment_factor, rank_one_factors, second_moment
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import check_token_ids


class Editor:
    """A copy of a memory that is being edited, and the patch that leads there."""

    def __init__(self, memory: TokenMemory, checkpoint: Checkpoint | None = None, *, kept: Kept | None = None) -> None:
        """Begin to edit `memory`, which is not changed.

        Args:
            memory: Of a memory or flex model.
            checkpoint: What it was loaded from: only a patch that knows can be applied to a checkpoint or store.
            kept: What is known of memories that share weights with this one; what is found out is added.

        Raises:
            ValueError: the model is dense.
        """
        if not memory.exact:
            raise ValueError(
                "a dense model has no rows to edit: its FFN reads the residual stream, so no token has one output"
            )
        self.memory = TokenMemory(shared_copy(memory.model))
        """The memory as edited so far."""
        self._checkpoint = checkpoint
        self._kept = Kept() if kept is None else kept
        self._steps: list[Step] = []
        self._tokens: set[int] = set()
        self._what: list[str] = []

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing: there is nothing to undo."""

    @property
    def patch(self) -> Patch:
        """What was done so far.

        Raises:
            ValueError: nothing was.
        """
        if not self._steps:
            raise ValueError("nothing was edited")
        return Patch(
            steps=tuple(self._steps),
            shape=shape_of(self.memory.model),
            base=self._checkpoint.fingerprint if self._checkpoint else "",
            tokenizer=self._checkpoint.tokenizer_fingerprint if self._checkpoint else "",
            tokens=tuple(sorted(self._tokens)),
            what=tuple(self._what),
        )

    def set_rows(self, token_ids: Int[Tensor, " U"], *, layer: int, rows: Float[Tensor, "U D"]) -> None:
        """Give each of some distinct tokens a row.

        Raises:
            ValueError: here and below: a layer, token, key or shape is impossible, or a number is not finite.
        """
        ids = token_ids.tolist()
        dtype = torch.promote_types(self.memory.model.dtype, torch.float32)
        self._take(
            Step(kind="rows", layer=layer, ids=token_ids.cpu().long(), numbers=rows.to(dtype)),
            f"set rows of tokens {_listed(ids)} in layer {layer}",
            tokens=ids,
        )

    def set_row(self, token_id: int, *, layer: int, row: Float[Tensor, " D"]) -> None:
        """Give a token a row."""
        self.set_rows(torch.tensor([token_id]), layer=layer, rows=row[None])

    def add_row(self, token_id: int, *, layer: int, delta: Float[Tensor, " D"]) -> None:
        """Add to a token's row."""
        row = self.row(token_id, layer=layer)
        self.set_row(token_id, layer=layer, row=row + delta.to(row))

    def scale_row(self, token_id: int, *, layer: int, factor: float) -> None:
        """Multiply a token's row; 0 disables it."""
        self.set_row(token_id, layer=layer, row=self.row(token_id, layer=layer) * factor)

    def swap_rows(self, first: int, second: int, *, layers: Sequence[int] | None = None) -> None:
        """Exchange the rows of two tokens, in all layers unless some are named."""
        if first == second:
            raise ValueError(f"token {first} cannot change places with itself; give two tokens")
        ids = torch.tensor([first, second])
        for layer in self.memory.layers if layers is None else layers:
            self.set_rows(ids, layer=layer, rows=precise_rows(self.memory.model, ids, layer=layer).flip(0))

    def inject(
        self,
        token_id: int,
        *,
        rows: Float[Tensor, "L D"] | None = None,
        embedding: Float[Tensor, " D"] | None = None,
    ) -> None:
        """Give an id that is not in use a memory of its own.

        Args:
            token_id: One of the vocabulary, which does not grow.
            rows: Its row in each layer; by default nothing.
            embedding: Its input embedding, by default as it is. With a head that is tied to it, this is also how the
                token is predicted, so one logit of every position changes.
        """
        layers = self.memory.layers
        rows = torch.zeros(len(layers), self.memory.hidden_size) if rows is None else rows
        if rows.shape != (len(layers), self.memory.hidden_size):
            raise ValueError(f"rows must be of {[len(layers), self.memory.hidden_size]}, got {list(rows.shape)}")
        for layer in layers:
            self.set_row(token_id, layer=layer, row=rows[layer])
        if embedding is not None:
            step = Step(kind="embedding", layer=EVERY_LAYER, ids=torch.tensor([token_id]), numbers=embedding[None])
            self._take(step, f"set the embedding of token {token_id}", tokens=[token_id])

    def set_value(self, *, layer: int, key: int, value: Float[Tensor, " D"]) -> None:
        """Let a cell add another vector, for all tokens."""
        self._set_cell("values", layer=layer, key=key, vector=value)

    def scale_value(self, *, layer: int, key: int, factor: float) -> None:
        """Multiply what a cell adds, for all tokens; 0 disables the cell."""
        self._check_key(layer, key)
        self.set_value(layer=layer, key=key, value=self.memory.values(layer)[key] * factor)

    def set_key(
        self, *, layer: int, key: int, vector: Float[Tensor, " D"], gate: Float[Tensor, " D"] | None = None
    ) -> None:
        """Let a cell answer to another key and, where given, to another gate."""
        self._set_cell("keys", layer=layer, key=key, vector=vector)
        if gate is not None:
            self._set_cell("gates", layer=layer, key=key, vector=gate)

    def scale_key(self, *, layer: int, key: int, factor: float, token_ids: Int[Tensor, " U"] | None = None) -> None:
        """Multiply a cell's coefficient, for all tokens or as `scale_keys` for some."""
        if token_ids is not None:
            self.scale_keys([key], layer=layer, factor=factor, token_ids=token_ids)
            return
        self._check_key(layer, key)
        self.set_key(layer=layer, key=key, vector=self.memory.keys(layer)[key] * factor)

    def scale_keys(self, keys: Sequence[int], *, layer: int, factor: float, token_ids: Int[Tensor, " U"]) -> None:
        """Multiply some cells' coefficients for some tokens alone, whose rows are then given: c_k is c_k * factor."""
        for key in keys:
            self._check_key(layer, key)
        self._refuse_given(token_ids, layer=layer)
        precise = precise_memory(self.memory.model, layer=layer)
        cells = torch.tensor(sorted(set(keys)), device=precise.model.device)
        part = precise.coefficients(token_ids, layer=layer)[:, cells] @ precise.values(layer)[cells]
        self.set_rows(token_ids, layer=layer, rows=precise.rows(token_ids, layer=layer) + (factor - 1) * part)

    def rank_one(
        self,
        token_id: int,
        *,
        layer: int,
        row: Float[Tensor, " D"],
        counts: Int64[Tensor, " V"] | None = None,
        moment: Float[Tensor, "K K"] | None = None,
        ridge: float = RIDGE,
    ) -> None:
        """Change W_down so that a token's row becomes `row` and others move least (ROME's update, arXiv 2202.05262).

        W <- W + (row - W c) (C^-1 c)^T / (c^T C^-1 c): of all changes with this effect the one with the least mean
        square movement of rows in text with these unigram frequencies. C = sum over t of p(t) c(t) c(t)^T is exact.

        Args:
            token_id: The token.
            layer: The layer.
            row: What its row shall be.
            counts: How often each token occurs; by default all as often. p is (count + 1) / (their sum).
            moment: C, where `rank_one.second_moment` has made it before: many edits can share it.
            ridge: This times the mean of C's diagonal is added to the diagonal, so that C has an inverse.
        """
        check_token_ids(torch.tensor([token_id]), self.memory.vocab_size)
        self._refuse_given(torch.tensor([token_id]), layer=layer)
        precise = precise_memory(self.memory.model, layer=layer)

        def found() -> Tensors:
            return (moment_factor(second_moment(precise, layer=layer, counts=counts), ridge=ridge),)

        if moment is None:
            weights = coefficient_weights(self.memory, layer) + (() if counts is None else (counts,))
            (factor,) = self._kept.get(f"factor of C, ridge {ridge}", weights, found)
        else:
            factor = moment_factor(moment, ridge=ridge)
        left, right = rank_one_factors(precise, token_id, layer=layer, row=row, factor=factor)
        self._take(
            Step(kind="outer", layer=layer, numbers=left[None], factors=right[None]),
            f"rank-one update of W_down for the row of token {token_id} in layer {layer}",
            tokens=[token_id],
        )

    def suppress(
        self,
        token_ids: Int[Tensor, " U"],
        *,
        level: Level = "values",
        strength: float = 1.0,
        count: int = 64,
        top: int = 16,
        layers: Sequence[int] | None = None,
    ) -> list[tuple[int, int, float]]:
        """Lower what promotes some tokens, by the projection of values or rows on the vocabulary.

        Args:
            token_ids: The tokens that shall come up less.
            level: `values`: multiply values by 1 - strength, whoever uses them. `rows`: take `strength` of what raises
                the tokens' mean logit out of rows, one (token, layer) at a time.
            strength: From 0 to 1.
            count: Values or rows to lower, at most: those with the most of their `top` logits on the tokens.
            top: Logits to look at, of the largest; of values also of the smallest, as coefficients have both signs.
            layers: By default all.

        Returns:
            What was lowered, the strongest first: (layer, key or token, share of its top logits).
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength}")
        chosen = self.memory.layers if layers is None else tuple(layers)
        found = most_promoting(
            self.memory, token_ids, level=level, count=count, top=top, layers=chosen, kept=self._kept
        )
        for layer in chosen:
            here = torch.tensor([place for at, place, _ in found if at == layer], dtype=torch.int64)
            if not len(here):
                continue
            if level == "values":
                values = self.memory.values(layer)[here.to(self.memory.model.device)] * (1 - strength)
                step = Step(kind="values", layer=layer, ids=here, numbers=values)
                self._take(step, f"values {_listed(here.tolist())} of layer {layer} times {1 - strength:g}")
            else:
                rows = precise_rows(self.memory.model, here, layer=layer)
                self.set_rows(here, layer=layer, rows=lowered_rows(self.memory, rows, token_ids, strength=strength))
        return found

    def row(self, token_id: int, *, layer: int) -> Float[Tensor, " D"]:
        """A token's row as edited so far, in at least fp32."""
        return precise_rows(self.memory.model, torch.tensor([token_id]), layer=layer)[0]

    def _set_cell(self, kind: Kind, *, layer: int, key: int, vector: Float[Tensor, " D"]) -> None:
        self._check_key(layer, key)
        dtype = module_of(self.memory.cells(layer), kind).weight.dtype
        step = Step(kind=kind, layer=layer, ids=torch.tensor([key]), numbers=vector[None].to(dtype))
        self._take(step, f"set one of the {kind}, {key} of layer {layer}")

    def _take(self, step: Step, what: str, *, tokens: Sequence[int] = ()) -> None:
        """Carry out a step on our copy and remember it, joined to an earlier one where that makes no difference."""
        take_step(self.memory.model, step)
        step = dataclasses.replace(step, numbers=step.numbers.detach().to("cpu", copy=True))  # the caller's may change
        for place in reversed(range(len(self._steps))):
            earlier = self._steps[place]
            if (earlier.kind, earlier.layer) == (step.kind, step.layer) and step.kind != "outer":
                self._steps[place] = _over(earlier, step)
                break
            # Values and outer products change one matrix, so their order matters.
            if earlier.layer == step.layer and {earlier.kind, step.kind} == {"values", "outer"}:
                self._steps.append(step)
                break
        else:
            self._steps.append(step)
        self._tokens.update(tokens)
        self._what.append(what)

    def _check_key(self, layer: int, key: int) -> None:
        self.memory.cells(layer)
        if not 0 <= key < self.memory.num_keys:
            raise ValueError(f"key {key} is out of range: layer {layer} has keys 0 to {self.memory.num_keys - 1}")

    def _refuse_given(self, token_ids: Int[Tensor, " U"], *, layer: int) -> None:
        self.memory.cells(layer)
        given = self.memory.model.memories[layer].given
        if given is not None and torch.isin(token_ids.to(given.ids), given.ids).any():
            raise ValueError(
                f"a row of layer {layer} was set before, and no longer comes from values and keys; edit that row itself"
            )


def _over(earlier: Step, later: Step) -> Step:
    """One step for two of the same kind in one layer, the later over the earlier."""
    assert earlier.ids is not None
    assert later.ids is not None
    kept = ~torch.isin(earlier.ids, later.ids)
    return dataclasses.replace(
        later,
        ids=torch.cat((earlier.ids[kept], later.ids)),
        numbers=torch.cat((earlier.numbers[kept], later.numbers)),
    )


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
