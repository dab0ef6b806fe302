"""What an engine wrote before it ended, out of the journal, and whether that was a cry for memory."""

from __future__ import annotations

import re

# In the words of CUDA's and HIP's runtimes, PyTorch, llama.cpp and vLLM.
_OUT_OF_MEMORY = (
    r"out of memory|OutOfMemoryError|ErrorOutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|unable to allocate CUDA"
    r"|No available memory for the cache blocks|less than desired GPU memory utilization"
)


def last_words(*matches: str, lines: int = 30) -> list[str]:
    """The last lines of the journal that fit, oldest first; empty if they cannot be read.

    Args:
        matches: as journalctl(1) takes them: ``--unit=…``, ``FIELD=value``.
        lines: how many at most.
    """
    import subprocess  # noqa: PLC0415  most engines end without anybody asking why

    try:
        # The engine is dead, but journald may have its last lines still in the socket.
        subprocess.run(["journalctl", "--sync"], check=False, capture_output=True, timeout=2)  # noqa: S607
        command = ["journalctl", *matches, f"--lines={lines}", "--output=cat", "--no-pager"]
        done = subprocess.run(command, check=False, capture_output=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]


def tells_of_memory(words: list[str]) -> bool:
    """Whether the GPU's memory ran out."""
    return any(re.search(_OUT_OF_MEMORY, line, re.IGNORECASE) for line in words)
