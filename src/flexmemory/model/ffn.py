"""Feed-forward networks: SwiGLU, and the square-matrix reading of FFN-C."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.config import ModelConfig


class SwiGLU(nn.Module):
    """W_down ((x W_up^T) * SiLU(x W_gate^T)), Eq. 2.2 of the paper; K cells, no biases.

    Read as a memory (Sec. 2.3.1): keys are the rows of `up`, values the columns of `down`, `gate` reweights.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        """Allocate 3 * D * K weights."""
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def coefficients(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N K"]:
        """How much each cell's value contributes, c of Eq. 2.7."""
        return self.up(x) * F.silu(self.gate(x))

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The sum of the values, weighted by their coefficients."""
        return self.down(self.coefficients(x))


class SquareFFN(nn.Module):
    """FFN-C from one or two D x D matrices: one linear map, or D -> D -> D with SiLU between."""

    def __init__(self, hidden_size: int, ratio: int) -> None:
        """Allocate `ratio` (1 or 2) square matrices."""
        super().__init__()
        self.up = nn.Linear(hidden_size, hidden_size, bias=False) if ratio == 2 else None
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Apply the matrices."""
        return self.down(x if self.up is None else F.silu(self.up(x)))


def ffn_c(config: ModelConfig) -> SwiGLU | SquareFFN:
    """The context-aware part of a Flex layer (Sec. 4.2); the two readings coincide at b = 3."""
    if config.ffn_c == "square" and config.flex_ratio < 3:
        return SquareFFN(config.hidden_size, config.flex_ratio)
    return SwiGLU(config.hidden_size, config.ffn_c_size)
