"""Look into the one forward pass, and change it, under the names that TransformerLens users know.

What is captured is what the model itself computes, by hooks on its own modules, so capturing changes no bit of it.
FFN-M runs once per distinct token; its activations are shown at every position of theirs. Names, for layer l:

    hook_embed                                 (B, T, D)  input embeddings
    blocks.l.hook_resid_pre, hook_resid_post   (B, T, D)  the residual stream before and after the block
    blocks.l.hook_attn_out                     (B, T, D)  what attention adds
    blocks.l.hook_mlp_out                      (B, T, D)  what FFN-M adds, the row; in a dense model what its FFN adds
    blocks.l.hook_ffn_c_out                    (B, T, D)  what FFN-C adds (flex)
    blocks.l.mlp.hook_pre, hook_pre_linear     (B, T, K)  the gate before SiLU, the other factor (FFN-M, or FFN)
    blocks.l.mlp.hook_post                     (B, T, K)  their product: c of Eq. 2.7
    ln_final.hook_normalized                   (B, T, D)  what the head reads

Residual streams are sums: hook_resid_post = hook_resid_pre + hook_attn_out + hook_mlp_out (+ hook_ffn_c_out).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flexmemory.model.memory import Rows, unique_ids
from flexmemory.model.transformer import DenseBlock, FlexBlock, MemoryBlock, Transformer

HookFunction = Callable[[Tensor, str], Tensor | None]
"""Sees an activation and its name; what it returns, if anything, takes the activation's place."""
Names = Sequence[str] | Callable[[str], bool] | None
_CELLS = ("pre", "pre_linear", "post")


def hook_names(model: Transformer, *, cells: bool = True) -> list[str]:
    """All names of a model, in the order of the computation.

    Args:
        model: The model.
        cells: Whether those of FFN-M's cells are among them; rows that are looked up have none.
    """
    names = ["hook_embed"]
    for layer, block in enumerate(model.blocks):
        here = [f"blocks.{layer}.mlp.hook_{name}" for name in _CELLS] if cells and _has_cells(block) else []
        context = [f"blocks.{layer}.hook_ffn_c_out"] if isinstance(block, FlexBlock) else []
        before = [f"blocks.{layer}.{name}" for name in ("hook_resid_pre", "hook_attn_out")]
        names += [*before, *here, *context, f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_resid_post"]
    return [*names, "ln_final.hook_normalized"]


class ActivationCache(Mapping[str, Tensor]):
    """Activations by name."""

    def __init__(self, activations: Mapping[str, Tensor], *, num_layers: int) -> None:
        """Keep `activations`."""
        self._activations = dict(activations)
        self._num_layers = num_layers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._activations:
            raise KeyError(f"{name} was not kept; there are {', '.join(self._activations) or 'none'}")
        return self._activations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def accumulated_resid(self) -> tuple[Float[Tensor, "points B T D"], list[str]]:
        """The residual stream before each layer and at the end, with labels (`0_pre`, ..., `final_post`)."""
        last = self._num_layers - 1
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)] + [f"blocks.{last}.hook_resid_post"]
        labels = [f"{layer}_pre" for layer in range(last + 1)] + ["final_post"]
        return torch.stack([self[name] for name in names]), labels

    def decompose_resid(self) -> tuple[Float[Tensor, "parts B T D"], list[str]]:
        """Everything that was added up to the final residual stream, with labels (`embed`, `0_attn_out`, ...).

        The sum over parts is `hook_resid_post` of the last layer, to rounding.
        """
        parts, labels = [self["hook_embed"]], ["embed"]
        for layer in range(self._num_layers):
            for kind in ("attn_out", "ffn_c_out", "mlp_out"):
                name = f"blocks.{layer}.hook_{kind}"
                if name in self or kind != "ffn_c_out":
                    parts.append(self[name])
                    labels.append(f"{layer}_{kind}")
        return torch.stack(parts), labels


