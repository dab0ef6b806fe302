"""TCP sockets by sock_diag(7): the kernel's list of sockets, and one socket by its two addresses.

Interface: netlink(7), and linux/inet_diag.h of the kernel. It needs no right but the address family AF_NETLINK.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

LISTEN = 10  # of include/net/tcp_states.h
SYN_RECV = 3

End = tuple[str, int]
"""An address and a port."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states; …
_SOCKET = struct.Struct("!HH16s16s")  # inet_diag_sockid, its last part: ports and addresses of both ends
_ANY_SOCKET = bytes(48)
_ANY_COOKIE = struct.pack("=III", 0, 2**32 - 1, 2**32 - 1)  # and its end: interface, INET_DIAG_NOCOOKIE
_ANSWER = struct.Struct("!xB2xH2x16s")  # inet_diag_msg: …, state, …, source port, …, source address, …
_OWNER = struct.Struct("=64xII")  # and at its end, in this machine's byte order: uid, inode
_ANSWER_BYTES = 72  # inet_diag_msg; attributes follow (struct nlattr: length, type)
_ATTRIBUTE = struct.Struct("=HH")
_SKV6ONLY, _CGROUP_ID = 11, 21
_ALL_STATES = 2**32 - 1

_ADDRESS_BYTES = {socket.AF_INET: 4, socket.AF_INET6: 16}


class Found(NamedTuple):
    """One socket."""

    state: int
    port: int
    address: bytes
    """The address that it is bound to, packed."""
    uid: int
    inode: int
    is_only_ipv6: bool
    cgroup_id: int | None
    """The control group in which the socket was made, as cgroupfs numbers it (the inode of the directory). A connection
    has the number of the socket that accepted it. None: the kernel does not say, as before Linux 5.9."""


def listening(family: int) -> Iterator[Found]:
    """Yield the listening sockets of a family.

    Raises:
        OSError: the kernel cannot list them.
    """
    with _kernel() as kernel:
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << LISTEN) + _ANY_SOCKET
        kernel.sendall(_message(_NLM_F_REQUEST | _NLM_F_DUMP, body))
        while True:
            for kind, answer in _messages(kernel.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return
                yield _found(family, answer)


def find(near: End, far: End) -> Found | None:
    """Return the socket of this machine at ``near`` that is connected to ``far``; None if there is none.

    It takes about 10 microseconds, however many sockets there are.

    Raises:
        OSError: the kernel cannot be asked.
    """
    family = socket.AF_INET6 if ":" in near[0] else socket.AF_INET
    ends = _SOCKET.pack(near[1], far[1], *(socket.inet_pton(family, end[0].partition("%")[0]) for end in (near, far)))
    with _kernel() as kernel:
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + ends + _ANY_COOKIE
        kernel.sendall(_message(_NLM_F_REQUEST, body))
        try:
            # The answer is there already: the kernel wrote it within the call.
            for _, answer in _messages(kernel.recv(1 << 12, socket.MSG_DONTWAIT)):
                return _found(family, answer)
        except FileNotFoundError:
            pass
    return None


def _kernel() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)


def _message(flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, *_ = _HEADER.unpack_from(data)
        body, data = data[_HEADER.size : length], data[length + 3 & ~3 :]
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", body)[0]
            raise OSError(number, os.strerror(number))
        yield kind, body


def _found(family: int, answer: bytes) -> Found:
    state, port, address = _ANSWER.unpack_from(answer)
    uid, inode = _OWNER.unpack_from(answer)
    attributes = dict(_attributes(answer[_ANSWER_BYTES:]))
    group = attributes.get(_CGROUP_ID)
    return Found(
        state,
        port,
        address[: _ADDRESS_BYTES[socket.AddressFamily(family)]],
        uid,
        inode,
        attributes.get(_SKV6ONLY, b"\0")[0] != 0,
        None if group is None else struct.unpack("=Q", group)[0],
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) > _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[max(length + 3 & ~3, _ATTRIBUTE.size) :]
