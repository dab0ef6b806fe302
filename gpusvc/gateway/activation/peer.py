"""The check that a new connection leads to the model's engine, and not to another program on its port.

A lease may name a port that its engine has lost: the engine crashed, or its launcher was killed, and the release proof
has not removed the lease yet. Another program can listen there meanwhile. So each new connection is checked before a
byte of a request is sent. Connections that are kept for more requests were checked when they were new.
"""

from __future__ import annotations

import asyncio
import errno
import os

from gpusvc.linux import sockets


class StrangerError(OSError):
    """A process outside the model's control group took the connection."""

    def __init__(self) -> None:
        super().__init__(errno.EADDRINUSE, "another program has taken its port")


def require_engine(transport: asyncio.BaseTransport, cgroup_id: int | None) -> None:
    """Return if the socket at the other end was made in this control group, or if the kernel does not tell.

    Args:
        transport: a TCP connection to this machine.
        cgroup_id: of the engine's listening socket, from its lease. None: unknown, so that nothing is checked.

    Raises:
        StrangerError: it was made in another control group.
        ConnectionResetError: it is closed already.
    """
    if cgroup_id is None:
        return
    near, far = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
    if near is None or far is None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    found = sockets.peer_group(near[:2], far[:2])
    if found not in (None, cgroup_id):
        raise StrangerError
