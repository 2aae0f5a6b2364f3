"""Prepared text, as the tests of training have it."""

from tests.train.conftest import prepared, tokenizer  # noqa: F401 - fixtures
