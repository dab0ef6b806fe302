"""Which downloaded files a model's configuration names. It compares text: a wrong configuration keeps its files too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gpusvc import files
from gpusvc.weights import gguf

# What may stand behind a path in a configuration.
_ENDS = frozenset(("", '"', "'", " ", "\t", "\n", ",", ":", ";"))


def text_of(file: Path) -> str:
    """Return the text of a configuration file; empty if it cannot be read."""
    try:
        return files.read(file, follow_links=True).decode(errors="replace")
    except (OSError, ValueError):
        return ""


def only_in(root: Path, text: str, others: Iterable[str]) -> list[str]:
    """Return the files below ``root``, relative to it, that ``text`` names and no text of ``others`` does, sorted.

    A text names a file by its path, by that of another part of the same model, or by that of the file's folder.
    """
    found = [file for file in _files_below(root) if _is_named(root, file, text)]
    if not found:
        return []
    rest = list(others)
    return [file for file in found if not any(_is_named(root, file, other) for other in rest)]


def _files_below(root: Path) -> list[str]:
    found = []
    for directory, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(directory, name).relative_to(root)) for name in names if not name.startswith(".")]
    return sorted(found)


def _is_named(root: Path, file: str, text: str) -> bool:
    path = root / file
    folders = [str(parent) for parent in path.parents if root in parent.parents]
    wanted = [str(gguf.first_part(path)), str(path), *folders]
    return any(_stands_alone(text, word) for word in wanted)


def _stands_alone(text: str, word: str) -> bool:
    """Return whether ``word`` is in the text and does not go on there, as the beginning of a longer path would."""
    at = text.find(word)
    while at != -1:
        if text[at + len(word) :].removeprefix("/")[:1] in _ENDS:
            return True
        at = text.find(word, at + 1)
    return False
