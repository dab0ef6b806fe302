"""Who sent a request: for the journal, never for a decision. Everybody who may open the socket may do everything."""

from __future__ import annotations

import pwd
import socket
import struct

from aiohttp import web

# The gateway sets this header, and removes it from the requests of its clients.
KEY_HEADER = "X-Gpusvc-Key"
_GATEWAY = "gpusvc-gateway"

_CREDENTIALS = struct.Struct("3i")


def caller(request: web.Request) -> str:
    """Return the user at the other end of the socket, or the name of the gateway client's key."""
    user = _user(request)
    key = request.headers.get(KEY_HEADER, "")
    if user == _GATEWAY and key:
        return f"key {key[:64]!r}"
    return f"user {user}"


def _user(request: web.Request) -> str:
    connection = None if request.transport is None else request.transport.get_extra_info("socket")
    if connection is None:
        return "unknown"
    try:
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return pwd.getpwuid(uid).pw_name
    except (OSError, KeyError):
        return "unknown"
