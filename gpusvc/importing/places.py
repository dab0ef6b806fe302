"""Relative paths in foreign configurations: relative to a directory that the configuration does not name.

That directory is where the other program was started. What is likely is tried: the configuration's own directory, and
the one that gpusvc is started in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Exists = Callable[[Path], bool]


def exists(path: Path) -> bool:
    """Whether there is such a file; no for a path that cannot be looked at."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def candidates(source: Path) -> list[Path]:
    """Directories that relative paths of a configuration may be relative to, the likeliest first."""
    return list(dict.fromkeys([source.absolute().parent, Path.cwd()]))


def directory_of(paths: Sequence[str], source: Path, there: Exists) -> Path | None:
    """The directory below which all of these paths are; None if there is no such among the likely ones."""
    return next((base for base in candidates(source) if all(there(base / path) for path in paths)), None)


def is_relative(path: str) -> bool:
    """Whether a path depends on the directory that a program runs in."""
    return bool(path) and not path.startswith(("/", "~", "$", "{")) and "://" not in path
