"""What of a memory promotes a set of tokens, by projection on the vocabulary, and how to take that out of a row.

Dimension key: N vectors, D model width, V vocabulary, S tokens of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

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


def share_of_top(
    vectors: Float[Tensor, "N D"], head: Float[Tensor, "V D"], token_ids: Int[Tensor, " S"], *, top: int, sign: int = 1
) -> Float[Tensor, " N"]:
    """How much of a vector's `top` largest logits is on some tokens: the sum of these over the sum of all, 0 to 1.

    Args:
        vectors: What is projected.
        head: `centred_head`.
        token_ids: The tokens.
        top: Logits to look at; negative ones count as nothing.
        sign: -1 for the logits of the vectors' opposites.
    """
    wanted = torch.zeros(len(head), dtype=torch.bool, device=head.device)
    wanted[token_ids.to(head.device)] = True
    shares = []
    for part in vectors.split(CHUNK):
        best = (sign * part.to(head) @ head.T).topk(min(top, len(head)), dim=1)
        size = best.values.clamp(min=0)
        shares.append((size * wanted[best.indices]).sum(1) / size.sum(1).clamp(min=1e-30))
    return torch.cat(shares)


def most_promoting(
    memory: TokenMemory,
    token_ids: Int[Tensor, " S"],
    *,
    level: Level,
    count: int,
    top: int,
    layers: Sequence[int],
) -> list[tuple[int, int, float]]:
    """The values or rows with the largest `share_of_top` on some tokens: (layer, key or token, share), largest first.

    Values count by their better side, as coefficients have both signs. All values or rows of these layers are looked
    at, V logits for each: of rows that is V times V a layer.

    Raises:
        ValueError: there are no tokens, one is out of range, or an argument is impossible.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {', '.join(get_args(Level))}, got {level!r}")
    if not len(token_ids) or count < 1 or top < 1:
        raise ValueError(f"give at least one token, count and top, got {len(token_ids)}, {count} and {top}")
    check_token_ids(token_ids.cpu(), memory.vocab_size)
    head, found = centred_head(memory), []
    for layer in layers:
        for first, vectors in _vectors(memory, level, layer):
            signs = (1, -1) if level == "values" else (1,)
            sides = [share_of_top(vectors, head, token_ids, top=top, sign=sign) for sign in signs]
            best = torch.stack(sides).amax(0).topk(min(count, len(vectors)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [(layer, first + place, share) for place, share in pairs if share > 0]
        found = sorted(found, key=lambda entry: -entry[2])[:count]
    return found


def _vectors(memory: TokenMemory, level: Level, layer: int) -> Iterator[tuple[int, Float[Tensor, "N D"]]]:
    """All values or rows of a layer, and the place of the first of each part."""
    if level == "values":
        yield 0, memory.values(layer)
        return
    for ids in memory.vocabulary_chunks():
        yield int(ids[0]), memory.rows(ids, layer=layer)


def direction_of(memory: TokenMemory, token_ids: Int[Tensor, " S"]) -> Float[Tensor, " D"]:
    """What a vector is multiplied by to get the mean logit of some tokens, less the mean of all, as projected."""
    head = centred_head(memory)
    return head[token_ids.to(head.device)].mean(0)


def lowered_rows(
    memory: TokenMemory, rows: Float[Tensor, "N D"], token_ids: Int[Tensor, " S"], *, strength: float
) -> Float[Tensor, "N D"]:
    """Rows less `strength` of what raises the tokens' mean logit in them; rows that do not raise it stay."""
    direction = direction_of(memory, token_ids).to(rows)
    raising = (rows @ direction).clamp(min=0)
    return rows - strength * (raising / (direction @ direction))[:, None] * direction
