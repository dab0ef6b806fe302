"""The API's line to the service manager: asked on the loop, and listened to for the ends of jobs.

A question takes about a millisecond, and pystemd holds the interpreter meanwhile: a thread would make it no better.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Protocol, TypeVar

from gpusvc.errors import SystemdError
from gpusvc.systemd.connection import Connection
from gpusvc.systemd.jobs import EndedJob, JobResult
from gpusvc.systemd.units import ServiceStatus, Unit

_T = TypeVar("_T")


class Manager(Protocol):
    """What of systemd.Manager is used here."""

    def enqueue(self, verb: str, unit: str, *, replace: bool = True) -> str: ...

    def reset_failed(self, unit: str) -> None: ...

    def unit(self, name: str) -> Unit | None: ...

    def units(self, *patterns: str) -> list[Unit]: ...

    def service_status(self, unit: Unit) -> ServiceStatus: ...

    def listen(self) -> int: ...

    def drain(self) -> list[EndedJob]: ...

    def close(self) -> None: ...


class LostError(SystemdError):
    """The connection ended while a job was waited for: how that ended is not known."""


class Bus(Connection[Manager]):
    """A line that the loop listens to. For the loop's thread alone."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connect: Callable[[], Manager],
        *,
        on_end: Callable[[EndedJob], None] = lambda _: None,
    ) -> None:
        """``on_end`` is told of every job of any unit that ended, as long as there is a connection."""
        super().__init__(connect)
        self._loop = loop
        self._on_end = on_end
        self._fd = -1
        self._jobs: dict[str, asyncio.Future[JobResult]] = {}
        self._units: dict[str, list[asyncio.Future[None]]] = {}

    def connected(self, manager: Manager) -> None:
        # One of our own: a connection that breaks closes its, which may be another's before the loop is told.
        self._fd = os.dup(manager.listen())
        self._loop.add_reader(self._fd, self._drain)

    def ask(self, question: Callable[[Manager], _T]) -> _T:
        try:
            return super().ask(question)
        finally:
            # The answer may have brought news along, of which the file says nothing any more.
            self._loop.call_soon(self._drain)

    def enqueue(self, verb: str, unit: str, *, replace: bool = True) -> asyncio.Future[JobResult]:
        """Queue a job; how it ends. Of a job that is shared with others, each has a future of his own.

        Raises:
            JobConflictError, SystemdError, PermissionDeniedError: as systemd.Manager.enqueue().
        """
        path = self.ask(lambda manager: manager.enqueue(verb, unit, replace=replace))
        return self.ended(path)

    def ended(self, path: str) -> asyncio.Future[JobResult]:
        """How the job ends; to be called at once after it was queued. It raises LostError if that will not be known."""
        shared = self._jobs.get(path)
        if shared is None:
            shared = self._jobs[path] = self._loop.create_future()
            shared.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may be waiting
        mine: asyncio.Future[JobResult] = self._loop.create_future()

        def pass_on(ended: asyncio.Future[JobResult]) -> None:
            if mine.done():
                return
            error = ended.exception()
            if error is None:
                mine.set_result(ended.result())
            else:
                mine.set_exception(error)

        shared.add_done_callback(pass_on)
        return mine

    async def some_job_of(self, unit: str, timeout_seconds: float) -> None:
        """Until any job of ``unit`` ended, whoever queued it, or the time is up."""
        future: asyncio.Future[None] = self._loop.create_future()
        waiting = self._units.setdefault(unit, [])
        waiting.append(future)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await future
        finally:
            waiting.remove(future)
            if not waiting:
                self._units.pop(unit, None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        super().close()
        jobs, self._jobs = self._jobs, {}
        for future in jobs.values():
            future.set_exception(LostError("The connection to the service manager was lost."))

    def _drain(self) -> None:
        if self._manager is None:
            return
        try:
            ended = self._manager.drain()
        except SystemdError:
            self.close()
            return
        for job in ended:
            future = self._jobs.pop(job.path, None)
            if future is not None:
                future.set_result(job.result)
            for waiting in self._units.get(job.unit, ()):
                if not waiting.done():
                    waiting.set_result(None)
            self._on_end(job)
