"""What a second import of the same source changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.importing import update
from gpusvc.importing.update import State

FILE = "# Imported from /x.yaml, where it is called 'a'.\n"


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("a = 1\n", "a = 1\n", []),
        ("a = 1\n# mine\n", "# theirs\na = 1\n", []),
        ("a = 1\n", "a = 2\nb = [1]\n", ["a: 1 becomes 2", "b = [1] is new"]),
        ("[gpu]\nvram = '1G'\n", "[gpu]\ncount = 2\n", ["gpu.count = 2 is new", "gpu.vram goes, which was '1G'"]),
        ("a = ", "a = 1\n", ["the file is not valid TOML and is replaced as a whole"]),
    ],
)
def test_changes_are_said_key_by_key(old: str, new: str, lines: list[str]) -> None:
    assert update.changes(old, new) == lines


def test_the_first_line_says_where_a_file_comes_from() -> None:
    assert update.has_same_origin(FILE + "a = 1\n", FILE + "b = 1\n")
    assert not update.has_same_origin("a = 1\n", FILE)
    assert not update.has_same_origin(FILE.replace("'a'", "'b'"), FILE)
    assert not update.has_same_origin("", "")


def test_a_digest_stands_behind_the_comments_at_the_top() -> None:
    assert update.signed(FILE + "a = 1\n").startswith(FILE + "# Digest for `gpusvc import --update`: ")
    assert update.signed(FILE + "a = 1\n").endswith("\na = 1\n")
    assert update.signed("a = 1\n").startswith("# Digest")


NEW = update.signed(FILE + "a = 2\n")


@pytest.mark.parametrize(
    ("old", "state"),
    [
        (None, State.NEW),
        ("a = 1\n", State.FOREIGN),
        (update.signed(FILE + "a = 2\n"), State.SAME),
        (update.signed(FILE + "a = 2\n") + "# mine\n", State.SAME),
        (update.signed(FILE + "a = 1\n"), State.CHANGED),
        (update.signed(FILE + "a = 1\n") + "b = 2\n", State.EDITED),
        (update.signed(FILE + "a = 1\n") + "# mine\n", State.EDITED),
        (update.signed(FILE + "a = 2\n") + "b = 2\n", State.EDITED_ALONE),
        (update.signed(FILE + "a = 1\n").replace("\n", "\r\n", 1), State.FOREIGN),
        (FILE + "a = 1\n", State.UNSIGNED),
        (FILE + "a = ", State.UNSIGNED),
    ],
)
def test_a_file_that_somebody_edited_is_told_from_one_that_the_import_wrote(old: str | None, state: State) -> None:
    assert update.compare(old, NEW).state is state


def test_what_an_import_would_change_in_an_edited_file_is_said() -> None:
    old = update.signed(FILE + "a = 1\n") + "b = 2\n"
    assert update.compare(old, NEW).lines == ["a: 1 becomes 2", "b goes, which was 2"]


@given(st.text(), st.text())
def test_any_file_is_compared(old: str, edited: str) -> None:
    for text in (old, FILE + old, NEW + edited, edited + NEW):
        assert isinstance(update.compare(text, NEW).state, State)
