"""The entrance of one model: requests get in at once if the model is ready, else they wait in its queue.

A waiting request takes these steps: it is outside the door; then inside while the model loads, so that the model is not
evicted before it served the requests that it was loaded for; then perhaps in line for a slot of ``concurrency``.
However many requests wait, there is one start.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from gpusvc.config.serving import Serving
from gpusvc.errors import GpusvcError
from gpusvc.gateway.activation import refusals
from gpusvc.gateway.activation.engine import Engine, EngineFinder
from gpusvc.gateway.activation.fair_slots import FairSlots
from gpusvc.gateway.activation.line import Line
from gpusvc.gateway.activation.loading import Loading
from gpusvc.gateway.activation.passage import Passage, Waiter
from gpusvc.gateway.activation.queue import Queue
from gpusvc.gateway.activation.starter import Failure, Starter
from gpusvc.state.line import Shown
from gpusvc.state.turnstile import Turnstile
from gpusvc.state.use import NoDoorError

# How long the gateway believes the lease without another look. While this worker is inside the turnstile the model is
# not evicted: it can only have died or been stopped. Then nobody listens on its port, which the gateway notices;
# another model cannot be placed and listen there in so short a time.
_LOOK_SECONDS = 0.005

# How often the worker tries doors and slots of other workers: nothing tells it when they are free.
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.05


class Entrance:
    """The entrance of one model in one worker."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        *,
        turnstile: Turnstile,
        finder: EngineFinder,
        starter: Starter,
        slots: FairSlots,
        line: Line,
    ) -> None:
        self._loop = loop
        self._name = name
        self._turnstile = turnstile
        self._finder = finder
        self._slots = slots
        self._line = line
        self._loading = Loading(loop, name, finder=finder, starter=starter, on_end=self._on_loaded)
        self.touch = turnstile.touch

        self._engine: Engine | None = None
        self._looked_seconds = -math.inf
        self._queue = Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._closed = False

    # Into the model.

    def try_enter(self, serving: Serving) -> Passage | None:
        """As Activation.try_enter()."""
        if self._queue.waiters or self._closed:
            return None
        turnstile = self._turnstile
        try:
            if not turnstile.try_enter():
                return None
        except GpusvcError:
            return None  # enter() reports the error
        now = time.monotonic()
        if now - self._looked_seconds >= _LOOK_SECONDS:
            self._looked_seconds = now
            self._engine = self._finder.find()
        if self._engine is None:
            turnstile.leave()
            return None
        slot = None
        if serving.concurrency:
            slot = self._slots.take(serving.concurrency, yielding=True)
            if slot is None:
                turnstile.leave()
                return None
        return Passage(self, serving, self._engine, slot)

    async def enter(
        self,
        serving: Serving,
        on_wait: Callable[[str], None] | None,
        *,
        knows: Shown,
        max_waiting: int,
        timeout_seconds: float,
    ) -> Passage:
        """As Activation.enter()."""
        passage = self.try_enter(serving)
        if passage is not None:
            return passage
        waiter = self._join(Waiter(serving, self._loop.create_future(), on_wait, knows), max_waiting)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await waiter.future
        except TimeoutError:
            is_inside = not self._queue.is_outside(waiter)
            news = self._line.news(self._name, is_inside=is_inside)
            error = refusals.too_late(self._goal(is_inside=is_inside), timeout_seconds, news.gist(knows))
            self._quit(waiter)
            raise error from None
        except BaseException:
            self._quit(waiter)
            raise

    def find(self) -> Engine | None:
        """The engine, if it is ready, without using the model."""
        return self._finder.find()

    def suspect(self) -> None:
        """As Activation.suspect()."""
        self._finder.suspect()
        self._engine = None
        self._looked_seconds = -math.inf

    # The queue: a request joins it, advances in it, and leaves it with a passage, an error, or by itself.

    def _join(self, waiter: Waiter, max_waiting: int) -> Waiter:
        serving = waiter.serving
        failure = refusals.SHUTTING_DOWN if self._closed else self._loading.fresh_failure
        if failure is not None:
            raise failure.to_http_error(show_logs=serving.show_logs)
        queue = self._queue
        waiting = len(queue.waiters)
        if waiting >= max_waiting:
            if serving.concurrency and queue.inside and self._engine is not None:
                raise refusals.no_slot(serving, waiting, self._slots.held_seconds)
            raise refusals.too_many_waiting(self._name, waiting, self._loading.expected_seconds)
        queue.waiters.append(waiter)
        if not waiting:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._advance(yielding=True)
        return waiter

    def _advance(self, *, yielding: bool) -> None:
        """Let all requests go as far as they can at this moment. ``yielding``: as for FairSlots.take()."""
        queue = self._queue
        if not queue.waiters:
            return
        has_door = True
        try:
            outside = queue.outside
            if outside and self._turnstile.try_enter(outside):
                queue.inside += outside
        except NoDoorError:
            has_door = False  # its files appear when it starts for the first time, and not long before it is ready
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        except GpusvcError as error:
            self._refuse(Failure(503, error.message, hint=error.hint))
            return
        self._looked_seconds = time.monotonic()
        self._engine = self._finder.find()
        if self._engine is not None:
            self._serve(self._engine, yielding=yielding)
        elif queue.inside or not has_door:
            # While the door is closed nothing is started: the evictor would stop it.
            self._loading.begin()
        if queue.waiters:
            self._go_on_waiting()
        else:
            self._rest()

    def _serve(self, engine: Engine, *, yielding: bool) -> None:
        """Give passages to the requests inside, as far as there are slots."""
        queue = self._queue
        while queue.inside:
            waiter = queue.waiters[0]
            slot = None
            if waiter.serving.concurrency and not waiter.future.done():
                slot = self._slots.take(waiter.serving.concurrency, yielding=yielding)
                if slot is None:
                    return
            queue.pop()
            if waiter.future.done():  # cancelled, and its task has not run since
                self._turnstile.leave()
            else:
                waiter.future.set_result(Passage(self, waiter.serving, engine, slot))
                self._loading.served()

    def _go_on_waiting(self) -> None:
        queue = self._queue
        waits_for_slot = self._engine is not None and queue.inside > 0
        self._slots.wish(wishing=waits_for_slot)
        if waits_for_slot:
            self._pause_seconds = _FIRST_PAUSE_SECONDS  # a free slot that no request takes is lost time
        if self._timer is None:
            self._timer = self._loop.call_later(self._pause_seconds, self._tick)
        for position, waiter in enumerate(queue.waiters):
            if waiter.on_wait is not None:
                is_inside = position < queue.inside
                waiter.hear(self._goal(is_inside=is_inside), self._line.news(self._name, is_inside=is_inside))

    def _tick(self) -> None:
        self._timer = None
        self._pause_seconds = min(self._pause_seconds * 1.5, _LONGEST_PAUSE_SECONDS)
        self._advance(yielding=False)

    def _on_loaded(self, failure: Failure | None) -> None:
        if failure is None:
            self._advance(yielding=True)
        else:
            self._refuse(failure)

    def _goal(self, *, is_inside: bool) -> str:
        """What the requests inside, or outside, wait for. It follows "waiting"."""
        if is_inside and self._engine is not None:
            return f"for one of the other requests of {self._name} to end"
        if is_inside or self._loading.is_running:
            return f"for {self._name} to load"
        return f"until {self._name} is evicted, or stays"

    def _quit(self, waiter: Waiter) -> None:
        """Remove ``waiter`` and all that it may have been given."""
        if waiter in self._queue.waiters:
            if self._queue.remove(waiter):
                self._turnstile.leave()
            if not self._queue.waiters:
                self._rest()
                if self._finder.find() is None:
                    self._loading.abandon()
        future = waiter.future
        if not future.cancel() and not future.cancelled() and future.exception() is None:
            future.result().close()  # it got a passage, and was gone before it could be told

    def _refuse(self, failure: Failure) -> None:
        """Fail all waiting requests."""
        self._loading.failed(failure)
        waiters, inside = self._queue.clear()
        if inside:
            self._turnstile.leave(inside)
        self._rest()
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(failure.to_http_error(show_logs=waiter.serving.show_logs))

    def _rest(self) -> None:
        """Stop what is done for waiting requests: there are none."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slots.wish(wishing=False)

    # Out of the model (passage.Model).

    def step_out(self) -> None:
        if not self._closed:
            self._turnstile.leave()

    def step_in(self) -> bool:
        try:
            return not self._closed and self._turnstile.try_enter()
        except GpusvcError:
            return False

    def leave(self, slot: int | None, began_seconds: float, *, is_inside: bool) -> None:
        if self._closed:
            return
        if slot is not None:
            self._slots.give(slot, began_seconds)
        if is_inside:
            self._turnstile.leave()
        if slot is not None and self._queue.waiters:
            self._advance(yielding=True)

    def close(self) -> None:
        """As Activation.close()."""
        self._refuse(refusals.SHUTTING_DOWN)
        self._closed = True
        self._loading.abandon()
        self._turnstile.close()
        self._slots.close()
