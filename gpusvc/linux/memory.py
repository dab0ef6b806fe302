"""The memory of the machine, from /proc/meminfo (proc_meminfo(5))."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_KIB = 1024


class Memory(NamedTuple):
    """Bytes of host memory."""

    total_bytes: int
    available_bytes: int
    """What programs can take before the machine swaps; the page cache counts as free."""
    mapped_bytes: int
    """The part of the page cache that programs have mapped, such as the weights of running models."""


def read(file: Path = Path("/proc/meminfo")) -> Memory | None:
    """Return the memory of the machine; None if it cannot be read."""
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
        total, available, mapped = (int(rows[key].split()[0]) * _KIB for key in ("MemTotal", "MemAvailable", "Mapped"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return Memory(total, available, mapped)
