"""Whether a loading engine makes progress. This module compares two readings and reads no clock."""

from __future__ import annotations

from gpusvc.quantity import MIB
from gpusvc.record import Record

# A tenth of one core. An engine that waits for a lock or a network uses far less, an engine that loads far more.
_CPU_SHARE = 0.1
_IO_BYTES = 1 * MIB
_VRAM_BYTES = 1 * MIB


class Consumption(Record):
    """What an engine has used up to one moment. None: unknown."""

    at_seconds: float
    cpu_seconds: float | None
    io_bytes: int
    vram_bytes: int | None


def moved(before: Consumption, after: Consumption) -> bool:
    """Return whether CPU time, I/O or VRAM changed between the readings by more than they do in an idle process."""
    elapsed = after.at_seconds - before.at_seconds
    if after.io_bytes - before.io_bytes >= _IO_BYTES:
        return True
    known = before.vram_bytes is not None and after.vram_bytes is not None
    if known and abs((after.vram_bytes or 0) - (before.vram_bytes or 0)) >= _VRAM_BYTES:
        return True
    if before.cpu_seconds is None or after.cpu_seconds is None:
        return False
    return after.cpu_seconds - before.cpu_seconds >= _CPU_SHARE * elapsed
