"""The last lines of an engine's output, from the journal: which one says why it ended, and whether VRAM ran out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from gpusvc.errors import GpusvcError
from gpusvc.journal import journalctl
from gpusvc.journal import units as unitlog
from gpusvc.printable import printable

# Messages of the runtimes of CUDA and HIP, of PyTorch, llama.cpp and vLLM.
_OUT_OF_MEMORY = (
    r"out of memory|OutOfMemoryError|ErrorOutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|unable to allocate CUDA"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
)

_GPU_ERROR = r"(CUDA|HIP|NCCL|ROCm)\w* error|cudaError|CUBLAS_STATUS|hipError"

# The last line of a Python traceback, also behind a logger's prefix. The lines before it are the traceback.
_EXCEPTION = r"(^|[\s:|])(\w+\.)*[A-Z]\w*(Error|Exception): \S"

# A line of another program that begins with its error, perhaps after the program's name.
_ERROR = r"^(\S+: )?(error|fatal|panic)\b.*: ?\S"

# What precedes the last words in the launcher's sentence about the end of an engine.
LEAD = "its last words: "

# How long lines may take from a pipe to the journal where the caller may not run `journalctl --sync`.
_UNSYNCED_SECONDS = 1.0
_PAUSE_SECONDS = 0.05

_ANSWER_SECONDS = 5.0

# Of a line: an engine may write a line without end.
_MAX_WIDTH = 1000


def last_words(*matches: str, lines: int = 30, since: float | None = None) -> list[str]:
    """Return the last matching lines of the journal, made printable, oldest first; empty if they cannot be read.

    Args:
        matches: as journalctl(1) takes them: ``--unit=…``, ``FIELD=value``.
        lines: how many at most.
        since: no lines before this time, in seconds since the epoch.
    """
    # The engine may be dead, and its last lines still in journald's socket.
    patience = 0.0 if journalctl.sync() else _UNSYNCED_SECONDS
    deadline = time.monotonic() + patience
    command = ["journalctl", *matches, *unitlog.newest(lines, since)]
    try:
        while True:
            found = unitlog.messages(journalctl.lines(command, _ANSWER_SECONDS))
            if found or time.monotonic() >= deadline:
                return [printable(line, width=_MAX_WIDTH) for line in found]
            time.sleep(_PAUSE_SECONDS)
    except GpusvcError:
        return []


def telling(words: Sequence[str]) -> str:
    """Return the line that most likely says why the engine ended; of equal ones the last. There must be a line."""
    for pattern in (f"{_OUT_OF_MEMORY}|{_GPU_ERROR}", _EXCEPTION, _ERROR):
        # The patterns for runtimes are in mixed case in the wild; an exception's name is not.
        flags = re.NOFLAG if pattern is _EXCEPTION else re.IGNORECASE
        found = [line for line in words if re.search(pattern, line, flags)]
        if found:
            return found[-1]
    return words[-1]


def tells_of_memory(words: list[str]) -> bool:
    """Return whether the lines report that the GPU's memory ran out."""
    return any(re.search(_OUT_OF_MEMORY, line, re.IGNORECASE) for line in words)
