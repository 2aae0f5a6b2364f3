"""Nearest tokens of every token by cosine, exactly, in bounded memory.

Blocks of queries meet chunks of candidates; candidates are computed again for each block, which is cheap beside the
products as blocks are large. Dimension key: N queries, M candidates, X coordinates of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

Vectors = Callable[[Int[Tensor, " U"]], Float[Tensor, "U X"]]
"""What tokens are compared by, computed for some of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest candidates of each query, nearest first."""

    ids: Int64[Tensor, "N count"]
    cosines: Float[Tensor, "N count"]


@torch.no_grad()
def nearest(
    vectors: Vectors,
    *,
    queries: Int[Tensor, " N"],
    candidates: Int[Tensor, " M"],
    count: int,
    block_rows: int,
    chunk_rows: int,
) -> Nearest:
    """For each of the ids `queries` the `count` ids of `candidates` of largest cosine, itself left out.

    Args:
        vectors: Of token ids; zero vectors have cosine 0 with all.
        queries: Ids, on the device of the vectors.
        candidates: Ids, each once.
        count: Less than the number of candidates.
        block_rows: Queries whose vectors exist at once.
        chunk_rows: Candidates whose vectors exist at once: cosines are block_rows x chunk_rows.

    Raises:
        ValueError: `count` is not less than the number of candidates.
    """
    if not 0 < count < len(candidates):
        raise ValueError(f"{len(candidates)} candidates have no {count} neighbours each; ask for fewer")
    parts = []
    with tqdm(total=len(queries), desc="neighbors", unit="token", leave=False, disable=None) as bar:
        for block in queries.split(block_rows):
            directions = torch.cat([F.normalize(vectors(part), dim=1) for part in block.split(chunk_rows)])
            ids = block.new_zeros(len(block), 0)
            cosines = directions.new_zeros(len(block), 0)
            for chunk in candidates.split(chunk_rows):
                scores = directions @ F.normalize(vectors(chunk), dim=1).T
                scores.masked_fill_(block[:, None] == chunk, -torch.inf)
                best = scores.topk(min(count, len(chunk)), dim=1)
                ids = torch.cat([ids, chunk[best.indices]], dim=1)
                cosines = torch.cat([cosines, best.values], dim=1)
                best = cosines.topk(min(count, cosines.shape[1]), dim=1)
                ids, cosines = ids.gather(1, best.indices), best.values
            parts.append((ids.cpu(), cosines.cpu()))
            bar.update(len(block))
    return Nearest(*(torch.cat(part) for part in zip(*parts, strict=True)))
