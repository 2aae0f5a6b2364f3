"""What to write: the vector, or the weights, that make a model answer otherwise. Many facts at once, each for itself.

For every fact a vector is added to the output of one layer or several (of their FFN) wherever the last
token of its subject stands, and found by gradient as v* is in ROME (arXiv 2202.05262): the new object shall follow
the prompt, after several beginnings; what else is said of the subject shall stay. Dimension key: N facts, P prompts of
each, T tokens, S layers searched, D model width, K cells, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flexmemory.evaluate.editing import Case
from flexmemory.evaluate.questions import Questions
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import DenseBlock, Transformer
from flexmemory.tokenizer import Tokenizer

ESSENCE = (" {} is a",)
"""What ROME keeps of a subject."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How a vector is searched for; ROME's settings where the scale of a model does not matter."""

    steps: int = 25
    lr: float = 0.3
    """Of Adam, in units of the layer's output at the subject, root mean square."""
    kept: tuple[str, ...] = ESSENCE
    """Prompts (`{}` the subject) whose next-token distribution shall stay; a record's own prompt is left out."""
    kl: float = 0.0625
    """Weight of that, as the mean KL divergence."""
    decay: float = 0.002
    """Weight of the squared length of the vector, in units of that of the output."""
    clamp: float = 4.0
    """Longest vector, in the same units."""
    enough: float = 0.05
    """Loss at which a fact is done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """The prompts of N facts as one batch: C that ask for the object, after several beginnings, and Q to keep."""

    questions: Questions
    """N * (C + Q) prompts."""
    size: int
    asking: int
    """C."""
    new: Int[Tensor, " N"]
    true: Int[Tensor, " N"]
    at: Bool[Tensor, "N P T"]
    """Where the last token of the fact's subject is."""

    @classmethod
    def of(
        cls,
        cases: Sequence[Case],
        *,
        contexts: Sequence[Sequence[int]],
        kept: Sequence[str],
        tokenizer: Tokenizer,
        device: torch.device,
    ) -> Group:
        """Lay out the prompts; the first context should be empty."""
        prompts: list[list[int]] = []
        for case in cases:
            request = case.record["requested_rewrite"]
            others = [prompt.format(request["subject"]) for prompt in kept if prompt != request["prompt"]]
            prompts += [[*context, *case.prompt] for context in contexts]
            prompts += [tokenizer.encode(other) for other in others[: max(1, len(kept) - 1)]]
        questions = Questions.of(prompts, boundary_id=tokenizer.boundary_id, device=device)
        token = torch.tensor([case.token for case in cases], device=device)
        shaped = questions.token_ids.view(len(cases), -1, questions.token_ids.shape[1])
        new, true = (torch.tensor(ids, device=device) for ids in zip(*((c.new, c.true) for c in cases), strict=True))
        return cls(questions, len(cases), len(contexts), new, true, shaped == token[:, None, None])

    def log_probs(self, model: Transformer) -> Float[Tensor, "N P V"]:
        """Of the next token after each prompt."""
        return self.questions.log_probs(model, batch=None).unflatten(0, (self.size, -1))

    def new_log_probs(self, log_probs: Float[Tensor, "N P V"]) -> Float[Tensor, " N"]:
        """Of the new object, the mean over the prompts that ask for it."""
        asking = log_probs[:, : self.asking]
        return asking.gather(2, self.new[:, None, None].expand(-1, self.asking, 1)).mean(dim=(1, 2))


