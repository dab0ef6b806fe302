"""Host memory: that of the machine (proc_meminfo(5)), and what the processes of a control group use."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_KIB = 1024


class Memory(NamedTuple):
    """Bytes of host memory."""

    total_bytes: int
    available_bytes: int
    """What programs can take before the machine swaps; the page cache counts as free."""
    mapped_bytes: int
    """The part of the page cache that programs have mapped, such as the weights of running models.

    Shared and locked memory is not in it: neither counts as available.
    """


def read(file: Path = Path("/proc/meminfo")) -> Memory | None:
    """Return the memory of the machine; None if it cannot be read."""
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
        keys = ("MemTotal", "MemAvailable", "Mapped", "Shmem", "Active(file)", "Inactive(file)")
        total, available, mapped, shared, *cached = (int(rows[key].split()[0]) * _KIB for key in keys)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    # The kernel counts mapped shared memory in Mapped too, and locked pages, which are not in the two lists of files.
    return Memory(total, available, min(max(0, mapped - shared), sum(cached)))


def used_by(group: str | None, pids: Collection[int]) -> int:
    """Return the bytes that the end of these processes gives back: their own, shared and mapped memory.

    The page cache counts only as far as it is mapped: that is how engines use weights that stay in host memory. The
    processes tell how much they map: a page of a file counts for the control group that read it first, which may be
    that of an earlier run or of a download.

    Args:
        group: the directory of their control group; None, or one without a memory controller: only the processes are
            asked.
        pids: the processes.
    """
    own, shared, mapped = _of_processes(pids)
    if group is not None:
        try:
            rows = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
            anon, shmem, file_mapped = (int(rows[key]) for key in ("anon", "shmem", "file_mapped"))
        except (OSError, KeyError, ValueError):
            pass
        else:
            # Shared memory that is mapped is in both.
            return anon + shmem + max(mapped, file_mapped - shmem)
    return own + shared + mapped


def _of_processes(pids: Collection[int]) -> tuple[int, int, int]:
    """Return their own memory, the memory that they share, and what they map of files."""
    own = shared = mapped = 0
    for pid in pids:
        try:
            rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            sizes = [int(rows[key].split()[0]) * _KIB for key in ("RssAnon", "RssShmem", "RssFile")]
        except (OSError, KeyError, ValueError, IndexError):
            continue  # it has ended
        # The processes of an engine share these, so that a sum would count them several times.
        own, shared, mapped = own + sizes[0], max(shared, sizes[1]), max(mapped, sizes[2])
    return own, shared, mapped
