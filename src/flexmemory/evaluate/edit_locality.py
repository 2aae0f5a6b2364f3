"""What an edit does to text: windows that hold the edited token, and windows that do not.

An edit of rows cannot change a window without the token, by a bit; `TextEffect.identical` says whether that is so.
Dimension key: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.model.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextEffect:
    """Logits after an edit against those before, at every position from the edited token on."""

    positions: int
    kl: float
    """Mean divergence from the distribution before, in nats."""
    argmax_changed: float
    """Share of positions whose likeliest token is another."""
    nats: float
    """Mean rise of the loss of the text."""
    identical: bool
    """Whether every logit has the same bits."""


class TextWindows:
    """Windows of a text, found by the tokens that they hold."""

    def __init__(self, stream: Int[Tensor, " N"], *, length: int, device: torch.device) -> None:
        """Cut `stream` into windows of `length` tokens.

        Raises:
            ValueError: it is shorter than one.
        """
        count = len(stream) // length
        if count == 0:
            raise ValueError(f"{len(stream)} tokens are no window of {length}")
        self.windows = stream[: count * length].view(count, length).to(device)

    def holding(self, token_id: int, *, count: int) -> Int[Tensor, "W T"]:
        """Windows with the token, at most `count`, the first ones."""
        return self.windows[(self.windows == token_id).any(dim=1)][:count]

    def lacking(self, token_id: int, *, count: int) -> Int[Tensor, "W T"]:
        """Windows without it, evenly spaced."""
        found = self.windows[~(self.windows == token_id).any(dim=1)]
        return found[:: max(1, len(found) // count)][:count]


@torch.no_grad()
def logits_of(model: Transformer, windows: Int[Tensor, "W T"]) -> Float[Tensor, "W T V"]:
    """Of the next token, everywhere."""
    return model(windows)


@torch.no_grad()
def text_effect(
    before: Float[Tensor, "W T V"], after: Float[Tensor, "W T V"], windows: Int[Tensor, "W T"], *, token_id: int | None
) -> TextEffect:
    """Compare logits of the same windows.

    Args:
        before: Those of the model as it was.
        after: Those of the edited one.
        windows: The text.
        token_id: Count positions from its first occurrence on; by default all.

    Raises:
        ValueError: no position is left.
    """
    counted = torch.ones_like(windows, dtype=torch.bool)
    if token_id is not None:
        counted = (windows == token_id).cumsum(dim=1) > 0
    counted[:, -1] = False  # nothing follows in the window
    if not counted.any():
        raise ValueError("no position of these windows is affected; choose others")
    old, new = (logits[counted].log_softmax(dim=-1) for logits in (before, after))
    targets = windows.roll(-1, dims=1)[counted][:, None]
    return TextEffect(
        positions=int(counted.sum()),
        kl=float((old.exp() * (old - new)).sum(dim=-1).mean()),
        argmax_changed=float((old.argmax(dim=-1) != new.argmax(dim=-1)).double().mean()),
        nats=float((old.gather(1, targets) - new.gather(1, targets)).mean()),
        identical=torch.equal(before, after),
    )
