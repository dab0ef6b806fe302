"""What is written as TOML is read back as the same."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config import toml

PLAIN = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(allow_nan=False)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=6))
def test_any_document_is_read_back_as_it_was(keys: dict[str, Any]) -> None:
    assert tomllib.loads(toml.document(keys)) == keys


@given(st.text())
def test_a_comment_says_nothing_to_a_parser(text: str) -> None:
    assert tomllib.loads(toml.comment(text) + "a = 1\n") == {"a": 1}


def test_a_long_list_is_broken_between_its_items() -> None:
    command = [f"--option-{number}" for number in range(40)]
    text = toml.document({"command": command})
    assert tomllib.loads(text) == {"command": command}
    assert max(map(len, text.splitlines())) <= 112


@pytest.mark.parametrize("value", [None, {"a": None}, [1, None], object()])
def test_what_toml_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="TOML has no"):
        toml.inline(value)
