"""The chat template that comes with a tokenizer: messages to token ids, as transformers does it.

Templates are programs in a file of the checkpoint's folder. They run in jinja2's sandbox, which lets them neither call
nor change anything but what is given to them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexmemory.serve.errors import ApiError
from flexmemory.storage import read_json
from flexmemory.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"


class ChatTemplate:
    """Turns messages into the prompt of the assistant's next one."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, bos: str | None, eos: str | None) -> None:
        """Compile the template.

        Raises:
            ValueError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no jinja template: {error}") from error
        self._names = {"bos_token": bos or tokenizer.boundary, "eos_token": eos or tokenizer.boundary}
        # A copy that knows special tokens in a text: in templates they are meant.
        self._core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
        self._core.encode_special_tokens = False
        added = self._core.get_added_tokens_decoder().values()
        self._special = [token.content for token in added if token.special]
        eos_id = self._core.token_to_id(self._names["eos_token"])
        self.stop_ids = frozenset() if eos_id is None else frozenset([eos_id])
        """Tokens that end a message."""

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of `chat_template.jinja` or `tokenizer_config.json` in a checkpoint's folder; None without one.

        Raises:
            ValueError: it is no template.
        """
        settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
        source = settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((each["template"] for each in source if each["name"] == "default"), None)
        if (folder / TEMPLATE_FILE).is_file():
            source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        if source is None:
            return None
        return cls(source, tokenizer, bos=_text(settings.get("bos_token")), eos=_text(settings.get("eos_token")))

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Raises:
            ApiError: the template refuses the conversation, or a message spells a special token.
        """
        for place, message in enumerate(messages):
            for token in self._special:
                if any(token in text for text in message.values()):
                    raise ApiError(
                        400,
                        f"messages[{place}] holds the special token {token!r}, which only the template may write",
                        param="messages",
                    )
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return self._core.encode(text, add_special_tokens=False).ids


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own escapes for HTML


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _text(token: Any) -> str | None:
    """A token's text, as either form of `tokenizer_config.json` has it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
