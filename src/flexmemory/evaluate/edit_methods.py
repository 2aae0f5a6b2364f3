"""The ways to edit that are compared: each makes one change for one fact, by the edit library where there is a memory.

A change is a `Patch` of a memory or, of a dense model, what to add to W_down of some layers. Dimension key: N facts,
S layers, D model width, K cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexmemory.evaluate.edit_search import Search, fine_tune, keys_and_outputs, margin_gradients, search_vectors
from flexmemory.evaluate.editing import Case
from flexmemory.evaluate.relations import RELATIONS
from flexmemory.interpret.edit import Editor
from flexmemory.interpret.patch import Patch, Step, shape_of
from flexmemory.interpret.rank_one import RIDGE, second_moment
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import DenseBlock, Transformer
from flexmemory.tokenizer import Tokenizer

Change = Patch | dict[int, Tensor]
DEFAULT = Search()
PROTECTED = Search(kept=tuple(relation.prompt for relation in RELATIONS), kl=1.0)
"""Keeps what all other relations say of the subject, without being told what that is."""
MARGIN = 4.0
"""Nats by which a linear step should prefer the new object."""
CELLS = 16
"""Cells whose values are scaled, those with the largest part in the margin."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how a method writes; chosen on facts that are not measured on."""

    layers: tuple[int, ...]
    search: Search = DEFAULT
    limit: float = 0.0
    """Of FT-L: the largest change of an entry."""


class Workbench:
    """A model to be edited, and what all methods need of it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        contexts: Sequence[Sequence[int]],
        counts: Int64[Tensor, " V"],
        text: Int[Tensor, "B T"],
    ) -> None:
        """Edit `model`, which is not changed.

        Args:
            model: In fp32.
            tokenizer: Its tokenizer.
            contexts: Beginnings for prompts, the first empty.
            counts: How often each token occurs in the training text: C of a memory is exact.
            text: Training text from which C of a dense model is estimated.
        """
        self.model, self.tokenizer = model, tokenizer
        self.contexts = contexts
        self._counts, self._text = counts, text
        self._moments: dict[int, Tensor] = {}

    def moment(self, layer: int) -> Float[Tensor, "K K"]:
        """C of a layer."""
        if layer not in self._moments:
            self._moments[layer] = (
                second_moment(TokenMemory(self.model), layer=layer, counts=self._counts, progress=False)
                if self.model.config.has_memory
                else sampled_moment(self.model, self._text, layer=layer)
            )
        return self._moments[layer]

    def on(self, model: Transformer) -> Workbench:
        """The same for `model`, an edited state of this one: C is not made again, as W_down has no part in it."""
        other = Workbench(model, self.tokenizer, contexts=self.contexts, counts=self._counts, text=self._text)
        other._moments = self._moments
        return other

    def vectors(self, cases: Sequence[Case], setting: Setting) -> Float[Tensor, "N S D"]:
        """What each fact needs in each layer, found by gradient."""
        return search_vectors(
            self.model, cases, layers=setting.layers, contexts=self.contexts, tokenizer=self.tokenizer,
            search=setting.search,
        )  # fmt: skip

    def keys(self, cases: Sequence[Case], layer: int) -> Float[Tensor, "N K"]:
        """What W_down of a layer is multiplied by at the subjects' last tokens."""
        return keys_and_outputs(
            self.model, cases, layer=layer, contexts=self.contexts, tokenizer=self.tokenizer
        )[0]  # fmt: skip

    def linear(self, cases: Sequence[Case], layer: int) -> tuple[Float[Tensor, " N"], Float[Tensor, "N D"]]:
        """How far each margin is from `MARGIN`, and its gradient by the layer's output."""
        margins, gradients = margin_gradients(
            self.model, cases, layer=layer, contexts=self.contexts, tokenizer=self.tokenizer
        )
        return (MARGIN - margins).clamp(min=0), gradients

    def edit(self, change: Callable[[Editor], None]) -> Patch:
        """The patch of some operations."""
        editor = Editor(TokenMemory(self.model))
        change(editor)
        return editor.patch


Method = Callable[[Workbench, Sequence[Case], Setting], list[Change]]


def row_changes(bench: Workbench, cases: Sequence[Case], vectors: Float[Tensor, "N S D"], setting: Setting) -> list:
    """Vectors added to rows."""

    def add(editor: Editor, case: Case, found: Tensor) -> None:
        for layer, vector in zip(setting.layers, found, strict=True):
            editor.add_row(case.token, layer=layer, delta=vector)

    return [
        bench.edit(lambda editor, case=case, found=found: add(editor, case, found))
        for case, found in zip(cases, vectors, strict=True)
    ]


