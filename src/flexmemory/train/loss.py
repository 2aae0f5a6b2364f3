"""The training loss: next-token cross entropy and z-loss (paper, Table 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def next_token_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], *, z_loss: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss to minimise and the cross entropy in it, in nats, both means over positions.

    The loss is the cross entropy plus `z_loss` times the mean square of the log-partition, which keeps logits from
    drifting. Computed in fp32 at least, whatever the dtype of `logits`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_partition = logits.logsumexp(dim=-1)  # (B, T)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T)
    cross_entropy = (log_partition - chosen).mean()
    return cross_entropy + z_loss * log_partition.square().mean(), cross_entropy
