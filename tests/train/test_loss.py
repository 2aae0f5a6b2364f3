"""The loss equals its definition, in value and gradient."""

import pytest
import torch

from flexmemory.train.loss import distillation, head_loss, logits_loss_and_gradient, next_token_loss


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


def head_inputs(dtype=torch.float64, *, sequences=2, vocab_size=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, 5, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (sequences, 5), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("positions", [1, 4, 10, 100])
@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_the_chunked_head_equals_whole_logits_with_gradients(positions, share):
    """For chunks that divide the 10 positions, do not, or hold them all."""
    hidden, weight, targets = head_inputs()
    logits_bytes = positions * len(weight) * 8
    loss, entropy = head_loss(hidden, weight, targets, z_loss=0.01, share=share, logits_bytes=logits_bytes)
    expected = [share * value for value in next_token_loss(hidden @ weight.T, targets, z_loss=0.01)]
    torch.testing.assert_close([loss, entropy], expected, rtol=1e-12, atol=0)
    assert not entropy.requires_grad
    gradients = torch.autograd.grad(loss * 7, (hidden, weight))
    expected_gradients = torch.autograd.grad(expected[0] * 7, (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-14)


def test_chunks_bound_the_logits_held():
    hidden, weight, targets = head_inputs(sequences=8)
    seen = []

    def spy(logits, *arguments):
        seen.append(tuple(logits.shape))
        return logits_loss_and_gradient(logits, *arguments)

    head_loss(hidden, weight, targets, z_loss=0.0, logits_loss=spy, logits_bytes=16 * 37 * 8)
    assert seen == [(16, 37), (16, 37), (8, 37)]


def test_in_bf16_chunks_are_as_close_to_fp64_as_whole_logits():
    """The error rule of docs/training.md, with a share that bf16 cannot hold."""
    hidden, weight, targets = head_inputs(torch.bfloat16, sequences=64, vocab_size=997)
    rounded = (hidden, weight)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in rounded]
    expected = torch.autograd.grad(
        next_token_loss(exact_inputs[0] @ exact_inputs[1].T, targets, z_loss=1e-4)[0] / 3, exact_inputs
    )
    plain = torch.autograd.grad(next_token_loss(rounded[0] @ rounded[1].T, targets, z_loss=1e-4)[0] / 3, rounded)
    loss, _ = head_loss(hidden, weight, targets, z_loss=1e-4, share=1 / 3, logits_bytes=100 * 997 * 2)
    assert loss.dtype == torch.float32
    for found, whole, exact in zip(torch.autograd.grad(loss, rounded), plain, expected, strict=True):
        error, whole_error = ((gradient.double() - exact).norm() / exact.norm() for gradient in (found, whole))
        assert error <= 2 * whole_error


def test_without_gradients_the_chunked_head_makes_none():
    hidden, weight, targets = head_inputs()
    with torch.no_grad():
        loss, entropy = head_loss(hidden, weight, targets, z_loss=0.01)
    torch.testing.assert_close(
        (loss, entropy), next_token_loss(hidden.detach() @ weight.detach().T, targets, z_loss=0.01)
    )
    assert not loss.requires_grad


@pytest.mark.parametrize("positions", [1, 4, 100])
def test_distillation_is_the_divergence_from_the_teacher_with_gradients(positions):
    hidden, weight, _ = head_inputs()
    generator = torch.Generator().manual_seed(1)
    teacher_hidden = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(37, 24, generator=generator, dtype=torch.float64)
    loss, divergence = head_loss(
        hidden, weight, teacher_hidden, z_loss=0.01, share=0.5, logits_loss=distillation(teacher_weight),
        logits_bytes=positions * len(weight) * 8,
    )  # fmt: skip
    own, wanted = hidden @ weight.T, (teacher_hidden @ teacher_weight.T).softmax(-1)
    expected = (wanted * (wanted.log() - own.log_softmax(-1))).sum(-1).mean()
    whole = 0.5 * (expected + 0.01 * own.logsumexp(-1).square().mean())
    torch.testing.assert_close((loss, divergence), (whole, 0.5 * expected), rtol=1e-12, atol=1e-12)
    for found, right in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_a_model_that_agrees_with_its_teacher_has_nothing_to_learn():
    hidden, weight, _ = head_inputs()
    loss, divergence = head_loss(hidden, weight, hidden.detach(), z_loss=0.0, logits_loss=distillation(weight.detach()))
    assert abs(float(divergence)) < 1e-12
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-12
