"""The API key that a model's engine asks for, as the launcher gave it to the daemons that send requests to the engine.

There is a copy for each of them, with its group and mode 0640: neither other users nor engines can read it. It stays
after the model's end, until its next start or a reboot.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from gpusvc import files
from gpusvc.paths import Paths

# The name of the copy, and the group that reads it.
GATEWAY = "upstream-key", "gpusvc-gateway"
WATCHDOG = "probe-key", "gpusvc-watchdog"
READERS = (GATEWAY, WATCHDOG)

LONGEST_BYTES = 4096


def file_of(paths: Paths, name: str, reader: tuple[str, str]) -> Path:
    """Return the copy for ``reader``, which is GATEWAY or WATCHDOG."""
    return paths.lease_directory(name) / reader[0]


def read(paths: Paths, name: str, reader: tuple[str, str]) -> str | None:
    """Return the key; None: the engine of ``name`` asks for none, or this process may not know it."""
    try:
        return files.read(file_of(paths, name, reader), limit_bytes=LONGEST_BYTES).decode("ascii")
    except (OSError, ValueError):
        return None


def forget(paths: Paths, name: str) -> None:
    """Remove all copies: the next run of ``name`` has no key."""
    for reader in READERS:
        with contextlib.suppress(OSError):
            file_of(paths, name, reader).unlink()
