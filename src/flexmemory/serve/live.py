"""What needs the model: rows projected on the vocabulary, prompts with scaled rows, generation.

One request computes at a time. Dimension key: T tokens, L layers, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from flexmemory.engine.reference import generate
from flexmemory.interpret.hooks import run_with_cache
from flexmemory.interpret.kept import Kept, tell_row_lengths
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.memory import Rows, ScaledRows
from flexmemory.model.transformer import Transformer
from flexmemory.serve.fields import Fields
from flexmemory.serve.records import Pairs, Records

MAX_PROMPT_TOKENS = 512
MAX_TEXT_LENGTH = 8192
MAX_NEW_TOKENS = 64
LISTED = 12
"""Tokens of a list."""
SIMILAR = 12
KEPT = 512
"""Answers that are kept for the next time."""
KEPT_TEXTS = 16
"""Texts whose next token and continuation are kept."""
KEPT_BYTES = 1 << 30
"""What passes over the vocabulary found, for previews of edits."""


class LiveModel:
    """A model that answers while it may be edited."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        records: Records,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the model of `checkpoint`, to answer beside `records` of its index; lists hold tokens of its mask alone.

        Raises:
            FileNotFoundError: the checkpoint has no tokenizer.
        """
        self.tokenizer = checkpoint.tokenizer()
        self.model = checkpoint.load(device=device, dtype=dtype)
        self.memory = TokenMemory(self.model)
        self.layers = records.index.layers
        self.mask = torch.tensor(records.index.tokens["kept"])
        self.lock = threading.RLock()
        self.kept = Kept(budget_bytes=KEPT_BYTES)
        if self.memory.exact and records.index.manifest.checkpoint_fingerprint == checkpoint.fingerprint:
            self._tell_lengths(records.index)
        self._model_number = 0
        self._rows = functools.lru_cache(maxsize=KEPT)(lambda _model, token_id: self.row_records([token_id])[0])
        self._similar = functools.lru_cache(maxsize=KEPT)(lambda _model, layer, key: self._similar_keys(layer, key))
        self._expected = functools.lru_cache(maxsize=KEPT_TEXTS)(lambda _model, text: self._next_of(self.model, text))
        self._went_on = functools.lru_cache(maxsize=KEPT_TEXTS)(
            lambda _model, text, count: self._continued(self.model, text, count)
        )

    def _tell_lengths(self, index: MemoryIndex) -> None:
        """Take lengths of rows from the index, where fp16 holds them: a pass over the vocabulary less."""
        lengths = torch.from_numpy(np.asarray(index.array("row_norms"), dtype=np.float32))
        for place, layer in enumerate(self.layers):
            if float(lengths[:, place].max()) < torch.finfo(torch.float16).max:
                tell_row_lengths(self.memory, layer=layer, lengths=lengths[:, place], kept=self.kept)

    def use(self, model: Transformer) -> None:
        """Answer with another model of the same shape."""
        with self.lock:
            self.model, self.memory = model, TokenMemory(model)
            self._model_number += 1  # answers of models before are not found again

    def meta(self) -> dict[str, Any]:
        """What the page must know of the model."""
        return {
            "architecture": self.model.config.architecture,
            "can_scale": self.model.config.has_memory,
            "depth": self.model.config.num_layers,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_text_length": MAX_TEXT_LENGTH,
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    def verbs(self) -> dict[str, Callable[[Fields], Any]]:
        """What can be posted, by name."""
        ones = [1.0] * self.model.config.num_layers
        return {
            "prompt": lambda fields: self.prompt(
                fields.text("text"), alphas=fields.numbers("alphas", ones), position=fields.integer("position", -1)
            ),
            "generate": lambda fields: {
                "text": self.continued(fields.text("text"), max_new_tokens=fields.integer("max_new_tokens", 24))
            },
        }

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt, at most."""
        return min(MAX_PROMPT_TOKENS, self.model.config.max_seq_len - 1)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, document boundary first.

        Raises:
            ValueError: it is too long.
        """
        if len(text) > MAX_TEXT_LENGTH:
            raise ValueError(f"the text has {len(text)} characters; at most {MAX_TEXT_LENGTH} are taken")
        ids = [self.tokenizer.boundary_id, *self.tokenizer.encode(text)]
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(f"the text has {len(ids)} tokens; at most {self.max_prompt_tokens} are taken")
        return ids

    def row_record(self, token_id: int) -> dict[str, Any]:
        """What a token's row promotes and suppresses in every layer, by the direct projection on the vocabulary.

        Raises:
            ValueError: there is no such token.
        """
        with self.lock:
            return self._rows(self._model_number, token_id)

    def similar_keys(self, layer: int, key: int) -> dict[str, Any]:
        """Cells of the same layer whose value, or whose key, points most nearly the same way.

        Raises:
            ValueError: there is no such key.
        """
        with self.lock:
            return self._similar(self._model_number, layer, key)

    def row_records(self, token_ids: Sequence[int]) -> list[dict[str, Any]]:
        """`row_record` of many tokens at once."""
        ids = torch.tensor(token_ids)
        with self.lock:
            rows = torch.stack([self.memory.rows(ids, layer=layer) for layer in self.layers], dim=1)  # (U, L, D)
            logits = self.memory.project(rows).float().flatten(0, 1)  # (U * L, V)
        sides = zip(self.lists(logits, sign=1), self.lists(-logits, sign=-1), strict=True)
        layers = [{"promoted": up, "suppressed": down} for up, down in sides]
        depth = len(self.layers)
        return [
            {"id": token, "layers": layers[place * depth : (place + 1) * depth]}
            for place, token in enumerate(token_ids)
        ]

    def lists(self, signed: Float[Tensor, "N V"], *, sign: int) -> list[Pairs]:
        """Of each of N, the tokens with the largest `signed` numbers, which are `sign` times those that are told."""
        best = signed.masked_fill(~self.mask.to(signed.device), -torch.inf).topk(min(LISTED, int(self.mask.sum())))
        return pairs_of(best.indices, sign * best.values)

    def _similar_keys(self, layer: int, key: int) -> dict[str, Any]:
        if not 0 <= key < self.memory.num_keys:
            raise ValueError(f"key {key} is out of range: layers have keys 0 to {self.memory.num_keys - 1}")
        with torch.no_grad():
            found = {}
            for name, vectors in (("values", self.memory.values(layer)), ("keys", self.memory.keys(layer))):
                cosines = F.cosine_similarity(vectors.float(), vectors[key][None].float())
                cosines[key] = -torch.inf
                best = cosines.topk(min(SIMILAR, len(cosines) - 1))
                found[name] = pairs_of(best.indices[None], best.values[None])[0]
        return {"layer": layer, "key": key, **found}

    def prompt(self, text: str, *, alphas: Sequence[float], position: int = -1) -> dict[str, Any]:
        """A text's rows, and what the model expects next with rows as they are and scaled.

        Args:
            text: It is read as the beginning of a document.
            alphas: Factor of each layer's rows.
            position: Of the token after which expectations are told, in the list of tokens that is returned.

        Raises:
            ValueError: the text is too long, or position or alphas do not fit.
        """
        ids = self.encode(text)
        if not -len(ids) <= position < len(ids):
            raise ValueError(f"position {position} is out of range: the text has {len(ids)} tokens")
        position %= len(ids)
        with self.lock:
            token_ids = torch.tensor([ids], device=self.model.device)
            rows = self.model.rows(token_ids) if self.model.config.has_memory else None
            plain, _ = run_with_cache(self.model, token_ids, names=[], rows=rows)
            scaled = self._scaled(rows, alphas)
            logits, parts = self._parts(token_ids, scaled, position)
        before, after = (F.log_softmax(each[0].float(), dim=-1) for each in (plain, logits))
        chosen = self._chosen(before[position], after[position])
        return {
            "ids": ids,
            "position": position,
            "next": [[t, float(before[position, t].exp()), float(after[position, t].exp())] for t in chosen],
            "divergence": float(F.kl_div(before[position], after[position], log_target=True, reduction="sum")),
            "surprise": [surprise(each, ids) for each in (before, after)],
            "parts": {str(t): self._attribution(parts, t) for t in chosen[:LISTED]},
            "labels": list(parts),
        }

    def _scaled(self, rows: Rows | None, alphas: Sequence[float]) -> Rows | None:
        depth = self.model.config.num_layers
        if rows is None:
            if any(alpha != 1 for alpha in alphas):
                raise ValueError("a dense model has no rows to scale")
            return None
        if len(alphas) != depth:
            raise ValueError(f"got {len(alphas)} factors, expected one for each of {depth} layers")
        return ScaledRows(rows, list(alphas))

    def _parts(self, token_ids: Tensor, rows: Rows | None, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what was added up in the stream at `position`: vectors (D,) by label, divided by its length."""
        wanted = ("hook_embed", "hook_attn_out", "hook_mlp_out", "hook_ffn_c_out")
        logits, cache = run_with_cache(self.model, token_ids, names=lambda name: name.endswith(wanted), rows=rows)
        stream = torch.stack([part[0, position].float() for part in cache.values()])
        scale = (stream.sum(0).square().mean() + self.model.config.norm_eps).rsqrt()
        return logits, dict(zip(cache, stream * scale, strict=True))

    def _attribution(self, parts: dict[str, Tensor], token_id: int) -> list[float]:
        """The part of each label in a token's logit; they sum to the logit."""
        direction = (self.model.norm.weight * self.model.head.weight[token_id]).detach().float()
        return [float(part @ direction) for part in parts.values()]

    @staticmethod
    def _chosen(before: Tensor, after: Tensor) -> list[int]:
        """The likeliest tokens now, then those that were."""
        count = min(LISTED, len(after))
        return list(dict.fromkeys(after.topk(count).indices.tolist() + before.topk(count).indices.tolist()))

    @torch.no_grad()
    def compared(self, text: str, other: Transformer) -> Pairs:
        """The likeliest next tokens of a text: [token, probability by this model, by `other`].

        Raises:
            ValueError: the text is too long.
        """
        with self.lock:
            before, after = self._expected(self._model_number, text), self._next_of(other, text)
        return [[t, float(before[t].exp()), float(after[t].exp())] for t in self._chosen(before, after)]

    def _next_of(self, model: Transformer, text: str) -> Float[Tensor, " V"]:
        """Log probabilities after a text."""
        token_ids = torch.tensor([self.encode(text)], device=model.device)
        return F.log_softmax(model(token_ids)[0, -1].float(), dim=-1)

    def continued(self, text: str, *, max_new_tokens: int, model: Transformer | None = None) -> str:
        """How the model, or another, goes on, taking the likeliest token each time.

        Raises:
            ValueError: the text, or what is asked for, is too long.
        """
        if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise ValueError(f"max_new_tokens should be 1 to {MAX_NEW_TOKENS}, got {max_new_tokens}")
        with self.lock:
            if model is None:
                return self._went_on(self._model_number, text, max_new_tokens)
            return self._continued(model, text, max_new_tokens)

    def _continued(self, model: Transformer, text: str, max_new_tokens: int) -> str:
        stops = {self.tokenizer.boundary_id}
        tokens = generate(model, self.encode(text), max_new_tokens=max_new_tokens, stop_ids=stops)
        return self.tokenizer.decode(list(tokens))


def surprise(log_probabilities: Tensor, ids: list[int]) -> list[float | None]:
    """Minus the log probability of each token of a text in nats, from (T, V); None for the first, which is given."""
    found = -log_probabilities[:-1].gather(1, torch.tensor(ids[1:], device=log_probabilities.device)[:, None])[:, 0]
    return [None, *found.tolist()]


def pairs_of(ids: Tensor, values: Tensor) -> list[Pairs]:
    """[[[id, value], ...], ...] of two (N, count) tensors, values to 4 significant digits."""
    return [
        [[token, float(f"{value:.4g}")] for token, value in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
