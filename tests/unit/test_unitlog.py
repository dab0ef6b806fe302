"""The journal's entries as lines."""

from __future__ import annotations

import json

import pytest

from gpusvc.journal.units import messages


def printed(*said: object) -> list[bytes]:
    """As journalctl prints them, the newest first."""
    return [json.dumps({"__CURSOR": "s=1", "MESSAGE": message}).encode() for message in reversed(said)]


def test_the_oldest_comes_first_and_the_lines_of_one_stay_in_order() -> None:
    assert messages(printed("a", "b\n  c\n\n", "", "d")) == ["a", "b", "  c", "d"]


def test_bytes_that_are_no_text_are_shown_as_far_as_they_are() -> None:
    assert messages(printed([104, 105, 255])) == ["hi�"]


@pytest.mark.parametrize("message", [None, 5.5, {"a": 1}, [999]])
def test_what_is_no_message_is_left_out(message: object) -> None:
    assert messages(printed("a", message, "b")) == ["a", "b"]


def test_neither_is_what_is_no_entry() -> None:
    assert messages([b"", b"[1]", b"{}", b"{", b"\xff"]) == []


def test_of_several_messages_in_one_entry_the_first_counts() -> None:
    assert messages(printed("a", ["two", "of it"], "b")) == ["a", "two", "b"]
