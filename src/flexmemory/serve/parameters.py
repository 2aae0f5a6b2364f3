"""What a request asks for, out of its JSON: every parameter is obeyed or refused, none ignored."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Any

from flexmemory.engine.sampling import ALTERNATIVES, Sampling
from flexmemory.serve.errors import ApiError

DEFAULT_MAX_TOKENS = 16
"""Of a completion that names no number, as OpenAI has it; a chat may go on to the longest sequence."""
MOST = 2**31
"""More than any sequence has tokens."""
MAX_STOPS = 16
"""Stop strings of a request."""
NO_EFFECT = {"user", "safety_identifier", "metadata"}
"""Say who asks: they change no answer anywhere."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
"""Parameters that are not supported: what they may be, beside null, as it asks for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A request, its values checked but for what depends on the model."""

    model: str
    sampling: Sampling
    """Of the first choice; others differ in their seed."""
    choices: int
    """Of each prompt."""
    max_new_tokens: int | None
    """None: not said."""
    default_new_tokens: int
    """In its place, where there is room."""
    stop: tuple[str, ...]
    scored: bool
    """Whether log-probabilities are wanted."""
    alternatives: int
    """Most likely tokens to give beside each."""
    stream: bool
    include_usage: bool
    """Whether the last event of a stream has the counts of tokens."""

    def sampling_of(self, choice: int) -> Sampling:
        """Settings of one of the choices; the sum of seed and choice wraps around as 64 bits do."""
        seed = (self.sampling.seed + choice + 2**63) % 2**64 - 2**63
        return dataclasses.replace(self.sampling, seed=seed)


class Parameters:
    """A JSON object whose values are taken one after the other; `done` refuses what is left."""

    def __init__(self, body: bytes) -> None:
        """Read it.

        Raises:
            ApiError: it is no JSON object.
        """
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from error
        if not isinstance(values, dict):
            raise ApiError(400, f"the body should be a JSON object, got {_kind(values)}")
        self._values: dict[str, Any] = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value, None where it is null or absent."""
        return self._values.pop(name, None)

    def whole(self, name: str, *, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.take(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
            raise ApiError(400, f"{name} should be a whole number from {low} to {high}, got {_kind(value)}", param=name)
        return value

    def number(self, name: str, *, low: float, high: float) -> float | None:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ApiError(400, f"{name} should be a number from {low:g} to {high:g}, got {_kind(value)}", param=name)
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false, the default."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(400, f"{name} should be true or false, got {_kind(value)}", param=name)
        return bool(value)

    def done(self) -> None:
        """Refuse what was not taken.

        Raises:
            ApiError: there is such a parameter, and it is not one that asks for nothing.
        """
        for name, value in self._values.items():
            if name in NO_EFFECT or value in NEUTRAL.get(name, ()):
                continue
            known = "is not supported by this server" if name in NEUTRAL else "is unknown"
            raise ApiError(400, f"parameter {name[:100]!r} {known}; leave it out", param=name[:100], code="unsupported")


def completion_prompts(parameters: Parameters) -> list[str | list[int]]:
    """The prompts of a completion: texts, or token ids.

    Raises:
        ApiError: there is none, or it is neither.
    """
    prompt = parameters.take("prompt")
    if _is_prompt(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(_is_prompt(each) for each in prompt):
        return prompt
    raise ApiError(
        400,
        f"prompt should be a text, a list of texts, token ids, or a list of these; got {_kind(prompt)}",
        param="prompt",
    )


def chat_messages(parameters: Parameters) -> list[dict[str, str]]:
    """The messages of a chat: a role and a text each; several parts of text are joined.

    Raises:
        ApiError: there are none, or one is something else.
    """
    messages = parameters.take("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, f"messages should be a list of messages, got {_kind(messages)}", param="messages")
    return [_message(message, place) for place, message in enumerate(messages)]


def wanted(parameters: Parameters, *, chat: bool) -> Wanted:
    """All else that a request may ask for; `parameters` must be empty then.

    Raises:
        ApiError: a value is of the wrong kind or out of range, or a parameter is not supported.
    """
    model = parameters.take("model")
    if not isinstance(model, str):
        raise ApiError(400, f"model should be the name of a model, got {_kind(model)}", param="model")
    limit = parameters.whole("max_tokens", low=1, high=MOST)
    if chat:
        limit = parameters.whole("max_completion_tokens", low=1, high=MOST) or limit
        scored = parameters.flag("logprobs")
        alternatives = parameters.whole("top_logprobs", low=0, high=ALTERNATIVES)
        if alternatives is not None and not scored:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    else:
        alternatives = parameters.whole("logprobs", low=0, high=ALTERNATIVES)
        scored = alternatives is not None
    stream, include_usage = parameters.flag("stream"), False
    options = parameters.take("stream_options")
    if options is not None:
        include_usage = _include_usage(options, stream=stream)
    result = Wanted(
        model=model,
        sampling=_sampling(parameters),
        choices=parameters.whole("n", low=1, high=MOST) or 1,
        max_new_tokens=limit,
        default_new_tokens=MOST if chat else DEFAULT_MAX_TOKENS,
        stop=_stops(parameters.take("stop")),
        scored=scored,
        alternatives=alternatives or 0,
        stream=stream,
        include_usage=include_usage,
    )
    parameters.done()
    return result


def _sampling(parameters: Parameters) -> Sampling:
    temperature = parameters.number("temperature", low=0.0, high=2.0)
    top_p = parameters.number("top_p", low=0.0, high=1.0)
    seed = parameters.whole("seed", low=-(2**63), high=2**63 - 1)
    if top_p == 0:
        temperature, top_p = 0.0, 1.0  # the fewest tokens: the most likely one
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=parameters.whole("top_k", low=0, high=2**31 - 1) or 0,
        seed=secrets.randbits(63) if seed is None else seed,
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(
            400, f"stop should be a text or up to {MAX_STOPS} texts, none empty; got {_kind(value)}", param="stop"
        )
    return tuple(stops)


def _include_usage(options: Any, *, stream: bool) -> bool:
    if not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options should be an object with include_usage alone", param="stream_options")
    if options.get("include_obfuscation"):
        raise ApiError(400, "include_obfuscation is not supported by this server", param="stream_options")
    include = options.get("include_usage", False)
    if not isinstance(include, bool):
        raise ApiError(400, f"include_usage should be true or false, got {_kind(include)}", param="stream_options")
    return include


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    )


def _message(message: Any, place: int) -> dict[str, str]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} should be an object, got {_kind(message)}", param="messages")
    given = {name: value for name, value in message.items() if value is not None}
    if odd := given.keys() - {"role", "content", "name"}:
        raise ApiError(400, f"{where} has {min(odd)[:100]!r}, which is not supported", param="messages")
    content = given.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if len(texts) == len(content) else None
    for name, value in (("role", given.get("role")), ("content", content), ("name", given.get("name", ""))):
        if not isinstance(value, str):
            raise ApiError(400, f"{where}.{name} should be a text, got {_kind(given.get(name))}", param="messages")
    return given | {"content": str(content)}


def _kind(value: Any) -> str:
    """A value for an error: itself where it is short."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)[:40]
    if isinstance(value, str):
        return repr(value[:40])
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