@contextlib.contextmanager
def added(model: Transformer, additions: dict[int, Callable[[], Tensor]]) -> Iterator[None]:
    """Within the block, add what `additions[l]()` gives, (B, T, D), to the output of layer l."""

    def adding(make: Callable[[], Tensor]) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: output + make()

    handles = [model.blocks[layer].register_forward_hook(adding(make)) for layer, make in additions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keys_and_outputs(
    model: Transformer,
    cases: Sequence[Case],
    *,
    layer: int,
    contexts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N D"]]:
    """Coefficients and FFN output of a layer at the subjects' last tokens; of a dense model the mean over contexts."""
    tokens = torch.tensor([case.token for case in cases])
    if model.config.has_memory:
        memory = TokenMemory(model)
        return memory.coefficients(tokens, layer=layer), memory.rows(tokens, layer=layer)
    group = Group.of(cases, contexts=contexts, kept=(), tokenizer=tokenizer, device=model.device)
    block = model.blocks[layer]
    assert isinstance(block, DenseBlock)
    seen: list[Tensor] = []
    handle = block.ffn.down.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model.hidden_states(group.questions.token_ids)
    handle.remove()
    at = group.at[:, : group.asking].unsqueeze(-1)  # (N, P, T, 1)
    found = seen[0].unflatten(0, (group.size, -1))[:, : group.asking]  # (N, P, T, K)
    keys = (found * at).sum(dim=(1, 2)) / at.sum(dim=(1, 2))
    return keys, block.ffn.down(keys).detach()


def search_vectors(
    model: Transformer,
    cases: Sequence[Case],
    *,
    layers: Sequence[int],
    contexts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    search: Search,
) -> Float[Tensor, "N S D"]:
    """For each fact, what to add to the output of each of `layers` at the last token of its subject."""
    group = Group.of(cases, contexts=contexts, kept=search.kept, tokenizer=tokenizer, device=model.device)
    outputs = [
        keys_and_outputs(model, cases, layer=layer, contexts=contexts, tokenizer=tokenizer)[1] for layer in layers
    ]
    length = torch.stack(outputs, dim=1).norm(dim=2, keepdim=True)  # (N, S, 1)
    unit = length / outputs[0].shape[1] ** 0.5
    with torch.no_grad():
        before = group.log_probs(model)[:, group.asking :]
    z = torch.zeros(len(cases), len(layers), outputs[0].shape[1], device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=search.lr)
    additions = {
        layer: lambda number=number: _at(group.at, (z * unit)[:, number]) for number, layer in enumerate(layers)
    }
    for _ in range(search.steps):
        with added(model, additions):
            log_probs = group.log_probs(model)
        kept = log_probs[:, group.asking :]
        divergence = (before.exp() * (before - kept)).sum(dim=2).mean(dim=1)
        size = ((z * unit) / length).square().sum(dim=2).mean(dim=1)
        loss = -group.new_log_probs(log_probs) + search.kl * divergence + search.decay * size  # (N,)
        optimizer.zero_grad()
        loss.sum().backward()
        done = (loss < search.enough)[:, None, None]
        earlier = z.detach().clone()
        optimizer.step()
        with torch.no_grad():
            shrink = (search.clamp * length / (z * unit).norm(dim=2, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            z.copy_(torch.where(done, earlier, z * shrink))
    return (z * unit).detach()


def margin_gradients(
    model: Transformer,
    cases: Sequence[Case],
    *,
    layer: int,
    contexts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N D"]]:
    """Of log p(new) - log p(true) in the prompt: the mean over contexts, and its gradient by the output of a layer."""
    group = Group.of(cases, contexts=contexts, kept=(), tokenizer=tokenizer, device=model.device)
    vectors = torch.zeros(len(cases), model.config.hidden_size, device=model.device, requires_grad=True)
    with added(model, {layer: lambda: _at(group.at, vectors)}):
        log_probs = group.log_probs(model)[:, : group.asking].mean(dim=1)
    margins = (log_probs.gather(1, group.new[:, None]) - log_probs.gather(1, group.true[:, None]))[:, 0]
    (gradients,) = torch.autograd.grad(margins.sum(), vectors)
    return margins.detach(), gradients


def fine_tune(
    model: Transformer,
    cases: Sequence[Case],
    *,
    layer: int,
    limit: float,
    tokenizer: Tokenizer,
    steps: int = 25,
    together: bool = False,
) -> Float[Tensor, "N D K"]:
    """FT-L: what gradient steps on the prompt add to W_down of a layer, no entry by more than `limit`.

    Each fact has a change of its own, or with `together` all have the one that is best for all: (1, D, K).
    """
    group = Group.of(cases, contexts=[()], kept=(), tokenizer=tokenizer, device=model.device)
    ids = group.questions.token_ids
    size = 1 if together else len(cases)
    width, cells = model.config.hidden_size, model.config.intermediate_size
    change = torch.zeros(size, width, cells, device=model.device, dtype=model.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=limit / 5)
    block = model.blocks[layer]
    seen: list[Tensor] = []
    handle: RemovableHandle | None = None
    if isinstance(block, DenseBlock):
        handle = block.ffn.down.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    else:
        seen.append(TokenMemory(model).coefficients(ids.flatten(), layer=layer).view(*ids.shape, cells))

    def addition() -> Tensor:
        weights = change.expand(len(cases), -1, -1).repeat_interleave(len(ids) // len(cases), dim=0)
        return torch.einsum("ntk,ndk->ntd", seen[-1], weights)

    for _ in range(steps):
        with added(model, {layer: addition}):
            log_probs = group.log_probs(model)
        loss = -group.new_log_probs(log_probs)
        optimizer.zero_grad()
        loss.sum().backward()
        earlier = change.detach().clone()
        optimizer.step()
        with torch.no_grad():
            change.clamp_(-limit, limit)
            if not together:
                change.copy_(torch.where((loss < 0.01)[:, None, None], earlier, change))
    if handle is not None:
        handle.remove()
    return change.detach()


def _at(at: Bool[Tensor, "N P T"], vectors: Float[Tensor, "N D"]) -> Float[Tensor, "NP T D"]:
    """Each fact's vector at its places, 0 elsewhere."""
    return (at[..., None] * vectors[:, None, None]).flatten(0, 1)
