"""Those who use the models: clients of the gateway, and programs that hold ``use``. They live outside of the machine.

A thread of its own with an event loop, in the machine's network namespace: nothing that is done to the machine's
processes hits them. Its files they open through /proc.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tests.campaign.invariants import Answer, Insisted, Probed

GATEWAY_PORT = 8484
ANSWER_SECONDS = 60.0
"""Longer than everything that the gateway may wait for on the campaign's machine."""

_ECHO_SECONDS = 10.0
_LONGEST_SECONDS = 120.0

_CLONE_NEWNET = 0x40000000


@dataclass(slots=True)
class Hold:
    """One program that uses a model."""

    model: str
    is_inside: bool = False
    """Between taking ``use`` and giving it up."""
    wants: bool = True
    fd: int = -1


@dataclass(slots=True)
class Connection:
    """One client with a connection that became another protocol's, on which it keeps quiet until its end."""

    model: str
    is_open: bool = False
    wants: bool = True
    is_over: bool = False
    run: float | None = None
    """Of which run of the engine, by its lease; the campaign notes it."""
    problem: str | None = None
    """What went wrong with it, as the end of a sentence."""


class Users:
    """All of them, from one boot of the machine to its end."""

    _numbers = itertools.count(1)

    def __init__(self, pid: int, models: Path) -> None:
        """
        Args:
            pid: the machine's PID 1.
            models: its /run/gpusvc/models.
        """
        self.answers: list[Answer] = []
        """Taken by the campaign as they come."""
        self.pending: dict[int, tuple[str, float]] = {}
        self.holds: list[Hold] = []
        self.connections: list[Connection] = []
        self.insisted: list[Insisted] = []
        self.insisting: list[str] = []
        """The models that clients ask for again and again, at this moment."""
        self.probed: list[Probed] = []
        self._models = models
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=self._live, args=(pid, started), daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the users did not come up")

    def request(self, model: str, seconds: float) -> None:
        """Ask a model something through the gateway; its answer takes so long."""
        number = next(self._numbers)
        self.pending[number] = (model, time.monotonic())
        self._spawn(self._ask(number, model, seconds))

    def swap(self, models: Sequence[str], seconds: float) -> None:
        """Ask one model after the other, each once the one before has answered."""
        numbers = [next(self._numbers) for _ in models]
        for number, model in zip(numbers, models, strict=True):
            self.pending[number] = (model, time.monotonic())

        async def ask() -> None:
            for number, model in zip(numbers, models, strict=True):
                await self._ask(number, model, seconds)

        self._spawn(ask())

    def insist(self, model: str, patience: float, tries: int) -> None:
        """Ask a model something, go away after ``patience`` seconds without an answer, and ask again."""
        self.insisting.append(model)
        self._spawn(self._insist(model, patience, tries))

    def connect(self, model: str, seconds: float) -> None:
        """Open a connection that is no HTTP any more, keep quiet, and say something at its end."""
        connection = Connection(model)
        self.connections.append(connection)
        self._spawn(self._converse(connection, seconds))

    def probe(self, model: str, path: str) -> None:
        """Look at a model's state."""
        number = next(self._numbers)
        self.pending[number] = (model, time.monotonic())
        self._spawn(self._look_at(number, model, path))

    def hold(self, model: str, seconds: float) -> Hold:
        """Use a model for a while, by its two locks."""
        hold = Hold(model)
        self.holds.append(hold)
        self._spawn(self._use(hold, seconds))
        return hold

    def leave(self) -> None:
        """Have everybody give up what he holds."""
        for hold in self.holds:
            hold.wants = False
        for connection in self.connections:
            connection.wants = False

    def close(self) -> None:
        """End all of them; requests under way are not answered any more, and not counted."""
        self.leave()
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)
        self.pending.clear()
        self.insisting.clear()

    # In the thread

    def _live(self, pid: int, started: threading.Event) -> None:
        with Path(f"/proc/{pid}/ns/net").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(started.set)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        # Once they have had their turn to let go.
        self._loop.call_later(0.1, self._loop.stop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    async def _ask(self, number: int, model: str, seconds: float) -> None:
        question = f"question {number}"
        began = time.monotonic()
        status, body, problem = None, b"", ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                status, body = await _post(model, question, seconds)
        except TimeoutError:
            problem = "it waits for ever"
        except (OSError, EOFError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        self.answers.append(Answer(number, model, question, began, time.monotonic(), status, body, problem))
        self.pending.pop(number, None)

    async def _insist(self, model: str, patience: float, tries: int) -> None:
        began = time.monotonic()
        asked, last = 0, ""
        while asked < tries and time.monotonic() - began < _LONGEST_SECONDS:
            asked += 1
            question = f"question {next(self._numbers)}"
            once = time.monotonic()
            try:
                async with asyncio.timeout(patience):
                    status, body = await _post(model, question, 0.0)
            except (TimeoutError, OSError, EOFError, ValueError):
                pass  # it goes away, or is sent away
            else:
                now, last = time.monotonic(), body.decode(errors="replace")
                self.answers.append(Answer(0, model, question, once, now, status, body, is_patient=False))
                if status == HTTPStatus.OK:
                    self.insisted.append(Insisted(model, began, now, None))
                    break
            await asyncio.sleep(0.3)
        else:
            self.insisted.append(Insisted(model, began, time.monotonic(), asked, last))
        self.insisting.remove(model)

    async def _look_at(self, number: int, model: str, path: str) -> None:
        began = time.monotonic()
        status, code, problem = None, "", ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                status, body = await _exchange(b"GET /upstream/%b/%b" % (model.encode(), path.encode()))
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                code = str(json.loads(body)["error"].get("code"))
        except TimeoutError:
            problem = "no answer"
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        self.probed.append(Probed(model, path, began, time.monotonic(), status, code, problem))
        self.pending.pop(number, None)

    async def _converse(self, connection: Connection, seconds: float) -> None:
        question = f"socket of {connection.model}"
        began = time.monotonic()
        writer = None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", GATEWAY_PORT)
                writer.write(_UPGRADE % connection.model.encode())
                status, fields = await _read_head(reader)
                if status != HTTPStatus.SWITCHING_PROTOCOLS:
                    body = await reader.readexactly(int(fields.get("content-length", "0")))
                    now = time.monotonic()
                    self.answers.append(Answer(0, connection.model, question, began, now, status, body))
                    return
            connection.is_open = True
            if await _keep_quiet(connection, reader, time.monotonic() + seconds):
                connection.problem = await _say(reader, writer)
            else:
                connection.problem = "was closed"
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            if connection.is_open:
                connection.problem = f"broke: {type(error).__name__}: {error}"
        finally:
            if writer is not None:
                writer.transport.abort()
            connection.is_over = True

    async def _use(self, hold: Hold, seconds: float) -> None:
        directory = self._models / hold.model
        end = time.monotonic() + seconds
        door = -1
        try:
            door = os.open(directory / "door", os.O_RDWR | os.O_CLOEXEC)
            hold.fd = os.open(directory / "use", os.O_RDWR | os.O_CLOEXEC)
            if await _lock(door, hold, end):
                os.utime(door)
                if await _lock(hold.fd, hold, end):
                    os.close(door)
                    door = -1
                    hold.is_inside = True
                    while hold.wants and time.monotonic() < end:
                        await asyncio.sleep(0.05)
                        os.utime(hold.fd)
        except OSError:
            pass  # it was never started on this boot, or the file system is full
        finally:
            hold.is_inside = False
            for fd in (door, hold.fd):
                if fd >= 0:
                    os.close(fd)
            self.holds.remove(hold)


async def _lock(fd: int, hold: Hold, end: float) -> bool:
    while hold.wants and time.monotonic() < end:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(0.01)
        else:
            return True
    return False


async def _keep_quiet(connection: Connection, reader: asyncio.StreamReader, end: float) -> bool:
    """Say nothing until ``end``, or nobody wants the connection. False: the other end closed it."""
    reading = asyncio.ensure_future(reader.read(1))
    try:
        while connection.wants and time.monotonic() < end:
            done, _ = await asyncio.wait({reading}, timeout=0.1)
            if done:
                return False
        return True
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
    """Say something, and return what is wrong with what comes back."""
    said = b"something said after a while"
    try:
        async with asyncio.timeout(_ECHO_SECONDS):
            writer.write(said)
            heard = await reader.readexactly(len(said))
    except TimeoutError:
        return f"carried nothing for {_ECHO_SECONDS:.0f} s"
    return None if heard == said else f"carried {heard!r} for {said!r}"


_UPGRADE = (
    b"GET /upstream/%b/socket HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: Y2FtcGFpZ24gY2FtcGFpZw==\r\n\r\n"
)


async def _post(model: str, question: str, seconds: float) -> tuple[int, bytes]:
    message = {"role": "user", "content": question}
    body = json.dumps({"model": model, "messages": [message], "seconds": seconds}).encode()
    return await _exchange(b"POST /v1/chat/completions", body)


async def _exchange(line: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Send one request to the gateway, and return the status and the body of its response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", GATEWAY_PORT)
    try:
        writer.write(
            b"%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (line, len(body), body)
        )
        status, fields = await _read_head(reader)
        if "content-length" not in fields:
            raise ValueError(f"an answer without a length: {fields}")
        return status, await reader.readexactly(int(fields["content-length"]))
    finally:
        writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = (line.partition(":") for line in head.split("\r\n"))
    return int(head.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in lines}
