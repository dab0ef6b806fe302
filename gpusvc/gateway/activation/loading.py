"""Starts one model for the requests that wait for it: one start at a time, however many requests wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from gpusvc.gateway.activation.engine import Engine, EngineFinder
from gpusvc.gateway.activation.peer import require_engine
from gpusvc.gateway.activation.starter import Failure, Starter

# Requests that come within this time after a failure get the same error, without asking the API again. The API decides
# how long the cooldown is: it also knows when a person has started the model.
_FAILURE_SECONDS = 1.0

# The code of a start that a person stopped. It says nothing about the next start.
_STOPPED = "stopped"

# How often the API may report that a model is ready although its lease names no engine, before the gateway gives up.
_DISAPPOINTMENTS = 5
_FIRST_DISAPPOINTMENT_SECONDS = 0.1

_PROBE_SECONDS = 2.0

_LOAD_SECONDS = 10.0  # a guess before the first load


class Loading:
    """The starts of one model in one worker."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        *,
        finder: EngineFinder,
        starter: Starter,
        on_end: Callable[[Failure | None], None],
    ) -> None:
        """``on_end`` is called when a start ends: with the failure, or with None if the model should be ready."""
        self._loop = loop
        self._name = name
        self._finder = finder
        self._starter = starter
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None
        self._disappointments = 0
        self._failure: Failure | None = None
        self._failed_seconds = -math.inf
        self.expected_seconds = _LOAD_SECONDS
        """How long the last load took; a guess before the first one."""

    @property
    def is_running(self) -> bool:
        return self._task is not None

    @property
    def fresh_failure(self) -> Failure | None:
        """Why the last start failed, if that was a moment ago; else None."""
        is_fresh = time.monotonic() - self._failed_seconds < _FAILURE_SECONDS
        return self._failure if is_fresh and self._finder.find() is None else None

    def begin(self) -> None:
        """Start the model, unless a start is under way."""
        if self._task is None:
            self._task = self._loop.create_task(self._run())

    def abandon(self) -> None:
        """Cancel the start, because no request waits any more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def served(self) -> None:
        """Note that the engine got a request, so that it is really there."""
        self._disappointments = 0

    def failed(self, failure: Failure) -> None:
        """Remember the error that all waiting requests got."""
        self._failure = failure if failure.code != _STOPPED else None
        self._failed_seconds = time.monotonic()
        self._disappointments = 0

    async def _run(self) -> None:
        try:
            failure = await self._make_ready()
        finally:
            if self._task is asyncio.current_task():
                self._task = None
        self._on_end(failure)

    async def _make_ready(self) -> Failure | None:
        began = time.monotonic()
        suspected = self._finder.suspected
        if suspected is not None and await _answers(suspected):
            self._finder.trust(suspected)
            return None
        failure = await self._starter.start(self._name)
        if failure is not None:
            return failure
        if self._finder.find() is None:
            return await self._bear_disappointment()
        self.expected_seconds = time.monotonic() - began
        return None

    async def _bear_disappointment(self) -> Failure | None:
        """Handle a model that is not ready although the API says so: it has just ended, perhaps unknown to the API."""
        self._disappointments += 1
        if self._disappointments <= _DISAPPOINTMENTS:
            await asyncio.sleep(_FIRST_DISAPPOINTMENT_SECONDS * 2 ** (self._disappointments - 1))
            return None
        return Failure(
            503,
            f"{self._name} was started, but ended at once.",
            hint=f"`gpusvc logs {self._name}` shows why.",
            code="model_not_ready",
            retry_after_seconds=10,
        )


async def _answers(engine: Engine) -> bool:
    """Whether the engine, and no other program, takes connections there."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(engine.address, engine.port)
    except (OSError, TimeoutError):
        return False
    try:
        require_engine(writer.transport, engine.cgroup_id)
    except OSError:
        return False
    finally:
        writer.transport.abort()
    return True
