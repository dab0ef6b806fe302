"""What a second import of the same source changes."""

from __future__ import annotations

import pytest

from gpusvc.importing import update

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
