"""The last lines of an engine's output, from the journal, and whether they report that VRAM ran out."""

from __future__ import annotations

import re
import time

from gpusvc.journal import units as unitlog
from gpusvc.printable import printable

# Messages of the runtimes of CUDA and HIP, of PyTorch, llama.cpp and vLLM.
_OUT_OF_MEMORY = (
    r"out of memory|OutOfMemoryError|ErrorOutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|unable to allocate CUDA"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
)


# How long lines may take from a pipe to the journal where the caller may not run `journalctl --sync`.
_UNSYNCED_SECONDS = 1.0
_PAUSE_SECONDS = 0.05

# Of a line: an engine may write a line without end.
_MAX_WIDTH = 1000


def last_words(*matches: str, lines: int = 30) -> list[str]:
    """Return the last matching lines of the journal, made printable, oldest first; empty if they cannot be read.

    Args:
        matches: as journalctl(1) takes them: ``--unit=…``, ``FIELD=value``.
        lines: how many at most.
    """
    import subprocess  # noqa: PLC0415  most ends do not need it

    try:
        # The engine is dead, but its last lines may still be in journald's socket. For root, --sync waits for them.
        sync = subprocess.run(["journalctl", "--sync"], check=False, capture_output=True, timeout=2)  # noqa: S607
        deadline = time.monotonic() + (_UNSYNCED_SECONDS if sync.returncode else 0.0)
        command = ["journalctl", *matches, *unitlog.newest(lines)]
        while True:
            done = subprocess.run(command, check=False, capture_output=True, timeout=5)  # noqa: S603
            words = [printable(line, width=_MAX_WIDTH) for line in unitlog.messages(done.stdout.splitlines())]
            if words or time.monotonic() >= deadline:
                return words
            time.sleep(_PAUSE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []


def tells_of_memory(words: list[str]) -> bool:
    """Return whether the lines report that the GPU's memory ran out."""
    return any(re.search(_OUT_OF_MEMORY, line, re.IGNORECASE) for line in words)
