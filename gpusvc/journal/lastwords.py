"""What an engine wrote before it ended, out of the journal, and whether that was a cry for memory."""

from __future__ import annotations

import re
import time

from gpusvc.journal import units as unitlog
from gpusvc.printable import printable

# In the words of CUDA's and HIP's runtimes, PyTorch, llama.cpp and vLLM.
_OUT_OF_MEMORY = (
    r"out of memory|OutOfMemoryError|ErrorOutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|unable to allocate CUDA"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
)


# How long lines may take from a pipe into the journal where nobody can have journald see to that.
_UNSYNCED_SECONDS = 1.0
_PAUSE_SECONDS = 0.05

# Of a line; an engine may never end one.
_MAX_WIDTH = 1000


def last_words(*matches: str, lines: int = 30) -> list[str]:
    """The last lines of the journal that fit, made printable, oldest first; empty if they cannot be read.

    Args:
        matches: as journalctl(1) takes them: ``--unit=…``, ``FIELD=value``.
        lines: how many at most.
    """
    import subprocess  # noqa: PLC0415  most engines end without anybody asking why

    try:
        # The engine is dead, but journald may have its last lines still in the socket; root may have it read on.
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
    """Whether the GPU's memory ran out."""
    return any(re.search(_OUT_OF_MEMORY, line, re.IGNORECASE) for line in words)