@torch.no_grad()
def run_with_cache(
    model: Transformer, token_ids: Int[Tensor, "B T"], *, names: Names = None, rows: Rows | None = None
) -> tuple[Float[Tensor, "B T V"], ActivationCache]:
    """Logits, which are those of `model(token_ids, rows)` bit for bit, and the activations on the way.

    Args:
        model: Any model.
        token_ids: The input.
        names: Which activations to keep: names, or what says so of a name; by default all.
        rows: Rows that are looked up, scaled or edited; without them FFN-M computes
            them. Rows that are given have no cells.

    Raises:
        ValueError: a name does not exist.
    """
    kept: dict[str, Tensor] = {}

    def keep(activation: Tensor, name: str) -> None:
        kept[name] = activation.detach().clone()

    chosen = _chosen(model, names, cells=rows is None or not model.config.has_memory)
    logits = run_with_hooks(model, token_ids, [(name, keep) for name in chosen], rows=rows)
    order = {name: place for place, name in enumerate(chosen)}
    cache = {name: kept[name] for name in sorted(kept, key=lambda name: order[name])}
    return logits, ActivationCache(cache, num_layers=model.config.num_layers)


def run_with_hooks(
    model: Transformer,
    token_ids: Int[Tensor, "B T"],
    hooks: Sequence[tuple[str, HookFunction]],
    *,
    rows: Rows | None = None,
) -> Float[Tensor, "B T V"]:
    """Logits of a pass whose activations are shown to functions, which may replace them.

    Args:
        model: Any model; its hooks are removed again, whatever happens.
        token_ids: The input.
        hooks: Names (see the top of this file) and functions of (activation, name), called in this order.
        rows: As for `run_with_cache`.

    Raises:
        ValueError: a name does not exist, or rows are given and it is of FFN-M's cells.
    """
    has_cells = rows is None or not model.config.has_memory
    known = set(hook_names(model, cells=has_cells))
    functions: dict[str, list[HookFunction]] = {}
    for name, function in hooks:
        if name not in known:
            reason = "rows that are given have no cells" if name in hook_names(model) else "see hook_names(model)"
            raise ValueError(f"no activation is called {name!r}: {reason}")
        functions.setdefault(name, []).append(function)
    with contextlib.ExitStack() as stack:
        run = _Run(functions, stack)
        if model.config.has_memory:
            rows = _HookedRows(model, token_ids, rows, run)
        else:
            run.watch_embedding(model)
        for layer, block in enumerate(model.blocks):
            run.watch_block(layer, block)
        run.watch(model.norm, "ln_final.hook_normalized")
        return model(token_ids, rows)


class _Run:
    """The functions of one pass, and the modules that they are hooked to."""

    def __init__(self, functions: Mapping[str, list[HookFunction]], stack: contextlib.ExitStack) -> None:
        self.functions = functions
        self.stack = stack

    def show(self, name: str, activation: Tensor) -> Tensor:
        """Call the functions of a name; the activation itself comes back where none replaced it."""
        for function in self.functions.get(name, ()):
            found = function(activation, name)
            if found is None:
                continue
            if found.shape != activation.shape:
                raise ValueError(f"{name}: a hook gave {list(found.shape)}, expected {list(activation.shape)}")
            activation = found
        return activation

    def watch(self, module: nn.Module, name: str) -> None:
        """Show what a module gives."""

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.show(name, output)

        if name in self.functions:
            self.stack.callback(module.register_forward_hook(after).remove)

    def watch_input(self, module: nn.Module, name: str) -> None:
        """Show the first thing that a module gets."""

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self.show(name, args[0]), *args[1:]

        if name in self.functions:
            self.stack.callback(module.register_forward_pre_hook(before).remove)

    def watch_embedding(self, model: Transformer) -> None:
        assert model.embedding is not None
        self.watch(model.embedding, "hook_embed")

    def watch_block(self, layer: int, block: nn.Module) -> None:
        at = f"blocks.{layer}"
        assert isinstance(block, DenseBlock | MemoryBlock)
        self.watch_input(block, f"{at}.hook_resid_pre")
        self.watch(block.attention, f"{at}.hook_attn_out")
        self.watch(block, f"{at}.hook_resid_post")
        if isinstance(block, FlexBlock):
            self.watch(block.ffn_c, f"{at}.hook_ffn_c_out")
        if isinstance(block, DenseBlock):
            self.watch(block.ffn.gate, f"{at}.mlp.hook_pre")
            self.watch(block.ffn.up, f"{at}.mlp.hook_pre_linear")
            self.watch_input(block.ffn.down, f"{at}.mlp.hook_post")
            self.watch(block.ffn, f"{at}.hook_mlp_out")


