"""Listening TCP sockets and who owns them, as /proc/net shows them.

A port that answers proves nothing: an orphan of yesterday may be the one that answers. Only the owner's control group
tells whose port it is.
"""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"  # TCP_LISTEN in the kernel's include/net/tcp_states.h


class Listener(NamedTuple):
    """A TCP socket in the state LISTEN. ``address`` is what it is bound to, a wildcard included."""

    address: str
    port: int
    inode: int
    uid: int

    @property
    def reachable_at(self) -> str:
        """An address under which this machine reaches it: the loopback one for a wildcard."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # noqa: S104


def listeners() -> list[Listener]:
    """All of them, in this network namespace (proc_net_tcp: Documentation/networking/proc_net_tcp.rst)."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            rows = Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue  # IPv6 may be switched off
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTEN:
                address, port = fields[1].split(":")
                found.append(Listener(_address(address), int(port, 16), int(fields[9]), int(fields[7])))
    return found


def owned_by(pids: Iterable[int]) -> set[int]:
    """Inodes of the sockets that ``pids`` hold open, as far as the caller may see that (processes.acting_as())."""
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # gone meanwhile
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile, as busy programs do all the time
                    link = str(entry.readlink())
                    if link.startswith("socket:["):
                        inodes.add(int(link[len("socket:[") : -1]))
    return inodes


def owner(inode: int) -> int | None:
    """A PID that holds the socket open; None if none is to be seen."""
    everybody = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return next((pid for pid in everybody if inode in owned_by([pid])), None)


def _address(hexadecimal: str) -> str:
    # Words of 32 bits, each printed as a number of this machine's byte order.
    words = [int(hexadecimal[i : i + 8], 16) for i in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
