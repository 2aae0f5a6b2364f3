"""What of a memory promotes a set of tokens, by projection on the vocabulary, and how to take that out of a row.

Dimension key: N vectors, D model width, V vocabulary, S tokens of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.interpret.kept import Kept, Tensors
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import check_token_ids

Level = Literal["values", "rows"]
CHUNK = 256
"""Vectors whose V logits exist at once."""


def centred_head(memory: TokenMemory) -> Float[Tensor, "V D"]:
    """What `TokenMemory.project` multiplies by, in at least fp32, but for the mean logit, on which nothing depends."""
    head, gain = memory.model.head.weight.detach(), memory.model.norm.weight.detach()
    dtype = torch.promote_types(head.dtype, torch.float32)
    matrix = head.to(dtype) * gain.to(dtype)
    return matrix - matrix.mean(0)


def top_logits(
    vectors: Float[Tensor, "N D"], head: Float[Tensor, "V D"], *, top: int, sign: int = 1
) -> tuple[Float[Tensor, "N top"], Int[Tensor, "N top"]]:
    """The `top` largest logits of each vector, or with `sign` -1 of its opposite, and whose they are.

    Args:
        vectors: What is projected.
        head: `centred_head`.
        top: How many; V where it is more.
        sign: 1 or -1.
    """
    best = [(sign * part.to(head) @ head.T).topk(min(top, len(head)), dim=1) for part in vectors.split(CHUNK)]
    return torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])


def share_of_top(
    logits: Float[Tensor, "N top"], ids: Int[Tensor, "N top"], token_ids: Int[Tensor, " S"]
) -> Float[Tensor, " N"]:
    """How much of `top_logits` is on some tokens: the sum of these over the sum of all, 0 to 1; negative ones are 0."""
    size = logits.clamp(min=0)
    wanted = torch.isin(ids, token_ids.to(ids))
    return (size * wanted).sum(1) / size.sum(1).clamp(min=1e-30)


def most_promoting(
    memory: TokenMemory,
    token_ids: Int[Tensor, " S"],
    *,
    level: Level,
    count: int,
    top: int,
    layers: Sequence[int],
    kept: Kept,
) -> list[tuple[int, int, float]]:
    """The values or rows with the largest `share_of_top` on some tokens: (layer, key or token, share), largest first.

    Values count by their better side, as coefficients have both signs. All values or rows of these layers are looked
    at, V logits for each: of rows that is V times V a layer. What is found of values goes to `kept`.

    Raises:
        ValueError: there are no tokens, one is out of range, or an argument is impossible.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
    if not len(token_ids) or count < 1 or top < 1:
        raise ValueError(f"give at least one token, count and top, got {len(token_ids)}, {count} and {top}")
    check_token_ids(token_ids.cpu(), memory.vocab_size)
    found = []
    for layer in layers:
        for first, sides in _tops(memory, level, layer, top=top, kept=kept):
            shares = torch.stack([share_of_top(*side, token_ids) for side in sides]).amax(0)
            best = shares.topk(min(count, len(shares)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [(layer, first + place, share) for place, share in pairs if share > 0]
        found = sorted(found, key=lambda entry: -entry[2])[:count]
    return found


def _tops(
    memory: TokenMemory, level: Level, layer: int, *, top: int, kept: Kept
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """`top_logits` of all values (both signs) or rows of a layer, and the place of the first of each part."""
    if level == "rows":
        head = centred_head(memory)
        for ids in memory.vocabulary_chunks():
            yield int(ids[0]), [top_logits(memory.rows(ids, layer=layer), head, top=top)]
        return

    def found() -> Tensors:
        head, values = centred_head(memory), memory.values(layer)
        return (*top_logits(values, head, top=top), *top_logits(values, head, top=top, sign=-1))

    model = memory.model
    weights = (memory.cells(layer).down.weight, model.head.weight, model.norm.weight)
    up, up_ids, down, down_ids = kept.get(f"{top} largest logits", weights, found)
    yield 0, [(up, up_ids), (down, down_ids)]


def direction_of(memory: TokenMemory, token_ids: Int[Tensor, " S"]) -> Float[Tensor, " D"]:
    """What a vector is multiplied by to get the mean logit of some tokens, less the mean of all, as projected."""
    head, gain = memory.model.head.weight.detach(), memory.model.norm.weight.detach()
    dtype = torch.promote_types(head.dtype, torch.float32)
    chosen = head[token_ids.to(head.device)].to(dtype)
    return (chosen.mean(0) - head.mean(0, dtype=dtype)) * gain.to(dtype)


def lowered_rows(
    memory: TokenMemory, rows: Float[Tensor, "N D"], token_ids: Int[Tensor, " S"], *, strength: float
) -> Float[Tensor, "N D"]:
    """Rows less `strength` of what raises the tokens' mean logit in them; rows that do not raise it stay."""
    direction = direction_of(memory, token_ids).to(rows)
    raising = (rows @ direction).clamp(min=0)
    return rows - strength * (raising / (direction @ direction))[:, None] * direction
