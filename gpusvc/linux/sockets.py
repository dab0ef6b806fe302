"""Listening TCP sockets and the processes that own them, as the kernel shows them.

A port that answers does not prove that the engine serves: an orphan of an earlier run may answer. Only the control
group of the socket's owner proves it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpusvc.linux import processes, sock_diag
from gpusvc.linux.sock_diag import End

_FAMILIES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}

# cgroupfs numbers its directories from 1 on.
_SEVERAL = 0

_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, where an IPv6 socket has an IPv4 address


class Listener(NamedTuple):
    """A TCP socket in the state LISTEN. ``address`` is the address that it is bound to, which may be a wildcard."""

    address: str
    port: int
    inode: int
    uid: int
    only_ipv6: bool = False
    """Whether a socket at ``::`` gets no connections to IPv4 addresses."""
    cgroup_id: int | None = None
    """The control group in which the socket was made, by the kernel's number; None: unknown."""

    @property
    def reachable_at(self) -> str:
        """An address at which this machine reaches it: the loopback address for a wildcard."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # noqa: S104

    @property
    def is_loopback(self) -> bool:
        """Whether this machine reaches it at a loopback address."""
        address = self.reachable_at
        return address == "::1" or address.startswith("127.")

    def may_receive_for(self, other: Listener) -> bool:
        """Return whether the kernel may give this socket a connection that is meant for ``other``.

        It does so if both are bound to the same address (SO_REUSEPORT). A socket at the exact address comes before one
        at a wildcard address, which in turn gets the connections as soon as the first one is closed.
        """
        target = other.reachable_at
        if self.port != other.port:
            return False
        if self.address in (target, other.address):
            return True
        if ":" in target:
            return self.address == "::"
        return self.address == "0.0.0.0" or (self.address == "::" and not self.only_ipv6)  # noqa: S104


def listeners() -> list[Listener]:
    """Return all listening TCP sockets of this network namespace."""
    try:
        return [found for family in _FAMILIES.values() for found in _ask(family)]
    except OSError:
        return list(_read_tables())  # a kernel that neither has tcp_diag nor may load it


def owned_by(pids: Iterable[int]) -> set[int]:
    """Return the inodes of the sockets that ``pids`` hold open and the caller may see (processes.acting_as())."""
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has ended
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # the file was closed meanwhile, as happens often in busy programs
                    link = str(entry.readlink())
                    if link.startswith("socket:["):
                        inodes.add(int(link[len("socket:[") : -1]))
    return inodes


def owner(inode: int) -> int | None:
    """Return a PID that holds the socket open; None if the caller sees none."""
    everybody = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return next((pid for pid in everybody if inode in owned_by([pid])), None)


def peer_group(near: End, far: End) -> int | None:
    """Return the control group in which the other end of a connection was made, by the kernel's number.

    Both ends have to be on this machine. Return None if the kernel does not tell, and a number that no control group
    has if it may be one of several.

    Args:
        near: the caller's end.
        far: the other end.

    Raises:
        ConnectionResetError: the other end is closed.
    """
    try:
        peer, own = sock_diag.find(far, near), None
        if peer is None:
            own = sock_diag.find(near, far)
    except OSError:
        return None  # the caller's unit lacks AF_NETLINK
    if peer is None and own is None:
        return None  # the kernel lacks tcp_diag
    if peer is None or peer.state == sock_diag.LISTEN:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    if peer.state != sock_diag.SYN_RECV:
        return peer.cgroup_id
    # The connection has no socket yet, because the queue of a listener is full. It may be any of these listeners.
    meant = Listener(*far, 0, 0)
    groups = {each.cgroup_id for each in listeners() if each.may_receive_for(meant)}
    return groups.pop() if len(groups) == 1 else _SEVERAL


def _ask(family: int) -> Iterator[Listener]:
    """Yield the listening sockets by sock_diag(7), which is faster than /proc/net: its tables hold all sockets."""
    for found in sock_diag.listening(family):
        text = _text(found.address)
        only_ipv6 = text == "::" and found.is_only_ipv6
        yield Listener(text, found.port, found.inode, found.uid, only_ipv6, found.cgroup_id)


def _read_tables() -> Iterator[Listener]:
    """Yield the listening sockets by /proc/net (Documentation/networking/proc_net_tcp.rst of the kernel)."""
    for table in _FAMILIES:
        try:
            rows = Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue  # IPv6 may be switched off
        for row in rows:
            fields = row.split()
            if int(fields[3], 16) == sock_diag.LISTEN:
                address, port = fields[1].split(":")
                # Words of 32 bits, each printed as a number in this machine's byte order.
                words = struct.unpack(f"!{len(address) // 8}I", bytes.fromhex(address))
                raw = struct.pack(f"={len(words)}I", *words)
                yield Listener(_text(raw), int(port, 16), int(fields[9]), int(fields[7]))


def _text(address: bytes) -> str:
    address = address.removeprefix(_MAPPED)
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def holder(stranger: Listener) -> str:
    """Return a phrase that names the process or the user who has this socket open."""
    try:
        user = pwd.getpwuid(stranger.uid)
    except KeyError:
        return f"one of the unknown user {stranger.uid}"
    with processes.acting_as(user.pw_uid, user.pw_gid):
        pid = owner(stranger.inode)
    return f"one of {user.pw_name}" if pid is None else f"PID {pid} ({processes.command(pid)}) of {user.pw_name}"
