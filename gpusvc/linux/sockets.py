"""Listening TCP sockets and the processes that own them, as the kernel shows them.

A port that answers does not prove that the engine serves: an orphan of an earlier run may answer. Only the control
group of the socket's owner proves it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpusvc.linux import processes

_FAMILIES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}
_LISTEN = 10  # TCP_LISTEN in the kernel's include/net/tcp_states.h

# sock_diag(7), netlink(7) and linux/inet_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI48x")  # inet_diag_req_v2: family, protocol, extensions, padding, states, socket
_ANSWER = struct.Struct("!4xH2x16s")  # inet_diag_msg: …, source port, …, source address, …
_OWNER = struct.Struct("=64xII")  # and at its end, in this machine's byte order: uid, inode

_MESSAGE_BYTES = 72  # inet_diag_msg; attributes follow (struct nlattr: length, type)
_ATTRIBUTE = struct.Struct("=HH")
_SKV6ONLY = 11  # INET_DIAG_SKV6ONLY

_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, where an IPv6 socket has an IPv4 address


class Listener(NamedTuple):
    """A TCP socket in the state LISTEN. ``address`` is the address that it is bound to, which may be a wildcard."""

    address: str
    port: int
    inode: int
    uid: int
    only_ipv6: bool = False
    """Whether a socket at ``::`` gets no connections to IPv4 addresses."""

    @property
    def reachable_at(self) -> str:
        """An address at which this machine reaches it: the loopback address for a wildcard."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # noqa: S104

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


def _ask(family: int) -> Iterator[Listener]:
    """Yield the listening sockets by sock_diag(7), which is faster than /proc/net: its tables hold all sockets."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        size = _HEADER.size + _REQUEST.size
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _LISTEN)
        kernel.sendall(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0) + request)
        while True:
            answers = kernel.recv(1 << 16)
            while answers:
                length, kind, *_ = _HEADER.unpack_from(answers)
                if kind == _NLMSG_DONE:
                    return
                answer, answers = answers[_HEADER.size : length], answers[length + 3 & ~3 :]
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", answer)[0]
                    raise OSError(number, os.strerror(number))
                port, address = _ANSWER.unpack_from(answer)
                uid, inode = _OWNER.unpack_from(answer)
                text = _text(address if family == socket.AF_INET6 else address[:4])
                yield Listener(text, port, inode, uid, text == "::" and _is_only_ipv6(answer[_MESSAGE_BYTES:]))


def _is_only_ipv6(attributes: bytes) -> bool:
    while len(attributes) > _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _SKV6ONLY:
            return attributes[_ATTRIBUTE.size] != 0
        attributes = attributes[max(length + 3 & ~3, _ATTRIBUTE.size) :]
    return False


def _read_tables() -> Iterator[Listener]:
    """Yield the listening sockets by /proc/net (Documentation/networking/proc_net_tcp.rst of the kernel)."""
    for table in _FAMILIES:
        try:
            rows = Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue  # IPv6 may be switched off
        for row in rows:
            fields = row.split()
            if int(fields[3], 16) == _LISTEN:
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
