"""The API's connection to the service manager, in its event loop: questions, and jobs whose end several clients await.

A question takes about a millisecond, and pystemd holds the interpreter meanwhile, so that a thread would not help.
Jobs outlive the connection: after the bus or systemd restarted, the next connection follows them to their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from gpusvc.api.backend.shared import outcome
from gpusvc.errors import SystemdError, UnansweredError
from gpusvc.systemd import jobs
from gpusvc.systemd.connection import Connection
from gpusvc.systemd.jobs import Absence, EndedJob, JobResult
from gpusvc.systemd.units import ServiceStatus, Unit

_T = TypeVar("_T")


class Manager(Protocol):
    """The part of systemd.Manager that the API uses."""

    def enqueue(self, verb: str, unit: str, *, replace: bool = True) -> str: ...

    def reset_failed(self, unit: str) -> None: ...

    def unit(self, name: str) -> Unit | None: ...

    def units(self, *patterns: str) -> list[Unit]: ...

    def service_status(self, unit: Unit) -> ServiceStatus: ...

    def listen(self) -> int: ...

    def drain(self) -> list[EndedJob]: ...

    def follow(self, job: str, verb: str, unit: str) -> None: ...

    def unheard(self) -> list[EndedJob]: ...

    def close(self) -> None: ...


class _Job(NamedTuple):
    """A job that clients wait for."""

    verb: str
    unit: str
    result: asyncio.Future[JobResult]


class Bus(Connection[Manager]):
    """A connection whose signals the loop reads. Use it in the loop's thread only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connect: Callable[[], Manager],
        *,
        on_end: Callable[[EndedJob], None] = lambda _: None,
    ) -> None:
        """``on_end`` is called for each job of any unit that ends while there is a connection."""
        super().__init__(connect)
        self._loop = loop
        self._on_end = on_end
        self._fd = -1
        self._jobs: dict[str, _Job] = {}
        self._units: dict[str, list[asyncio.Future[None]]] = {}
        self._look_handle: asyncio.TimerHandle | None = None
        self._absence: Absence | None = None

    def connected(self, manager: Manager) -> None:
        # A duplicate: a broken connection closes its own descriptor, and the number may be reused before the loop
        # knows that.
        self._fd = os.dup(manager.listen())
        self._loop.add_reader(self._fd, self._drain)
        for path, job in self._jobs.items():
            manager.follow(path, job.verb, job.unit)

    def ask(self, question: Callable[[Manager], _T]) -> _T:
        try:
            return super().ask(question)
        finally:
            # The call may have read signals too, for which the descriptor is not readable any more.
            self._loop.call_soon(self._drain)

    async def ask_patiently(self, question: Callable[[Manager], _T]) -> _T:
        """Return the answer to ``question``, which is asked again while the manager is away.

        Raises:
            UnansweredError: the manager was away too long.
            SystemdError, PermissionDeniedError: the manager refuses.
        """
        absence = Absence()
        while True:
            try:
                return self.ask(question)
            except UnansweredError as error:
                absence.bear(error)
                await asyncio.sleep(jobs.PAUSE_SECONDS)

    async def run(self, verb: str, unit: str, *, replace: bool = True) -> JobResult:
        """Queue a job and return its result.

        Raises:
            JobConflictError: another job is queued, and is not to be replaced.
            UnansweredError, SystemdError, PermissionDeniedError: as ask_patiently().
        """
        path = await self.ask_patiently(lambda manager: manager.enqueue(verb, unit, replace=replace))
        return await self.result_of(path, verb, unit)

    async def result_of(self, path: str, verb: str, unit: str) -> JobResult:
        """Return the result of a job that was queued on this connection just now."""
        job = self._jobs.get(path)
        if job is None:
            job = self._jobs[path] = _Job(verb, unit, self._loop.create_future())
            job.result.add_done_callback(lambda future: future.cancelled() or future.exception())  # waiters may be gone
            if self._look_handle is None:
                self._look_in(jobs.LOOK_SECONDS)
        return await outcome(job.result)

    async def some_job_of(self, unit: str, timeout_seconds: float) -> None:
        """Wait until any job of ``unit`` ended, whichever client queued it, or the time is up."""
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
        """Close the connection until the next question, which comes soon if clients wait for a job."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        super().close()
        if self._jobs:
            self._look_in(jobs.PAUSE_SECONDS)

    def _drain(self) -> None:
        if self._manager is None:
            return
        try:
            ended = self._manager.drain()
        except SystemdError:
            self.close()
            return
        self._settle(ended)

    def _look_in(self, seconds: float) -> None:
        if self._look_handle is not None:
            self._look_handle.cancel()
        self._look_handle = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """Look for jobs whose end was not signalled. This connects if the connection was lost."""
        self._look_handle = None
        if not self._jobs:
            return
        pause = jobs.LOOK_SECONDS
        try:
            ended = self.ask(lambda manager: manager.unheard())
        except SystemdError as error:
            pause = jobs.PAUSE_SECONDS
            self._absence = self._absence or Absence()
            try:
                self._absence.bear(error)
            except SystemdError:
                self._fail(error)
        else:
            self._absence = None
            self._settle(ended)
        if self._jobs:
            self._look_in(pause)

    def _settle(self, ended: Sequence[EndedJob]) -> None:
        for job in ended:
            awaited = self._jobs.pop(job.path, None)
            if awaited is not None:
                awaited.result.set_result(job.result)
            for waiting in self._units.get(job.unit, ()):
                if not waiting.done():
                    waiting.set_result(None)
            self._on_end(job)

    def _fail(self, error: SystemdError) -> None:
        awaited, self._jobs = self._jobs, {}
        self._absence = None
        for job in awaited.values():
            job.result.set_exception(error)
