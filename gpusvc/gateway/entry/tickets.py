"""Which tickets were used, for all workers: each ticket is valid once. The memory and its lock are the kernel's."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct

_MOST = 1024

# When the ticket is no longer valid, in seconds, and its digest.
_ENTRY = struct.Struct("=d24s")


class UsedTickets:
    """Made before the workers are forked, so that they share it. Nothing of it is left when the last one ends."""

    def __init__(self) -> None:
        size = _MOST * _ENTRY.size
        self._fd = os.memfd_create("gpusvc-tickets", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._entries = mmap.mmap(self._fd, size)

    def take(self, ticket: bytes, *, now: float, expires: float) -> bool:
        """Note that ``ticket`` is used. Return whether this is its first use.

        Args:
            ticket: a valid one: strangers cannot fill the memory.
            now: the time in seconds.
            expires: when the ticket is no longer valid.
        """
        digest = hashlib.sha256(ticket).digest()[:24]
        free: int | None = None
        # A lock of the process (fcntl(2)), so that the workers exclude each other although they inherited one file. It
        # is held for microseconds, and the kernel releases it if the worker dies.
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            for offset in range(0, _MOST * _ENTRY.size, _ENTRY.size):
                until, known = _ENTRY.unpack_from(self._entries, offset)
                if until < now:
                    free = offset if free is None else free
                elif known == digest:
                    return False
            if free is None:
                return False  # rather refuse a ticket than forget one
            _ENTRY.pack_into(self._entries, free, expires, digest)
            return True
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
