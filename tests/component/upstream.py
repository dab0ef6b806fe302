"""An engine that does as it is told: raw sockets of asyncio, so that it can also do what no HTTP server would.

What it says is a script: a coroutine for each request. ``Upstream.answer`` is the script, and may be another one at any
time; those that are needed often stand at the end.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


@dataclass
class Request:
    """As it came. Names of ``headers`` are in lower case."""

    method: str
    target: str
    fields: list[tuple[str, str]]
    body: bytes = b""

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)

    def json(self) -> dict[str, object]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


@dataclass
class Connection:
    """One connection of the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: list[Request] = field(default_factory=list)

    async def say(self, *data: bytes) -> None:
        """Send each piece by itself."""
        for piece in data:
            self.writer.write(piece)
            await self.writer.drain()

    def reset(self) -> None:
        """Go, as a process does that was killed with something unread."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the gateway has closed the connection."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass


Script = Callable[[Request, Connection], Awaitable[None]]


class Upstream:
    """Listens on a port of its own, or at a path."""

    def __init__(self, answer: Script | None = None) -> None:
        self.answer: Script = answer or whole(b'{"ok": true}')
        self.connections: list[Connection] = []
        self.requests: list[Request] = []
        self.cancelled = 0
        """Requests whose connection the gateway closed before their script had come to its end."""
        self.streams_body = False
        """Scripts begin before the body was read."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, path: Path | None = None) -> Self:
        if path is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]
        else:
            self._server = await asyncio.start_unix_server(self._serve, path)
        return self

    async def stop(self) -> None:
        """As if it died."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self.connections:
            connection.writer.transport.abort()

    @property
    def open(self) -> int:
        """Connections that the gateway keeps."""
        return sum(not connection.writer.transport.is_closing() for connection in self.connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = Connection(reader, writer)
        self.connections.append(connection)
        try:
            while (request := await self._read(connection)) is not None:
                connection.requests.append(request)
                self.requests.append(request)
                await self._play(request, connection)
        except (OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _play(self, request: Request, connection: Connection) -> None:
        try:
            await self.answer(request, connection)
        except OSError:
            self.cancelled += 1
            raise
        if connection.reader.at_eof():
            self.cancelled += 1

    async def _read(self, connection: Connection) -> Request | None:
        try:
            head = await connection.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        request = Request(method, target, pairs)
        if not self.streams_body:
            await read_body(request, connection)
        return request


async def read_body(request: Request, connection: Connection) -> None:
    """Take all of the request's body; raises IncompleteReadError if that does not come."""
    headers = request.headers
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await connection.reader.readuntil(b"\r\n"), 16):
            request.body += await connection.reader.readexactly(size)
            assert await connection.reader.readexactly(2) == b"\r\n"
        assert await connection.reader.readexactly(2) == b"\r\n"
    else:
        request.body = await connection.reader.readexactly(int(headers.get("content-length", 0)))


def whole(body: bytes, *, content_type: str = "application/json", status: str = "200 OK", more: str = "") -> Script:
    """A plain answer with its length."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode()

    async def script(request: Request, connection: Connection) -> None:
        await connection.say(head if request.method == "HEAD" else head + body)

    return script


def raw(*pieces: bytes, then: str = "keep") -> Script:
    """These bytes, one after the other, and then "keep" the connection, "close" or "reset" it."""

    async def script(_: Request, connection: Connection) -> None:
        await connection.say(*pieces)
        if then == "close":
            connection.writer.close()
            raise ConnectionAbortedError
        if then == "reset":
            connection.reset()
            raise ConnectionAbortedError

    return script


def chunked(pieces: Iterable[bytes], *, content_type: str = "text/event-stream", trailers: bytes = b"") -> bytes:
    """A chunked answer as one string of bytes."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(map(chunk, pieces)) + b"0\r\n" + trailers + b"\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


async def until_gone(_: Request, connection: Connection) -> None:
    """Begin a stream that never ends."""
    await connection.say(STREAM, chunk(event("one")))
    await connection.gone()


async def silence(_: Request, connection: Connection) -> None:
    """Say nothing until the gateway goes."""
    await connection.gone()


async def echo_websocket(request: Request, connection: Connection) -> None:
    """Accept an upgrade, and send back whatever comes."""
    key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
    await connection.say(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\nhello"
    )
    while data := await connection.reader.read(65536):
        await connection.say(data)
    connection.writer.close()
    raise ConnectionAbortedError
