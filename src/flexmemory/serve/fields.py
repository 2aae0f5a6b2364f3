"""The fields of a request's body, checked as they are read."""

from __future__ import annotations

import json
from typing import Any


class Fields:
    """A JSON object whose fields are asked for by name and type."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Ask of `values`."""
        self._values = values

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """The fields of a body.

        Raises:
            ValueError: it is not a JSON object.
        """
        try:
            values = json.loads(body or b"{}")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"the body is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"the body should be a JSON object, got {type(values).__name__}")
        return cls(values)

    def text(self, name: str, default: str | None = None) -> str:
        """A string.

        Raises:
            ValueError: it is missing, or is something else.
        """
        value = self._get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{name} should be a string, got {_shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not whole Unicode text") from error
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            ValueError: it is missing, or is something else.
        """
        value = self._get(name, default)
        if not _is_whole(value):
            raise ValueError(f"{name} should be a whole number, got {_shown(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            ValueError: it is missing, or is something else.
        """
        return _finite(name, self._get(name, default))

    def numbers(self, name: str, default: list[float] | None = None) -> list[float]:
        """A list of finite numbers.

        Raises:
            ValueError: it is missing, or is something else.
        """
        value = self._get(name, default)
        if not isinstance(value, list):
            raise ValueError(f"{name} should be a list of numbers, got {_shown(value)}")
        return [_finite(name, each) for each in value]

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        """A list of whole numbers.

        Raises:
            ValueError: it is missing, or is something else.
        """
        value = self._get(name, default)
        if not isinstance(value, list) or not all(map(_is_whole, value)):
            raise ValueError(f"{name} should be a list of whole numbers, got {_shown(value)}")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects.

        Raises:
            ValueError: it is missing, or is something else.
        """
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ValueError(f"{name} should be a list of objects, got {_shown(value)}")
        return [Fields(each) for each in value]

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name, default)
        if value is None:
            raise ValueError(f"the body lacks {name!r}")
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"{name} should be a finite number, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    return repr(value)[:60]
