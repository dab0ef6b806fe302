"""Whether an engine serves: its own socket listens on its port, and its health path answers.

Anything that listens on the port may answer 200 there. Only a socket that a process of the model's own control group
holds makes it ready.
"""

from __future__ import annotations

import socket
import time

from gpusvc.errors import EngineError
from gpusvc.linux import processes, sockets
from gpusvc.linux.cgroup import Cgroup
from gpusvc.linux.sockets import Listener
from gpusvc.linux.users import User

# A socket may go from a process to its child between the list of processes and a look at each.
_LOOKS = 3


def listener(cgroup: Cgroup, port: int, user: User) -> Listener | None:
    """The socket of a process in ``cgroup``, of ``user``'s, that listens on ``port``; None if there is none yet.

    Raises:
        EngineError: somebody else listens there too, at the same address: requests would reach either.
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
    strangers = [found for found in listening if found.inode not in own_inodes]
    for stranger in strangers:
        if not own or any(found.address == stranger.address for found in own):
            raise EngineError(f"Port {port} is taken by another program: {sockets.holder(stranger)}.")
    # One that listens on several addresses is reached most surely on the loopback one.
    return min(own, key=lambda found: (not found.reachable_at.startswith("127."), found.address), default=None)


def answers(where: Listener, path: str, timeout_seconds: float) -> bool:
    """Whether the health ``path`` answers with a status of 2xx or 3xx; with an empty one, whether a connection opens.

    Written out rather than asked of http.client: that costs each launcher 5 MB, and the status line is all that counts.
    """
    address = where.reachable_at
    host = f"[{address}]" if ":" in address else address
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{where.port}\r\nUser-Agent: gpusvc\r\nConnection: close\r\n\r\n"
    try:
        deadline = time.monotonic() + timeout_seconds
        with socket.create_connection((address, where.port), timeout=timeout_seconds) as connection:
            if not path:
                return True
            connection.sendall(request.encode())
            head = b""
            while b"\r\n" not in head and len(head) < 1024:
                # Of all that it sends, not of each byte.
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                received = connection.recv(1024)
                if not received:
                    return False
                head += received
    except OSError:
        return False
    version, _, rest = head.partition(b" ")
    return version.startswith(b"HTTP/1.") and rest[:1] in {b"2", b"3"} and rest[1:3].isdigit()
