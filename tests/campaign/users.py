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
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.invariants import Answer

GATEWAY_PORT = 8484
ANSWER_SECONDS = 60.0
"""Longer than everything that the gateway may wait for on the campaign's machine."""

_CLONE_NEWNET = 0x40000000


@dataclass(slots=True)
class Hold:
    """One program that uses a model."""

    model: str
    is_inside: bool = False
    """Between taking ``use`` and giving it up."""
    wants: bool = True
    fd: int = -1


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

    def close(self) -> None:
        """End all of them; requests under way are not answered any more, and not counted."""
        self.leave()
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)
        self.pending.clear()

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


async def _post(model: str, question: str, seconds: float) -> tuple[int, bytes]:
    message = {"role": "user", "content": question}
    body = json.dumps({"model": model, "messages": [message], "seconds": seconds}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", GATEWAY_PORT)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = int(head.split(" ", 2)[1])
        lines = (line.partition(":") for line in head.split("\r\n"))
        fields = {name.lower(): value.strip() for name, _, value in lines}
        if "content-length" not in fields:
            raise ValueError(f"an answer without a length: {head!r}")
        return status, await reader.readexactly(int(fields["content-length"]))
    finally:
        writer.transport.abort()
