"""From tokens to the JSON of completions and chats, whole or as events of a stream."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from flexmemory.engine.sampling import Likelihood
from flexmemory.serve.scheduler import Piece
from flexmemory.tokenizer import StopWatch, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one step adds to a choice."""

    text: str
    tokens: tuple[tuple[int, Likelihood], ...]
    """Tokens and their likelihoods, where these were wanted; also of a stop string, which is not in the text."""
    finish: FinishReason | None

    @property
    def empty(self) -> bool:
        """Whether nobody has to be told."""
        return not self.text and not self.tokens and self.finish is None


class Choice:
    """One continuation as it grows: tokens become text, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """An empty one."""
        self._step, self._watch = tokenizer.decode_steps(), StopWatch(stops)
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def take(self, piece: Piece) -> Delta:
        """Add what the engine gave; nothing after the end."""
        text, used = "", 0
        for token in piece.tokens if self.finish is None else ():
            used += 1
            text += self._watch.push(self._step(token))
            if self._watch.stopped:
                self.finish = "stop"
                break
        self.num_tokens += used
        if self.finish is None and (piece.finish == "stop" or piece.finish == "length"):
            self.finish = piece.finish
            text += self._watch.held
        elif not used:
            return Delta(text="", tokens=(), finish=None)
        scored = zip(piece.tokens[:used], piece.likelihoods[:used], strict=True) if piece.likelihoods else ()
        return Delta(text=text, tokens=tuple(scored), finish=self.finish)


class TokenNames:
    """Texts of tokens, for lists of log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Of the tokenizer's."""
        self.text = functools.lru_cache(maxsize=1 << 16)(tokenizer.token)
        self._core = tokenizer.core

    def raw(self, token: int) -> list[int] | None:
        """Its bytes; None where it is no whole text."""
        text = self._core.decode([token], skip_special_tokens=False)
        return None if "\ufffd" in text else list(text.encode())


class Form(abc.ABC):
    """How a kind of answer is written."""

    prefix: str
    """Of its ids."""

    def __init__(self, names: TokenNames, *, alternatives: int, scored: bool) -> None:
        """Write with `alternatives` most likely tokens beside each, where it is `scored`."""
        self._names, self._alternatives, self._scored = names, alternatives, scored

    def beginning(self, index: int) -> dict[str, Any] | None:
        """A choice of the first event of a stream, if there is one before any text."""
        return None

    @abc.abstractmethod
    def object(self, *, stream: bool) -> str:
        """The name of the kind."""

    @abc.abstractmethod
    def choice(self, index: int, delta: Delta, *, stream: bool) -> dict[str, Any]:
        """A choice: all of it, or what an event adds."""


class CompletionForm(Form):
    """Of /v1/completions."""

    prefix = "cmpl"

    def __init__(self, names: TokenNames, *, alternatives: int, scored: bool) -> None:
        """See `Form`."""
        super().__init__(names, alternatives=alternatives, scored=scored)
        self._offsets: collections.Counter[int] = collections.Counter()
        """Where the next token of each choice begins."""

    def object(self, *, stream: bool) -> str:
        """See `Form`."""
        return "text_completion"

    def choice(self, index: int, delta: Delta, *, stream: bool) -> dict[str, Any]:
        """See `Form`."""
        logprobs = self._logprobs(index, delta) if self._scored else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        name = self._names.text
        offsets = []
        for token, _ in delta.tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name(token))
        top = [
            {name(i): logprob for i, logprob in reversed(likelihood.alternatives[: self._alternatives])}
            | {name(token): likelihood.logprob}
            for token, likelihood in delta.tokens
        ]
        return {
            "tokens": [name(token) for token, _ in delta.tokens],
            "token_logprobs": [likelihood.logprob for _, likelihood in delta.tokens],
            "top_logprobs": top if self._alternatives else None,
            "text_offset": offsets,
        }


class ChatForm(Form):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def beginning(self, index: int) -> dict[str, Any]:
        """See `Form`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def object(self, *, stream: bool) -> str:
        """See `Form`."""
        return "chat.completion.chunk" if stream else "chat.completion"

    def choice(self, index: int, delta: Delta, *, stream: bool) -> dict[str, Any]:
        """See `Form`."""
        if stream:
            message = {"delta": {"content": delta.text} if delta.text else {}}
        else:
            message = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        logprobs = {"content": [self._entry(*each) for each in delta.tokens], "refusal": None} if self._scored else None
        return {"index": index, **message, "logprobs": logprobs, "finish_reason": delta.finish}

    def _entry(self, token: int, likelihood: Likelihood) -> dict[str, Any]:
        top = likelihood.alternatives[: self._alternatives]
        return self._named(token, likelihood.logprob) | {"top_logprobs": [self._named(*each) for each in top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._names.text(token), "bytes": self._names.raw(token), "logprob": logprob}
