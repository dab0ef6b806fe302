"""Relative paths in foreign configurations.

They are relative to the directory in which the other program was started, which the configuration does not name. Likely
directories are tried: that of the configuration, and the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Exists = Callable[[Path], bool]


def exists(path: Path) -> bool:
    """Return whether a file exists; False if the path cannot be read."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def candidates(source: Path) -> list[Path]:
    """Return likely base directories for relative paths of a configuration, the likeliest first."""
    return list(dict.fromkeys([source.absolute().parent, Path.cwd()]))


def directory_of(paths: Sequence[str], source: Path, there: Exists) -> Path | None:
    """Return the likely directory that has all of these paths; None if there is none."""
    return next((base for base in candidates(source) if all(there(base / path) for path in paths)), None)


def is_relative(path: str) -> bool:
    """Return whether a path depends on the working directory."""
    return bool(path) and not path.startswith(("/", "~", "$", "{")) and "://" not in path
