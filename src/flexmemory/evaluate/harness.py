r"""Models of this package in EleutherAI's lm-evaluation-harness, as the model `flexmemory`.

    python -m flexmemory.evaluate.harness run --model flexmemory --tasks hellaswag,piqa \
        --model_args checkpoint=PATH,tol=STORE,rows=disk

is the harness's own command `lm_eval` with one model more: it finds models by no plugin. In Python, importing this
module registers the model. Prompts and documents begin with the boundary token, as those of HFLM do with
`add_bos_token=True` (docs/evaluating.md).
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from flexmemory.device import resolve_device
from flexmemory.engine.engine import Engine, Request
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import DTYPES, RowPlace, load_model
from flexmemory.engine.sampling import Sampling
from flexmemory.evaluate.likelihood import BATCH_TOKENS, Continuations, Pair
from flexmemory.model.checkpoint import Checkpoint

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is missing ({error}): pip install 'flexmemory[eval]'") from error

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Of a continuation, where the task does not say; HFLM's."""
SEQUENCES = 16
"""Continuations at once with `--batch_size auto`."""


class FlexMemoryLM(TemplateLM):
    """A checkpoint, with rows computed or looked up."""

    def __init__(
        self,
        checkpoint: str,
        *,
        tol: str | None = None,
        rows: RowPlace | None = None,
        keep_layers: int | None = None,
        int8: Int8Part | None = None,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        batch_tokens: int = BATCH_TOKENS,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model; what the harness's `--model_args` give.

        Args:
            checkpoint: A checkpoint or run folder.
            tol: A ToL store built from it: rows are looked up, and FFN-M weights are never loaded.
            rows: Where rows come from; by default disk with `tol` and compute without.
            keep_layers: Layers of each row to read, the first ones in the store's order.
            int8: Weights to make int8: of the output head, or of all projections.
            dtype: Of the computation; auto is the stored dtype.
            batch_tokens: Positions of one forward pass that scores, padding included.
            device: Where it runs. The harness asks for a GPU unless told otherwise; without one, it is the CPU.
            batch_size: Texts that are generated at once.
            max_batch_size: Most of them with a `batch_size` of "auto".

        Raises:
            ValueError: the options do not go together.
        """
        super().__init__()
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        opened = Checkpoint.open(Path(str(checkpoint)))
        self.loaded = load_model(
            opened, tol=tol, rows=rows, keep_layers=keep_layers, device=resolve_device(device),
            dtype=DTYPES.get(dtype), int8=int8,
        )  # fmt: skip
        logger.info("%s", self.loaded.describe())
        self._device = self.loaded.model.device
        self.flex_tokenizer = opened.tokenizer()
        self.max_length = opened.config.max_seq_len
        self._batch_tokens = batch_tokens
        automatic = str(batch_size).startswith("auto")
        self._sequences = (max_batch_size or SEQUENCES) if automatic else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The boundary token, which is also what comes before every text."""
        return self.flex_tokenizer.boundary_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells requests of different tokenizers apart by."""
        return self.flex_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids, with the boundary token first unless told otherwise."""
        ids = self.flex_tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        batched = Continuations.of(pairs, max_len=self.max_length, batch_tokens=self._batch_tokens)
        found = batched.score(self.loaded.model, row_source=self.loaded.row_source)
        answers = list(zip(found.log_probs.tolist(), found.greedy.tolist(), strict=True))
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each after the boundary token, in windows as long as the model takes."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in cut:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts, up to their stops; a context that is too long loses its beginning.

        Raises:
            ValueError: a task asks for a setting of generation that the engine does not have, or for more tokens than
                the model's longest sequence has room for.
        """
        engine = self.loaded.engine(max_sequences=self._sequences)
        running = [(number, *self._submit(engine, request.args, number)) for number, request in enumerate(requests)]
        texts = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        while running:
            engine.step()
            going = []
            for number, queued, stops in running:
                if queued.slot is None and queued.finish_reason is None:  # it waits
                    going.append((number, queued, stops))
                    continue
                text, stopped = self._text(queued, stops)
                if stopped:
                    engine.cancel(queued)
                if queued.error is not None:
                    raise queued.error
                if queued.finish_reason is None:
                    going.append((number, queued, stops))
                    continue
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                progress.update()
            running = going
        progress.close()
        return texts

    def _submit(self, engine: Engine, arguments: tuple[Any, ...], seed: int) -> tuple[Request, tuple[str, ...]]:
        """Queue a context; with it, its stops."""
        context, wanted = arguments[0], _Wanted.of(arguments[1], seed=seed)
        room = self.max_length - wanted.max_new_tokens
        if room < 1:
            raise ValueError(
                f"{wanted.max_new_tokens} new tokens leave no room for a prompt: the model takes {self.max_length} "
                "tokens; give a smaller max_gen_toks (--gen_kwargs max_gen_toks=...)"
            )
        queued = engine.submit(
            self.tok_encode(context)[-room:],
            sampling=wanted.sampling,
            max_new_tokens=wanted.max_new_tokens,
            stop_ids={self.eot_token_id},
        )
        return queued, wanted.stops

    def _text(self, request: Request, stops: tuple[str, ...]) -> tuple[str, bool]:
        """Its text before the first stop, and whether there is one."""
        text = self.flex_tokenizer.decode(request.tokens)
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))], bool(ends)


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """A task's settings of generation."""

    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...]

    @classmethod
    def of(cls, settings: dict[str, Any], *, seed: int) -> _Wanted:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        stops = tuple(stop for stop in given.pop("until") if stop)
        max_new_tokens = given.pop("max_gen_toks")
        temperature = float(given.pop("temperature", 1.0)) if given.pop("do_sample") else 0.0
        given.pop("temperature", None)
        sampling = Sampling(
            temperature=temperature,
            top_k=int(given.pop("top_k", 0)),
            top_p=float(given.pop("top_p", 1.0)),
            seed=seed,
        )
        if given:
            raise ValueError(
                f"generation settings {', '.join(given)} are not known; there are until, max_gen_toks, do_sample, "
                "temperature, top_k and top_p"
            )
        return cls(sampling, max_new_tokens, stops)


register_model("flexmemory")(FlexMemoryLM)

if __name__ == "__main__":
    cli_evaluate()
