"""The training loss: next-token cross entropy and z-loss (paper, Table 3), from hidden states and the head's matrix.

With 128k tokens in the vocabulary, logits and their gradient are the largest tensors of a step. `head_loss` never holds
those of more than a few thousand positions: it goes through the positions in chunks and computes gradients on the way,
so that each chunk's logits are needed once. `next_token_loss` is the same from whole logits, as written in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS_BYTES = 2**30
"""Size of a chunk's logits, at most (one position at least)."""
LogitsLoss = Callable[[Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]


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


def head_loss(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B T"] | Float[Tensor, "B T teacher"],
    *,
    z_loss: float,
    share: float = 1.0,
    logits_loss: LogitsLoss | None = None,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`share` times `next_token_loss` of the logits `hidden @ weight.T`; the cross entropy has no gradient.

    Args:
        hidden: What the head reads.
        weight: The head's matrix.
        targets: The next token of each position, or what else `logits_loss` compares logits with.
        z_loss: Weight of the squared log-partition.
        share: A factor, here because gradients are rounded to the dtype of `hidden` after it and not before.
        logits_loss: `logits_loss_and_gradient`, or a faster form of it, which may write over the logits.
        logits_bytes: Size of a chunk's logits, at most.
    """
    chunk = max(1, logits_bytes // (weight.shape[0] * weight.element_size()))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (targets.flatten(0, 1), z_loss, share, chunk, logits_loss or logits_loss_and_gradient, needs_gradient)
    return _HeadLoss.apply(hidden.flatten(0, 1), weight, *arguments)


def logits_loss_and_gradient(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], z_loss: float, scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, " 2"], Float[Tensor, "N V"]]:
    """Sums over positions of cross entropy and squared log-partition, and `scale` times the gradient of the loss.

    The gradient has the dtype of `logits`; the rest is computed in fp32 at least.
    """
    wide = logits.to(scale.dtype)
    log_partition = wide.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    chosen = wide.gather(-1, targets.unsqueeze(-1))  # (N, 1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
    chances = (wide - log_partition).exp()
    gradient = (chances * (1 + 2 * z_loss * log_partition) - is_target.to(wide.dtype)) * scale
    return torch.stack(((log_partition - chosen).sum(), log_partition.square().sum())), gradient.to(logits.dtype)


def distillation(teacher_weight: Float[Tensor, "V teacher"]) -> LogitsLoss:
    """A loss for `head_loss` whose targets are a teacher's hidden states: the divergence from its predictions.

    What is minimised is KL(teacher || model), so the "cross entropy" that comes back is that divergence: 0 where both
    agree.
    """

    def loss_and_gradient(
        logits: Float[Tensor, "N V"], hidden: Float[Tensor, "N teacher"], z_loss: float, scale: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, " 2"], Float[Tensor, "N V"]]:
        wide = logits.to(scale.dtype)
        log_partition = wide.logsumexp(dim=-1, keepdim=True)  # (N, 1)
        own = wide - log_partition
        wanted = (hidden @ teacher_weight.T).to(scale.dtype).log_softmax(dim=-1)
        chances = wanted.exp()
        gradient = (own.exp() * (1 + 2 * z_loss * log_partition) - chances) * scale
        divergence = (chances * (wanted - own)).sum()
        return torch.stack((divergence, log_partition.square().sum())), gradient.to(logits.dtype)

    return loss_and_gradient


class _HeadLoss(torch.autograd.Function):
    """Loss and cross entropy; gradients are made in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        share: float,
        chunk: int,
        logits_loss: LogitsLoss,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.full((), share / len(targets), dtype=wide, device=hidden.device)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if needs_gradient else None
        for start in range(0, len(targets), chunk):
            part = hidden[start : start + chunk]
            parts, gradient = logits_loss(part @ weight.T, targets[start : start + chunk], z_loss, scale)
            sums += parts
            if grad_weight is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + chunk])
                grad_weight.addmm_(gradient.T, part)
            del gradient  # before the next chunk's logits
        cross_entropy, square = sums * scale
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + z_loss * square, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grads[0].to(grad_hidden.dtype), grad_weight * grads[0].to(grad_weight.dtype), *[None] * 6)
