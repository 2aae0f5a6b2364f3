"""Several numbered streams as one: which stream the n-th item comes from, in fixed shares, from any n.

The streams are leaves of a binary tree. Of the first n items that reach a node, its first child gets n times its share,
rounded to the nearest: so an item's way down is a closed form of its number. The lightest nodes are joined first, as in
Huffman's tree: then no stream is ever 2 items off its share of a prefix, nor 1 where there are at most three.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class _Node:
    weight: int
    stream: int
    """Of a leaf."""
    children: tuple[_Node, _Node] | None = None

    def first_gets(self, count: int) -> int:
        """Of the first `count` items here, those of the first child."""
        assert self.children is not None
        return (2 * count * self.children[0].weight + self.weight) // (2 * self.weight)


class Interleaving:
    """Places of numbered items in streams; the same for ever, for the same weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        """Give stream k `weights[k]` of every `sum(weights)` items."""
        assert min(weights) >= 0
        numbers = itertools.count()  # breaks ties
        heap = [(weight, next(numbers), _Node(weight, stream)) for stream, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (light, _, second), (heavy, _, first) = heapq.heappop(heap), heapq.heappop(heap)
            weight = light + heavy
            heapq.heappush(heap, (weight, next(numbers), _Node(weight, -1, (first, second))))
        self._root = heap[0][2]

    def place(self, number: int) -> tuple[int, int]:
        """The stream of item `number`, and how many of that stream come before it."""
        node = self._root
        while node.children is not None:
            before = node.first_gets(number)
            if node.first_gets(number + 1) > before:
                node, number = node.children[0], before
            else:
                node, number = node.children[1], number - before
        return node.stream, number
