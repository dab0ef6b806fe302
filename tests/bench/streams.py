"""Many streams of tokens at a time: the engine that sends them, and the clients that take them, each one process.

Each event says when it was sent, by the clock that all processes of a machine share, so that whoever receives it knows
how long it was under way.

    streams.py engine PORT EVENTS_PER_SECOND
    streams.py clients URL MODEL KEY STREAMS SECONDS       prints "go", and "stop" with what was seen in between
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from statistics import median, quantiles
from typing import cast
from urllib.parse import urlsplit

import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}],"sent":%019d}\n\n'  # noqa: E501
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT % 0), _EVENT)
_SENT = re.compile(rb'"sent":([0-9]{19})\}')

# The first answers are not seen by the crowd of all that begin at once.
_BEGIN_SECONDS = 1.0


class Engine(asyncio.Protocol):
    """One connection, on which events come at a steady rate once anything was asked for, until it is closed."""

    def __init__(self, pause_seconds: float) -> None:
        self._pause_seconds = pause_seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._transport.write(_HEAD)
            self._next = self._loop.time()
            self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        self._transport.write(_CHUNK % time.monotonic_ns())
        self._next += self._pause_seconds
        self._timer = self._loop.call_at(self._next, self._tick)


class Seen:
    """What the clients saw; delays in nanoseconds."""

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.delays: list[int] = []
        self.broken = 0


class Client(asyncio.Protocol):
    """One stream."""

    def __init__(self, seen: Seen, request: bytes) -> None:
        self._seen = seen
        self._request = request
        self._asked = 0
        self._has_begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._asked = time.monotonic_ns()
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if not self._has_begun:
            self._has_begun = True
            self._seen.firsts.append(now - self._asked)
            if not data.startswith(b"HTTP/1.1 200 "):
                print(data[:200], file=sys.stderr)
                self._seen.broken += 1
        for sent in _SENT.findall(data):
            self._seen.delays.append(now - int(sent))

    def connection_lost(self, exc: Exception | None) -> None:
        self._seen.broken += 1


async def serve(port: int, rate: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Engine(1 / rate), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


async def take(url: str, model: str, key: str, streams: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    where = urlsplit(url)
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Well?"}]}).encode()
    host, port = where.hostname or "", where.port or 0
    head = f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    seen = Seen()
    transports = []
    for _ in range(streams):
        transport, _ = await loop.create_connection(lambda: Client(seen, head.encode() + body), host, port)
        transports.append(transport)
        await asyncio.sleep(_BEGIN_SECONDS / streams)
    seen.delays.clear()
    print("go", flush=True)
    await asyncio.sleep(seconds)
    delays, broken = list(seen.delays), seen.broken
    result = {
        "events": len(delays),
        "broken": broken,
        "first p50": median(seen.firsts) / 1e9,
        "first p99": quantiles(seen.firsts, n=100)[-1] / 1e9,
        "delay p50": median(delays) / 1e9,
        "delay p99": quantiles(delays, n=100)[-1] / 1e9,
    }
    print("stop", json.dumps(result), flush=True)
    for transport in transports:
        transport.abort()


def main() -> None:
    match sys.argv[1:]:
        case ["engine", port, rate]:
            uvloop.run(serve(int(port), float(rate)))
        case ["clients", url, model, key, streams, seconds]:
            uvloop.run(take(url, model, key, int(streams), float(seconds)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
