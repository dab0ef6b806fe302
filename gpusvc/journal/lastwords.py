"""The last lines of an engine's output, from the journal: which one says why it ended, and whether VRAM ran out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from gpusvc.errors import GpusvcError
from gpusvc.journal import journalctl
from gpusvc.journal import units as unitlog
from gpusvc.printable import printable

# Messages of the runtimes of CUDA, HIP, Vulkan and SYCL, of PyTorch, llama.cpp, vLLM and SGLang.
_OUT_OF_MEMORY = (
    r"out of memory|OutOfMemoryError|ErrorOutOfMemory|ErrorOutOfDeviceMemory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|cudaErrorMemoryAllocation|CU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED|ALLOCATION_FAILED"
    r"|(unable|failed) to allocate (CUDA|ROCm|HIP|Vulkan|SYCL)"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
    r"|larger than the available KV cache memory|Not enough memory(\. Please try to increase| to allocate KV)"
)

# In which order lines tell why an engine ended; of lines of one kind, the first or the last one tells most.
_MEMORY, _EXCEPTION, _REFUSED, _ERROR = range(4)

# What stands before a line of a log: vLLM's process, the level with date and place, dates, llama.cpp's time and level.
_BEFORE = (
    r"^(\([\w ]+ pid=\d+\) *|(CRITICAL|ERROR|WARNING|INFO|[EWIDF]) +|\[[^\]]*\] *"
    r"|[\w./]+:\d+\] *|(\d{2,4}[-/.])?\d\d[-/.]\d\d[T ]+|\d\d:\d\d:\d\d[.,\d]* *|\d+(\.\d+){2,} +)*"
)

# The last line of a Python traceback.
_RAISED = r"([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Exit|Interrupt|Failure|NotFound|Unavailable)(: |$)"

# Exceptions that only say that another process has raised one.
_SECOND_HAND = (
    r"Engine core initialization failed|See root cause above|EngineDeadError|EngineCore encountered an issue"
    r"|ChildFailedError|CalledProcessError|Failed core proc|SystemExit|KeyboardInterrupt|Rank \d+ scheduler is dead"
    r"|Initialization failed\. (Please )?see"
)

# llama.cpp, argument parsers, loaders of libraries, Rust and Go.
_REFUSALS = (
    r"error loading model: |unknown model architecture|error while handling argument"
    r"|error: (unknown|invalid|un|arg|the fol)|error while loading shared libraries"
    r"|GGML_ASSERT\(|(CUDA|HIP|NCCL|ROCm)( \w+)? error|hipError|couldn't bind|failed to open GGUF|panicked at|^panic: "
    r"|CUDA driver version is insufficient|no kernel image is available|[Aa]ddress already in use"
)
_ERRORS = (
    r"\b(error|fatal|failed|failure|cannot|can't|could ?n[o']t|unable|not found|no such|denied|unsupported|invalid)\b"
)

_HARMLESS = r"Traceback \(most recent|^\W*(INFO|DEBUG)\b|\] (INFO|DEBUG)\b"

# Lines that report the end and not its reason.
_FAREWELLS = (
    r"exiting due to|cleaning up before exit|failed to load model|Received sigquit from a child|core dumped"
    r"|resource_tracker|destroy_process_group|Shutting down|Application startup failed|gpusvc left out"
)


# What precedes the last words in the launcher's sentence about the end of an engine.
LEAD = "its last words: "

# How long lines may take from a pipe to the journal where the caller may not run `journalctl --sync`.
_UNSYNCED_SECONDS = 1.0
_PAUSE_SECONDS = 0.05

_ANSWER_SECONDS = 5.0

# vLLM's last traceback alone has forty lines, and the reason is before it.
ENOUGH_LINES = 150

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
    """Return the line that tells best why the engine ended, from its last lines, oldest first, of which there is one.

    It is a line on memory, the end of a traceback, a refusal, or any error; else the last line.
    """
    found: dict[int, str] = {}
    for line in words:
        bare = re.sub(_BEFORE, "", line)
        if re.search(_FAREWELLS, line):
            continue
        if re.search(_OUT_OF_MEMORY, line, re.IGNORECASE):
            found.setdefault(_MEMORY, line)
        elif re.match(_RAISED, bare):
            if not re.search(_SECOND_HAND, line):
                found[_EXCEPTION] = line  # the last: the outermost of a chain
        elif re.search(_REFUSALS, bare):
            found.setdefault(_REFUSED, line)
        elif re.search(_ERRORS, bare, re.IGNORECASE) and not re.search(_HARMLESS, line):
            found[_ERROR] = line
    return found[min(found)] if found else words[-1]


def tells_of_memory(words: list[str]) -> bool:
    """Return whether the lines report that the GPU's memory ran out."""
    return any(re.search(_OUT_OF_MEMORY, line, re.IGNORECASE) for line in words)