def row_gradient(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """The row of the subject's last token, by v* (`setting.search`), in one layer or several at once."""
    return row_changes(bench, cases, bench.vectors(cases, setting), setting)


def row_random(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """A control: vectors of the same lengths in random directions."""
    vectors = bench.vectors(cases, setting)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
    return row_changes(
        bench, cases, noise / noise.norm(dim=2, keepdim=True) * vectors.norm(dim=2, keepdim=True), setting
    )


def row_linear(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """In closed form: the shortest vector that to first order gives the margin `MARGIN`."""
    lacking, gradients = bench.linear(cases, setting.layers[0])
    vectors = (lacking / gradients.square().sum(dim=1))[:, None] * gradients
    return row_changes(bench, cases, vectors[:, None], setting)


def row_lens(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """In closed form by the logit lens: the projected logit of the new object exceeds that of the true one."""
    model = bench.model
    new, true = (torch.tensor(ids) for ids in zip(*((case.new, case.true) for case in cases), strict=True))
    directions = (model.head.weight[new] - model.head.weight[true]) * model.norm.weight
    rows = keys_and_outputs(
        model, cases, layer=setting.layers[0], contexts=bench.contexts, tokenizer=bench.tokenizer
    )[1]  # fmt: skip
    lacking = (MARGIN - (rows * directions).sum(dim=1)).clamp(min=0)
    vectors = (lacking / directions.square().sum(dim=1))[:, None] * directions
    return row_changes(bench, cases, vectors[:, None], setting)


def one_value(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """The value of one cell changes place with one that gives the subject's row v*: the cell most its own."""
    vectors = bench.vectors(cases, setting)[:, 0]
    layer = setting.layers[0]
    memory = TokenMemory(bench.model)
    usual = bench.moment(layer).diagonal().sqrt()
    changes: list[Change] = []
    for case, vector in zip(cases, vectors, strict=True):
        coefficients = memory.coefficients(torch.tensor([case.token]), layer=layer)[0]
        key = int((coefficients.abs() / usual.to(coefficients)).argmax())
        value = memory.values(layer)[key] + vector / coefficients[key]
        changes.append(
            bench.edit(lambda editor, key=key, value=value: editor.set_value(layer=layer, key=key, value=value))
        )
    return changes


def scaled_keys(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """Coefficients of `CELLS` cells scaled, for all tokens, by the least factors with the margin to first order."""
    layer = setting.layers[0]
    lacking, gradients = bench.linear(cases, layer)
    memory = TokenMemory(bench.model)

    def scale(editor: Editor, keys: list[int], factors: list[float]) -> None:
        for key, factor in zip(keys, factors, strict=True):
            editor.scale_key(layer=layer, key=key, factor=factor)

    changes: list[Change] = []
    for case, need, gradient in zip(cases, lacking, gradients, strict=True):
        parts = memory.contributions(case.token, layer=layer, direction=gradient)
        keys = parts.abs().topk(min(CELLS, len(parts))).indices
        factors = 1 + need * parts[keys] / parts[keys].square().sum()
        changes.append(
            bench.edit(lambda editor, keys=keys, factors=factors: scale(editor, keys.tolist(), factors.tolist()))
        )
    return changes


def rank_one(bench: Workbench, cases: Sequence[Case], setting: Setting, *, exact: bool = True) -> list[Change]:
    """W_down changed by ROME's update with C in one layer or several; not `exact`: with the identity for C."""
    vectors = bench.vectors(cases, setting)
    if bench.model.config.has_memory:
        return [
            bench.edit(
                lambda editor, case=case, found=found: _memory_rank_one(bench, editor, case, found, setting, exact)
            )
            for case, found in zip(cases, vectors, strict=True)
        ]
    updates: list[dict[int, Tensor]] = [{} for _ in cases]
    for number, layer in enumerate(setting.layers):
        keys = bench.keys(cases, layer)
        for update, left, key in zip(updates, vectors[:, number], keys, strict=True):
            factors = least_update(key[None], bench.moment(layer) if exact else None)
            update[layer] = torch.outer(left.double(), factors[0]).to(left)
    return list(updates)


def joint(bench: Workbench, cases: Sequence[Case], setting: Setting) -> Change:
    """One change for many facts: the least, as C measures it, that gives every subject its v* in one layer."""
    (layer,) = setting.layers
    vectors, keys = bench.vectors(cases, setting)[:, 0], bench.keys(cases, layer)
    factors = least_update(keys, bench.moment(layer)).to(vectors)  # (N, K)
    if not bench.model.config.has_memory:
        return {layer: vectors.T @ factors}
    step = Step(kind="outer", layer=layer, numbers=vectors, factors=factors)
    return Patch(steps=(step,), shape=shape_of(bench.model), tokens=tuple(sorted({case.token for case in cases})))


def least_update(keys: Float[Tensor, "N K"], moment: Float[Tensor, "K K"] | None) -> Float[Tensor, "N K"]:
    """Factors F with F k_n = e_n: V F is the change of W, least in C, that adds v_n to W k_n for every n at once.

    F = (K C^-1 K^T)^-1 K C^-1; for one key this is ROME's update. Without C the identity stands for it. In fp64.
    """
    keys = keys.double()
    whitened = keys if moment is None else torch.linalg.solve(moment.to(keys), keys.T).T  # (N, K)
    gram = keys @ whitened.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())  # two subjects can have nearly the same key
    return torch.linalg.solve(gram, whitened)


def _memory_rank_one(
    bench: Workbench, editor: Editor, case: Case, found: Tensor, setting: Setting, exact: bool
) -> None:
    for layer, vector in zip(setting.layers, found, strict=True):
        moment = bench.moment(layer)
        if not exact:
            moment = torch.eye(len(moment), dtype=moment.dtype)
        row = editor.row(case.token, layer=layer) + vector
        editor.rank_one(case.token, layer=layer, row=row, moment=moment)


def rank_one_identity(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """`rank_one` without C."""
    return rank_one(bench, cases, setting, exact=False)


def fine_tuned(bench: Workbench, cases: Sequence[Case], setting: Setting) -> list[Change]:
    """FT-L: gradient steps on W_down of one layer, no entry by more than a limit."""
    layer = setting.layers[0]
    found = fine_tune(bench.model, cases, layer=layer, limit=setting.limit, tokenizer=bench.tokenizer)
    return [weight_change(bench, layer, change) for change in found]


def weight_change(bench: Workbench, layer: int, change: Float[Tensor, "D K"]) -> Change:
    """A change of all of W_down."""
    if not bench.model.config.has_memory:
        return {layer: change}
    values = TokenMemory(bench.model).values(layer) + change.T
    step = Step(kind="values", layer=layer, ids=torch.arange(len(values)), numbers=values)
    return Patch(steps=(step,), shape=shape_of(bench.model))


@contextlib.contextmanager
def changed(model: Transformer, change: Change | None) -> Iterator[Transformer]:
    """The model with a change: a copy where there is a memory; a dense model itself, until the block ends."""
    if change is None or isinstance(change, Patch):
        yield model if change is None else change.apply(model)
        return
    before = {layer: down_weight(model, layer).clone() for layer in change}
    for layer, delta in change.items():
        down_weight(model, layer).add_(delta)
    try:
        yield model
    finally:
        for layer, weight in before.items():
            down_weight(model, layer).copy_(weight)


def down_weight(model: Transformer, layer: int) -> Float[Tensor, "D K"]:
    """W_down of a dense layer, to be written to."""
    block = model.blocks[layer]
    assert isinstance(block, DenseBlock)
    return block.ffn.down.weight.detach()


@torch.no_grad()
def sampled_moment(model: Transformer, text: Int[Tensor, "B T"], *, layer: int) -> Float[Tensor, "K K"]:
    """C of a dense layer, estimated as ROME does: the mean of h h^T over the positions of a text, in fp64."""
    block = model.blocks[layer]
    assert isinstance(block, DenseBlock)
    total = torch.zeros(model.config.intermediate_size, model.config.intermediate_size, dtype=torch.float64)
    total = total.to(model.device)

    def collect(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].flatten(0, 1).double()
        total.add_(hidden.T @ hidden)

    handle = block.ffn.down.register_forward_pre_hook(collect)
    for part in text.split(64):
        model.hidden_states(part)
    handle.remove()
    moment = total / text.numel()
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    return moment


ROWS: dict[str, Method] = {
    "row, gradient": row_gradient,
    "row, protected": row_gradient,
    "rows of 4 layers": row_gradient,
    "row, linear step": row_linear,
    "row, logit lens": row_lens,
    "row, random": row_random,
}
"""Methods that edit rows: nobody else's row moves."""
WEIGHTS: dict[str, Method] = {
    "one value": one_value,
    "scaled keys": scaled_keys,
    "rank one, exact C": rank_one,
    "rank one, 4 layers": rank_one,
    "rank one, no C": rank_one_identity,
    "FT-L": fine_tuned,
}
"""Methods that edit values, keys or all of W_down."""
DENSE: dict[str, Method] = {
    "ROME": rank_one,
    "ROME, 4 layers": rank_one,
    "ROME, no C": rank_one_identity,
    "FT-L": fine_tuned,
}
"""Those that a dense model has."""
