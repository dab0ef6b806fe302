"""Long responses to a few clients: server-sent events (WHATWG HTML, 9.2), and JSON arrays sent as they are read.

A response holds one element at a time. A client that does not read is disconnected.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from gpusvc.errors import GpusvcError
from gpusvc.printable import escaped_json

# Long responses at a time. Each one of a log has a journalctl(1) of its own.
MAX_FOLLOWERS = 64

# A comment in every pause shows whether the client is still connected, and keeps proxies from closing the stream.
_SILENCE_SECONDS = 15.0

# A client that reads nothing for so long is disconnected.
_PATIENCE_SECONDS = 30.0


_END = object()


class TooManyFollowersError(GpusvcError):
    """The limit of long responses is reached."""

    http_status = 503
    retry_after_seconds = 30


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a stream; ``id`` is what a client that comes again says in Last-Event-ID."""

    data: Any
    event: str | None = None
    id: str | None = None

    def encode(self) -> bytes:
        lines = [] if self.event is None else [f"event: {self.event}"]
        lines += [] if self.id is None else [f"id: {self.id}"]
        # JSON has no line breaks of its own.
        lines.append(f"data: {escaped_json(json.dumps(self.data, ensure_ascii=False))}")
        return ("\n".join(lines) + "\n\n").encode(errors="replace")


class Streams:
    """All streams of one API; they end with close()."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def send(self, request: web.Request, messages: AsyncGenerator[Message, None]) -> web.StreamResponse:
        """Send ``messages`` as they come, until there are no more, the client is gone, or does not read.

        Raises:
            TooManyFollowersError: there are enough already.
        """
        with self._counted():
            async with aclosing(messages):
                return await self._send(request, messages)

    async def send_array(self, request: web.Request, values: AsyncIterator[Any]) -> web.StreamResponse:
        """Send ``values`` as one JSON array. It never holds more than one of them.

        An error before the first value is raised, so that it becomes a status. After that nothing can say so but the
        end of the connection: the array then has no closing bracket.

        Raises:
            TooManyFollowersError: there are enough already.
            GpusvcError: the first value could not be read.
        """
        with self._counted():
            value = await anext(values, _END)
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-store"})
            await response.prepare(request)
            if request.method == "HEAD":
                return response
            start = b"["
            try:
                while value is not _END:
                    text = escaped_json(json.dumps(value, ensure_ascii=False))
                    await _write(request, response, start + text.encode(errors="replace"))
                    start = b", "
                    value = await anext(values, _END)
                await _write(request, response, b"[]\n" if start == b"[" else b"]\n")
                await response.write_eof()
            except GpusvcError:
                if request.transport is not None:
                    request.transport.abort()
            except (ConnectionError, TimeoutError):
                pass  # the client is gone
            return response

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count this response among those that close() ends."""
        if len(self._tasks) >= MAX_FOLLOWERS:
            raise TooManyFollowersError(f"{MAX_FOLLOWERS} clients follow events and logs already.")
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _send(self, request: web.Request, messages: AsyncGenerator[Message, None]) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        pending: asyncio.Future[Message] | None = None
        try:
            await _write(request, response, b": here it comes\n\n")
            while not is_gone(request):
                pending = pending or asyncio.ensure_future(anext(messages))
                done, _ = await asyncio.wait({pending}, timeout=_SILENCE_SECONDS)
                if not done:
                    await _write(request, response, b":\n\n")
                    continue
                finished, pending = pending, None
                try:
                    message = finished.result()
                except StopAsyncIteration:
                    break
                except GpusvcError as error:
                    message = Message({"message": error.message, "hint": error.hint}, event="error")
                    messages = _nothing()
                await _write(request, response, message.encode())
            await response.write_eof()
        except (ConnectionError, TimeoutError):
            pass  # the client is gone
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
        return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise


async def _nothing() -> AsyncGenerator[Message, None]:
    return
    yield


def is_gone(request: web.Request) -> bool:
    """Whether the client closed the connection."""
    return request.transport is None or request.transport.is_closing()
