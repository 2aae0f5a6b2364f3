"""The loss equals its definition, in value and gradient."""

import pytest
import torch

from flexmemory.train.loss import next_token_loss


def naive(logits, targets, *, z_loss):
    """Cross entropy and z-loss position by position, in plain sums."""
    losses, entropies = [], []
    for row, target in zip(logits.flatten(0, 1), targets.flatten(), strict=True):
        partition = row.exp().sum().log()
        entropies.append(partition - row[target])
        losses.append(entropies[-1] + z_loss * partition**2)
    return torch.stack(losses).mean(), torch.stack(entropies).mean()


@pytest.mark.parametrize("z_loss", [0.0, 1e-6, 0.1])
def test_equals_the_naive_form_with_gradients(z_loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 5), generator=generator)
    loss, entropy = next_token_loss(logits, targets, z_loss=z_loss)
    expected, expected_entropy = naive(logits, targets, z_loss=z_loss)
    torch.testing.assert_close((loss, entropy), (expected, expected_entropy), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(1, 3, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([[0, 1, 2]])
    loss, entropy = next_token_loss(logits, targets, z_loss=1e-4)
    assert loss.dtype == entropy.dtype == torch.float32
    expected, _ = naive(logits.double(), targets, z_loss=1e-4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_huge_logits_stay_finite():
    logits = torch.full((1, 1, 3), 1e4)
    loss, entropy = next_token_loss(logits, torch.tensor([[1]]), z_loss=0.0)
    assert entropy.item() == loss.item() == pytest.approx(1.0986, abs=1e-3)
