"""Patches: edits of a memory as a small file, applied to a copy of what they change (docs/editing.md).

A patch is a list of steps. Each gives new numbers for some rows, values, keys, gates or embeddings, or adds an outer
product to W_down; what is not named keeps its bits. Dimension key: N changed vectors, D model width, K cells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from flexmemory.model.checkpoint import fingerprint_of
from flexmemory.model.ffn import SwiGLU
from flexmemory.model.memory import GivenRows, Rows
from flexmemory.model.transformer import Transformer, check_token_ids
from flexmemory.storage import publish_file

FORMAT = "flexmemory-patch"
FORMAT_VERSION = 1
IDS = (torch.int64, torch.int32)
NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EVERY_LAYER = -1
"""The layer of an embedding, which all layers see."""

Module = TypeVar("Module", bound=nn.Module)
Kind = Literal["rows", "values", "keys", "gates", "embedding", "outer"]
"""What a step changes: rows of tokens; columns of W_down; rows of W_up; rows of W_gate; input embeddings of tokens; all
of W_down, by adding an outer product of `numbers` [D] and `factors` [K] for each n."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One change in one layer."""

    kind: Kind
    layer: int
    """The layer, or `EVERY_LAYER` for embeddings."""
    numbers: Float[Tensor, "N D"]
    """What is there afterwards; of an outer product, the left factor."""
    ids: Int[Tensor, " N"] | None = None
    """Tokens or cells, distinct; None for outer products."""
    factors: Float[Tensor, "N K"] | None = None
    """The right factor of an outer product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """Steps, and what they were made for."""

    steps: tuple[Step, ...]
    shape: dict[str, int]
    """V, L, D and K of the model: `vocab_size`, `num_layers`, `hidden_size`, `intermediate_size`."""
    base: str = ""
    """Fingerprint of the checkpoint that it was made for; empty for a model that is in memory only."""
    tokenizer: str = ""
    """Fingerprint of its tokenizer; empty where there is none."""
    tokens: tuple[int, ...] = ()
    """The tokens that the edit is about, ascending: a spill report is about the others."""
    what: tuple[str, ...] = ()
    """What was done, in words."""
    description: str = ""
    """Why, in the words of whoever made it."""

    @property
    def rows_only(self) -> bool:
        """Whether it changes nothing but rows of tokens, so that a store can be given it without the weights."""
        return all(step.kind == "rows" for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        tensors = [tensor for step in self.steps for tensor in (step.ids, step.numbers, step.factors)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def apply(self, model: Transformer) -> Transformer:
        """An edited copy of `model`, which shares with it all that it does not change.

        Raises:
            ValueError: the model has another shape, or no memory.
        """
        check_shape(self, shape_of(model))
        edited = shared_copy(model)
        for step in self.steps:
            take_step(edited, step)
        return edited

    def over(self, rows: Rows, token_ids: Int[Tensor, "B T"]) -> EditedRows:
        """The rows of a batch, computed or looked up, under this patch, which must change rows alone.

        Raises:
            ValueError: it changes weights.
        """
        if not self.rows_only:
            raise ValueError("the patch changes weights, and with them every row: apply it to the model")
        return EditedRows(rows, token_ids, self)

    def to_bytes(self) -> bytes:
        """The file."""
        tensors: dict[str, Tensor] = {}
        for number, step in enumerate(self.steps):
            for field in ("ids", "numbers", "factors"):
                if (tensor := getattr(step, field)) is not None:
                    tensors[f"{number:05d}.{field}"] = tensor.cpu().contiguous().clone()  # some are shared
        header = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "steps"
        } | {"steps": [{"kind": step.kind, "layer": step.layer} for step in self.steps]}
        # One entry: safetensors writes several in any order, and the same patch shall be the same bytes.
        return save(tensors, {FORMAT: json.dumps({"format_version": FORMAT_VERSION, **header})})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            FileExistsError: it exists.
            OSError: it could not be written.
        """
        publish_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no patch, or of a newer format.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no patch at {path}; `flexmemory edit` writes them")
        return cls.from_bytes(path.read_bytes(), name=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Patch:
        """Read the content of a patch file, called `name` in errors; what is in it is checked, whoever made it.

        Raises:
            ValueError: it is damaged, no patch, or of a newer format.
        """
        try:
            tensors = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            if FORMAT not in metadata:
                raise ValueError(f"{name} is not a patch: its header has no {FORMAT!r}")
            header = json.loads(metadata[FORMAT])
            if (version := header.pop("format_version")) > FORMAT_VERSION:
                raise ValueError(
                    f"{name} has patch format {version}; this version reads up to {FORMAT_VERSION}: update flexmemory"
                )
            return cls._parsed(header, tensors)
        except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} cannot be read as a patch ({error}); it is damaged") from error

    @classmethod
    def _parsed(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Patch:
        for name, tensor in tensors.items():
            if tensor.dtype not in (IDS if name.endswith(".ids") else NUMBERS):
                raise TypeError(f"{name} is of {tensor.dtype}")
        steps = [
            Step(
                kind=entry["kind"],
                layer=entry["layer"],
                numbers=tensors[f"{number:05d}.numbers"],
                ids=tensors.get(f"{number:05d}.ids"),
                factors=tensors.get(f"{number:05d}.factors"),
            )
            for number, entry in enumerate(header.pop("steps"))
        ]
        patch = cls(steps=tuple(steps), **{**header, "tokens": tuple(header["tokens"]), "what": tuple(header["what"])})
        if not all(isinstance(number, int) for number in (*patch.tokens, *(step.layer for step in steps))):
            raise TypeError("tokens and layers are whole numbers")
        for step in patch.steps:
            check_step(step, patch.shape)
        check_token_ids(torch.tensor(patch.tokens, dtype=torch.int64), patch.shape["vocab_size"])
        return patch


class EditedRows:
    """Rows under a patch, as `model.memory.ScaledRows` are rows under factors; nothing else of them changes."""

    def __init__(self, rows: Rows, token_ids: Int[Tensor, "B T"], patch: Patch) -> None:
        """Edit the `rows` of `token_ids`."""
        self._rows, self._token_ids = rows, token_ids
        given: dict[int, GivenRows] = {}
        for step in patch.steps:
            given[step.layer] = joined(given.get(step.layer), step)
        self._given = {layer: rows.to(token_ids.device) for layer, rows in given.items()}

    def layer(self, layer: int) -> Float[Tensor, "B T D"] | None:
        """The rows of layer `layer`.

        Raises:
            ValueError: they are edited, and `rows` does not hold them.
        """
        rows = self._rows.layer(layer)
        if layer not in self._given:
            return rows
        if rows is None:
            raise ValueError(f"the patch changes rows of layer {layer}, which was left out of the rows at hand")
        return self._given[layer](self._token_ids, rows)

    def embeddings(self) -> Float[Tensor, "B T D"] | None:
        """Those of the rows that are edited."""
        return self._rows.embeddings()


def stack(patches: Iterable[Patch]) -> Patch:
    """One patch for several, applied in this order.

    Raises:
        ValueError: there are none, or they were made for different models.
    """
    several = list(patches)
    if not several:
        raise ValueError("there is no patch to apply")
    first = several[0]
    for other in several[1:]:
        check_shape(other, first.shape)
        if (other.base, other.tokenizer) != (first.base, first.tokenizer):
            raise ValueError(
                f"patches were made for different checkpoints ({first.base[:12] or 'none'} and "
                f"{other.base[:12] or 'none'}): apply the first, then the other to the result"
            )
    return dataclasses.replace(
        first,
        steps=tuple(step for patch in several for step in patch.steps),
        tokens=tuple(sorted({token for patch in several for token in patch.tokens})),
        what=tuple(line for patch in several for line in patch.what),
        description="; ".join(patch.description for patch in several if patch.description),
    )


def check_base(patch: Patch, *, fingerprints: Iterable[str], tokenizer: str, target: Path) -> None:
    """Refuse a patch that was made for something else than `target`, whose fingerprint or ancestors' these are.

    Raises:
        ValueError: as said.
    """
    known = [fingerprint[:12] for fingerprint in fingerprints if fingerprint == patch.base]
    if not known or patch.tokenizer != tokenizer:
        made_for = f"checkpoint {patch.base[:12]}" if patch.base else "a model that was in memory only"
        what = "another tokenizer" if known else f"{made_for}, not for that of {target}"
        raise ValueError(
            f"the patch was made for {what}; use the checkpoint that it was made for, or make it again from this one"
        )


def edited_fingerprint(base: str, patches: Iterable[Patch]) -> str:
    """The fingerprint of a checkpoint with patches applied to it."""
    return fingerprint_of(base, *(patch.fingerprint for patch in patches))


def shape_of(model: Transformer) -> dict[str, int]:
    """What a patch and a model must agree on."""
    return {
        name: getattr(model.config, name) for name in ("vocab_size", "num_layers", "hidden_size", "intermediate_size")
    }


def check_shape(patch: Patch, shape: dict[str, int]) -> None:
    """Refuse a patch for a model of another shape.

    Raises:
        ValueError: as said.
    """
    if patch.shape != shape:
        raise ValueError(f"the patch is for a model of {patch.shape}, got one of {shape}")


def check_step(step: Step, shape: dict[str, int]) -> None:
    """Refuse a step that such a model cannot take.

    Raises:
        ValueError: unknown kind, layer or ids out of range, repeated ids, wrong shapes, numbers that are not finite.
    """
    if step.kind not in get_args(Kind):
        raise ValueError(f"unknown kind of edit {step.kind!r}; this version has {', '.join(get_args(Kind))}")
    count, width = len(step.numbers), step.numbers.shape[-1]
    last = shape["num_layers"] - 1
    if (step.layer != EVERY_LAYER) if step.kind == "embedding" else not 0 <= step.layer <= last:
        raise ValueError(f"layer {step.layer} is out of range: the model has layers 0 to {last}")
    if step.numbers.ndim != 2 or count == 0 or width != shape["hidden_size"]:
        raise ValueError(f"{step.kind} are vectors of {shape['hidden_size']}, got {list(step.numbers.shape)}")
    if step.kind == "outer":
        wanted = (count, shape["intermediate_size"])
        if step.factors is None or step.factors.shape != wanted or not step.factors.isfinite().all():
            raise ValueError(f"an outer product needs finite factors of shape {list(wanted)}")
    elif step.ids is None or step.ids.shape != (count,) or len(step.ids.unique()) < count:
        raise ValueError(f"{count} {step.kind} need as many distinct ids, got {step.ids}")
    elif step.kind in ("rows", "embedding"):
        check_token_ids(step.ids, shape["vocab_size"])
    elif not 0 <= int(step.ids.min()) <= int(step.ids.max()) < shape["intermediate_size"]:
        raise ValueError(f"keys {step.ids.tolist()[:5]} are out of range: a layer has {shape['intermediate_size']}")
    if not step.numbers.isfinite().all():
        raise ValueError(f"{step.kind} of layer {step.layer} are not all finite")


def shared_copy(model: Module) -> Module:
    """A copy with modules of its own and the very tensors of `model`, to be replaced and not written to."""
    twin = model.__new__(type(model))  # copy.deepcopy takes ten times as long, and previews make several
    vars(twin).update({name: own.copy() if isinstance(own, dict) else own for name, own in vars(model).items()})
    for name, child in model.named_children():
        twin.add_module(name, shared_copy(child))
    return twin


@torch.no_grad()
def take_step(model: Transformer, step: Step) -> None:
    """Replace what `step` changes; tensors that others may share are not written to."""
    check_step(step, shape_of(model))
    device = model.device
    numbers, ids = step.numbers.to(device), None if step.ids is None else step.ids.to(device)
    if step.kind == "embedding":
        assert model.embedding is not None
        assert ids is not None
        _replace(model.embedding, model.embedding.weight.index_copy(0, ids, numbers.to(model.embedding.weight)))
        model.tie_head()
        return
    memory = model.memories[step.layer]
    if step.kind == "rows":
        memory.given = joined(memory.given, step).to(device)
        return
    ffn = memory.ffn
    if ffn is None:
        raise ValueError("a free table has no keys and values: only its rows can be edited")
    if step.kind == "outer":
        assert step.factors is not None
        weight = ffn.down.weight
        for left, right in zip(numbers.double(), step.factors.to(device).double(), strict=True):
            weight = (weight.double() + torch.outer(left, right)).to(weight.dtype)
        _replace(ffn.down, weight)
    else:
        assert ids is not None
        module = module_of(ffn, step.kind)
        axis = 1 if step.kind == "values" else 0
        changed = numbers.to(module.weight)
        _replace(module, module.weight.index_copy(axis, ids, changed.T if axis else changed))


def module_of(ffn: SwiGLU, kind: Kind) -> nn.Linear:
    """The matrix that a step of this kind changes."""
    return {"values": ffn.down, "outer": ffn.down, "keys": ffn.up, "gates": ffn.gate}[kind]


def _replace(module: nn.Linear | nn.Embedding, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)


def joined(given: GivenRows | None, step: Step) -> GivenRows:
    """Given rows with those of `step` over them."""
    assert step.ids is not None
    if given is None:
        return GivenRows(step.ids.long(), step.numbers)
    ids, numbers = step.ids.to(given.ids), step.numbers.to(given.rows)
    kept = ~torch.isin(given.ids, ids)
    return GivenRows(torch.cat((given.ids[kept], ids)), torch.cat((given.rows[kept], numbers)))