class _HookedRows:
    """The rows of a batch, shown and perhaps replaced as the model asks for them.

    They are computed once per distinct token, as always. Only where a function replaces an activation of the cells
    is the row computed again from there, at every position.
    """

    def __init__(self, model: Transformer, token_ids: Int[Tensor, "B T"], rows: Rows | None, run: _Run) -> None:
        self._model, self._ids, self._run = model, token_ids, run
        self._seen: dict[str, Tensor] = {}
        if rows is None:
            _, self._index = unique_ids(token_ids)
            with contextlib.ExitStack() as stack:
                listening = _Run({name: [self._remember] for name in hook_names(model) if ".mlp." in name}, stack)
                for layer in self._layers_with_hooked_cells():
                    ffn, at = model.memories[layer].ffn, f"blocks.{layer}.mlp.hook"
                    assert ffn is not None
                    listening.watch(ffn.gate, f"{at}_pre")
                    listening.watch(ffn.up, f"{at}_pre_linear")
                    listening.watch_input(ffn.down, f"{at}_post")
                rows = model.rows(token_ids)
        self._rows = rows

    def _remember(self, activation: Tensor, name: str) -> None:
        self._seen[name] = activation

    def embeddings(self) -> Float[Tensor, "B T D"] | None:
        found = self._rows.embeddings()
        if "hook_embed" not in self._run.functions:
            return found
        return self._run.show("hook_embed", self._model.embed(self._ids) if found is None else found)

    def layer(self, layer: int) -> Float[Tensor, "B T D"] | None:
        row = self._rows.layer(layer)
        if layer in self._layers_with_hooked_cells():
            again = self._from_cells(layer)
            row = row if again is None else again
        name = f"blocks.{layer}.hook_mlp_out"
        return row if row is None else self._run.show(name, row)

    def _layers_with_hooked_cells(self) -> set[int]:
        return {int(name.split(".")[1]) for name in self._run.functions if ".mlp." in name}

    def _from_cells(self, layer: int) -> Float[Tensor, "B T D"] | None:
        """The row from replaced activations, or None where nothing was replaced."""
        names = {cell: f"blocks.{layer}.mlp.hook_{cell}" for cell in _CELLS}
        pre, linear, post = (self._seen[name][self._index] for name in names.values())  # (B, T, K) each
        new_pre, new_linear = self._run.show(names["pre"], pre), self._run.show(names["pre_linear"], linear)
        if new_pre is not pre or new_linear is not linear:
            post = new_linear * nn.functional.silu(new_pre)
        new_post = self._run.show(names["post"], post)
        if new_pre is pre and new_linear is linear and new_post is post:
            return None
        memory = self._model.memories[layer]
        assert memory.ffn is not None
        row = memory.ffn.down(new_post)
        row = row if memory.table is None else row + memory.table(self._ids)
        return row if memory.given is None else memory.given(self._ids, row)


def _has_cells(block: nn.Module) -> bool:
    if isinstance(block, DenseBlock):
        return True
    return isinstance(block, MemoryBlock) and block.memory is not None and block.memory.ffn is not None


def _chosen(model: Transformer, names: Names, *, cells: bool) -> list[str]:
    known = hook_names(model, cells=cells)
    if names is None:
        return known
    if callable(names):
        return [name for name in known if names(name)]
    unknown = [name for name in names if name not in known]
    if unknown:
        stems = sorted({re.sub(r"blocks\.\d+", "blocks.L", name) for name in known})
        raise ValueError(f"no activation is called {unknown[0]!r}; there are {', '.join(stems)}")
    return [name for name in known if name in set(names)]
