"""Read the weights of the next engine into the page cache while the models before it leave their GPU.

The parked process does it: it has nothing else to do then, and ends with the launcher. It reads at idle I/O priority,
with the rights of the engine's user, and only if all files fit beside what running programs use: a file that pushes
another model's weights out of memory costs more than it saves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence

from gpusvc import files
from gpusvc.linux import memory, processes
from gpusvc.linux.users import User
from gpusvc.quantity import GIB, MIB

# What stays free beside the files.
_SPARE_BYTES = 1 * GIB

# Between two looks at whether it is enough: some milliseconds of a slow disk.
_CHUNK_BYTES = 2 * MIB

# linux/ioprio.h. The next number is that of ioprio_get(2).
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_THIS_PROCESS = 1
_IDLE_CLASS = 3 << 13


def read_ahead(paths: Sequence[str], user: User, is_over: Callable[[], bool]) -> None:
    """Read files until ``is_over()``; nothing if they do not fit.

    Args:
        paths: the files, in the order in which the engine reads them.
        user: whose rights are used.
        is_over: called between chunks.
    """
    with contextlib.ExitStack() as stack:
        handles = []
        with processes.acting_as(user.uid, user.gid):
            for path in paths:
                with contextlib.suppress(OSError, ValueError):
                    handle = files.open_regular(path, follow_links=True)
                    stack.callback(os.close, handle)
                    handles.append(handle)
        if not fits(sum(os.fstat(handle).st_size for handle in handles), memory.read()):
            return
        stack.enter_context(_idle_priority())
        for handle in handles:
            _read(handle, is_over)


def fits(size_bytes: int, found: memory.Memory | None) -> bool:
    """Return whether files of this size fit into the page cache beside what programs use. Unknown memory: no."""
    return found is not None and size_bytes + found.mapped_bytes + _SPARE_BYTES <= found.available_bytes


def _read(handle: int, is_over: Callable[[], bool]) -> None:
    """Read a file without copying it: posix_fadvise(2) asks for a chunk, and reading its last byte waits for it."""
    size = os.fstat(handle).st_size
    with contextlib.suppress(OSError):
        for at in range(0, size, _CHUNK_BYTES):
            if is_over():
                return
            os.posix_fadvise(handle, at, _CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
            os.pread(handle, 1, min(at + _CHUNK_BYTES, size) - 1)


@contextlib.contextmanager
def _idle_priority() -> Iterator[None]:
    """Read only when nobody else reads. The engine must not inherit that, so it ends with the block."""
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is None:
        yield
        return
    libc = ctypes.CDLL(None)
    before = libc.syscall(number + 1, _THIS_PROCESS, 0)  # IOSchedulingClass= of the unit may have set it
    libc.syscall(number, _THIS_PROCESS, 0, _IDLE_CLASS)
    try:
        yield
    finally:
        libc.syscall(number, _THIS_PROCESS, 0, max(before, 0))
