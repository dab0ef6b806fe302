"""Small files of state, read with suspicion: whoever may write to one of them may have put anything in its place.

It knows no format. What is no regular file is not read, as opening a FIFO waits for ever, and neither is what is larger
than any file of ours.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

# As of any file that gpusvc writes.
MAX_BYTES = 1024 * 1024


def read(file: Path, *, limit_bytes: int = MAX_BYTES) -> bytes:
    """What ``file`` says.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a regular file, or too large.
    """
    # O_NONBLOCK means nothing for a regular file; none of these is ever a link.
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return read_open(handle, limit_bytes=limit_bytes)
    finally:
        os.close(handle)


def read_open(handle: int, *, limit_bytes: int = MAX_BYTES) -> bytes:
    """What an open file says from here on; raises as read()."""
    require_regular(handle)
    # Not what the file says of its size: it may grow meanwhile.
    parts = []
    left = limit_bytes + 1
    while left and (part := os.read(handle, left)):
        parts.append(part)
        left -= len(part)
    if not left:
        raise ValueError("it is too large")
    return b"".join(parts)


def require_regular(handle: int) -> None:
    """Raises ValueError if this open file is not a regular one."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ValueError("it is no regular file")
