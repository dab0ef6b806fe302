"""What asyncio cannot say about a TCP connection, or do with it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

# SO_LINGER on, for no time: closing sends a reset.
_RESET = struct.pack("ii", 1, 0)

# The first byte of struct tcp_info.
_TCP_CLOSE = 7
_TCP_CLOSE_WAIT = 8

# tcpi_bytes_acked of struct tcp_info: bytes that the peer's kernel took, and one more for the connection itself.
_ACKED = struct.Struct("=120xQ")


def reset(transport: asyncio.Transport) -> None:
    """Close at once by a reset: only that tells a client of HTTP/1.0 that a response was not whole."""
    connection = _socket(transport)
    if connection is not None:
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def is_reset(transport: asyncio.Transport) -> bool:
    """Whether the peer has reset the connection. The loop does not notice while nothing is read."""
    return _state(transport) == _TCP_CLOSE


def is_left(transport: asyncio.Transport) -> bool:
    """Whether the peer has closed or reset the connection. The loop does not notice while nothing is read."""
    return _state(transport) in (_TCP_CLOSE, _TCP_CLOSE_WAIT)


def acknowledged_bytes(transport: asyncio.Transport) -> int | None:
    """How many bytes the peer's kernel took, and one more; None: unknown."""
    info = _info(transport, _ACKED.size)
    return int(_ACKED.unpack(info)[0]) if info is not None and len(info) == _ACKED.size else None


def _state(transport: asyncio.Transport) -> int | None:
    info = _info(transport, 1)
    return info[0] if info else None


def _info(transport: asyncio.Transport, size: int) -> bytes | None:
    connection = _socket(transport)
    if connection is None:
        return None
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except (OSError, ValueError):  # it is closed on this side
        return None


def _socket(transport: asyncio.Transport) -> socket.socket | None:
    connection: socket.socket | None = transport.get_extra_info("socket")
    return connection if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6) else None
