"""The check that an engine serves: its own socket listens on its port, and its health path answers.

Any program that listens on the port may answer 200. Only a socket of a process in the model's control group counts, and
no socket of another process may receive what is sent to it.
"""

from __future__ import annotations

import socket
import time

from gpusvc.errors import EngineError
from gpusvc.launcher import watching
from gpusvc.linux import processes, sockets
from gpusvc.linux.cgroup import Cgroup
from gpusvc.linux.sockets import Listener
from gpusvc.linux.users import User

# A socket may pass from a process to its child between the list of processes and a look at each.
_LOOKS = 3

# For a moment, the socket of a process that is just ending has no owner.
_OWNERLESS_SECONDS = 0.1


def listener(cgroup: Cgroup, port: int, user: User) -> Listener | None:
    """Return the socket on ``port`` of a process in ``cgroup``, which runs as ``user``; None if there is none yet.

    Raises:
        EngineError: a process outside ``cgroup`` has a socket that may receive what is sent to the engine.
    """
    listening = [found for found in sockets.listeners() if found.port == port]
    if not listening:
        return None
    own_inodes: set[int] = set()
    for _ in range(_LOOKS):
        with processes.acting_as(user.uid, user.gid):
            own_inodes |= sockets.owned_by(cgroup.pids())
        if own_inodes.issuperset(found.inode for found in listening):
            break
    own = [found for found in listening if found.inode in own_inodes]
    # Of several addresses, a loopback one is the most certain to reach the engine.
    where = min(own, key=lambda found: (not found.reachable_at.startswith("127."), found.address), default=None)
    for stranger in listening:
        if stranger.inode not in own_inodes and (where is None or stranger.may_receive_for(where)):
            raise EngineError(f"Port {port} is taken by another program: {sockets.holder(stranger)}.")
    return where


def settled_listener(cgroup: Cgroup, port: int, user: User, pidfd: int) -> Listener | None:
    """As listener(), for an engine that may be ending. Return None also if the process of ``pidfd`` has ended."""
    try:
        return listener(cgroup, port, user)
    except EngineError:
        if watching.ended(pidfd, _OWNERLESS_SECONDS):
            return None
    return listener(cgroup, port, user)


def elsewhere(cgroup: Cgroup, port: int, user: User) -> list[Listener]:
    """Return the sockets of processes in ``cgroup`` that listen on other ports than ``port``, by port."""
    others = [found for found in sockets.listeners() if found.port != port]
    with processes.acting_as(user.uid, user.gid):
        own_inodes = sockets.owned_by(cgroup.pids())
    return sorted((found for found in others if found.inode in own_inodes), key=lambda found: found.port)


def is_well(status: int | None) -> bool:
    """Return whether the result of ask() says that the engine serves: 2xx or 3xx."""
    return status is not None and 200 <= status < 400


def answers(where: Listener, path: str, timeout_seconds: float, *, key: str | None = None) -> bool:
    """Return whether the health ``path`` answers with 2xx or 3xx; for an empty path, whether a connection opens."""
    return is_well(ask(where, path, timeout_seconds, key=key))


def ask(where: Listener, path: str, timeout_seconds: float, *, key: str | None = None) -> int | None:
    """Return the HTTP status of a GET of ``path``, or None without an answer; for no path, 200 if a connection opens.

    ``key`` is the API key that the engine asks for.

    http.client would cost each launcher 5 MB, and only the status line counts.
    """
    address = where.reachable_at
    host = f"[{address}]" if ":" in address else address
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{where.port}\r\nUser-Agent: gpusvc\r\nConnection: close\r\n"
    request += "\r\n" if key is None else f"Authorization: Bearer {key}\r\n\r\n"
    try:
        deadline = time.monotonic() + timeout_seconds
        with socket.create_connection((address, where.port), timeout=timeout_seconds) as connection:
            if not path:
                return 200
            connection.sendall(request.encode())
            head = b""
            while b"\r\n" not in head and len(head) < 1024:
                # The deadline is for the whole response, not for each byte.
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                received = connection.recv(1024)
                if not received:
                    return None
                head += received
    except OSError:
        return None
    version, _, rest = head.partition(b" ")
    return int(rest[:3]) if version.startswith(b"HTTP/1.") and rest[:3].isdigit() and len(rest) > 2 else None
