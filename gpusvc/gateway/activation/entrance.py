"""The queue of one model: which requests wait, in order, and how far each of them has come.

A waiting request is first outside the door, then inside while the model loads (so that the model is not evicted before
it served those it was loaded for), then perhaps in line for a slot of ``concurrency``: first come, first served. There
is one start, however many requests wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from gpusvc.config.serving import Serving
from gpusvc.errors import GpusvcError
from gpusvc.gateway.activation.engine import Engine, EngineFinder
from gpusvc.gateway.activation.loading import Loading
from gpusvc.gateway.activation.passage import Passage, Waiter
from gpusvc.gateway.activation.slots import Slots
from gpusvc.gateway.activation.starter import Failure, Starter
from gpusvc.gateway.http.replies import HttpError
from gpusvc.quantity import format_duration
from gpusvc.state.turnstile import Turnstile
from gpusvc.state.use import NoDoorError

# How long the lease is believed without another look. While this worker is inside the turnstile the model is not
# evicted, so that it can only have died or been stopped. Then nobody listens on its port, which is noticed; and another
# model cannot be placed and listen there in so short a time.
_LOOK_SECONDS = 0.005

# How often doors and the slots of other workers are tried: there is nothing to wait on.
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.05

# How long a worker does not take a slot that it gave back while another worker waited for one: within this time each
# waiting worker has tried.
_YIELD_SECONDS = 0.025

# Bounds of Retry-After, which is guessed from the last loads or requests.
_SHORTEST_RETRY_SECONDS = 1
_LONGEST_RETRY_SECONDS = 60


class Entrance:
    """The queue of one model in one worker."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        *,
        turnstile: Turnstile,
        finder: EngineFinder,
        starter: Starter,
        make_slots: Callable[[], Slots],
    ) -> None:
        """``make_slots`` is called once, when the first slot is needed."""
        self._loop = loop
        self._name = name
        self._turnstile = turnstile
        self._finder = finder
        self._loading = Loading(loop, name, finder=finder, starter=starter, on_end=self._on_loaded)
        self._make_slots = make_slots
        self._slots: Slots | None = None
        self.touch = turnstile.touch

        self._engine: Engine | None = None
        self._looked_seconds = -math.inf
        self._waiters: deque[Waiter] = deque()
        self._entered = 0  # of the waiters, the first so many are inside
        self._timer: asyncio.TimerHandle | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._slot_seconds = 1.0  # what one was taken for, on average over the last few
        self._yield_until_seconds = -math.inf
        self._closed = False

    def try_enter(self, serving: Serving) -> Passage | None:
        """As Activation.try_enter()."""
        if self._waiters or self._closed:
            return None
        turnstile = self._turnstile
        try:
            if not turnstile.try_enter():
                return None
        except GpusvcError:
            return None  # enter() says what is the matter
        now = time.monotonic()
        if now - self._looked_seconds >= _LOOK_SECONDS:
            self._looked_seconds = now
            self._engine = self._finder.find()
        if self._engine is None:
            turnstile.leave()
            return None
        slot = None
        if serving.concurrency:
            slot = self._take_slot(serving, yielding=True)
            if slot is None:
                turnstile.leave()
                return None
        return Passage(self, serving, self._engine, slot)

    async def enter(
        self,
        serving: Serving,
        on_wait: Callable[[str], None] | None,
        *,
        max_waiting: int,
        timeout_seconds: float,
    ) -> Passage:
        """As Activation.enter()."""
        passage = self.try_enter(serving)
        if passage is not None:
            return passage
        waiter = self._join(serving, on_wait, max_waiting)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await waiter.future
        except TimeoutError:
            is_inside = waiter not in list(self._waiters)[self._entered :]
            error = _too_late(self._goal(is_inside=is_inside), timeout_seconds)
            self._quit(waiter)
            raise error from None
        except BaseException:
            self._quit(waiter)
            raise

    def step_out(self) -> None:
        """As Model.step_out()."""
        if not self._closed:
            self._turnstile.leave()

    def step_in(self) -> bool:
        """As Model.step_in()."""
        try:
            return not self._closed and self._turnstile.try_enter()
        except GpusvcError:
            return False

    def find(self) -> Engine | None:
        """The engine, if it is ready, without using the model."""
        return self._finder.find()

    def leave(self, slot: int | None, began_seconds: float, *, is_inside: bool) -> None:
        """As Model.leave()."""
        if self._closed:
            return
        if slot is not None and self._slots is not None:
            self._slots.give(slot)
            now = time.monotonic()
            self._slot_seconds += (now - began_seconds - self._slot_seconds) / 8
            if self._slots.is_wished():
                self._yield_until_seconds = now + _YIELD_SECONDS
        if is_inside:
            self._turnstile.leave()
        if slot is not None and self._waiters:
            self._advance(yielding=True)

    def suspect(self) -> None:
        """As Activation.suspect()."""
        self._finder.suspect()
        self._engine = None
        self._looked_seconds = -math.inf

    def close(self) -> None:
        """As Activation.close()."""
        self._refuse(Failure(503, "The gateway is shutting down.", code="shutting_down", retry_after_seconds=5))
        self._closed = True
        self._loading.abandon()
        self._turnstile.close()
        if self._slots is not None:
            self._slots.close()

    def _join(self, serving: Serving, on_wait: Callable[[str], None] | None, max_waiting: int) -> Waiter:
        if self._closed:
            raise HttpError(503, "The gateway is shutting down.", code="shutting_down", retry_after_seconds=5)
        failure = self._loading.fresh_failure
        if failure is not None:
            raise failure.to_http_error(show_logs=serving.show_logs)
        if len(self._waiters) >= max_waiting:
            waiting = len(self._waiters)
            if serving.concurrency and self._entered and self._engine is not None:
                raise _full(self._name, serving, waiting, self._slot_seconds)
            raise _not_ready(self._name, waiting, self._loading.expected_seconds)
        waiter = Waiter(serving, self._loop.create_future(), on_wait)
        self._waiters.append(waiter)
        if len(self._waiters) == 1:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._advance(yielding=True)
        return waiter

    def _quit(self, waiter: Waiter) -> None:
        """Whatever has become of it, nothing of it stays."""
        if waiter in self._waiters:
            position = self._waiters.index(waiter)
            del self._waiters[position]
            if position < self._entered:
                self._entered -= 1
                self._turnstile.leave()
            if not self._waiters:
                self._rest()
                if self._finder.find() is None:
                    self._loading.abandon()
        future = waiter.future
        if not future.cancel() and not future.cancelled() and future.exception() is None:
            future.result().close()  # given a passage, and gone before it could be told

    def _advance(self, *, yielding: bool) -> None:
        """Take everybody as far as can be at this moment; ``yielding`` as for _take_slot()."""
        if not self._waiters:
            return
        has_door = True
        try:
            outside = len(self._waiters) - self._entered
            if outside and self._turnstile.try_enter(outside):
                self._entered += outside
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
        elif self._entered or not has_door:
            # While the door is closed nothing is started: the evictor would stop it.
            self._loading.begin()
        if self._waiters:
            self._go_on_waiting()
        else:
            self._rest()

    def _serve(self, engine: Engine, *, yielding: bool) -> None:
        """Passages for those inside, as far as there are slots."""
        while self._entered:
            waiter = self._waiters[0]
            slot = None
            if waiter.serving.concurrency and not waiter.future.done():
                slot = self._take_slot(waiter.serving, yielding=yielding)
                if slot is None:
                    return
            self._waiters.popleft()
            self._entered -= 1
            if waiter.future.done():  # cancelled, and not yet woken up by that
                self._turnstile.leave()
            else:
                waiter.future.set_result(Passage(self, waiter.serving, engine, slot))
                self._loading.served()

    def _take_slot(self, serving: Serving, *, yielding: bool) -> int | None:
        """``yielding``: leave it to another worker in which somebody waits, so that each of them gets a turn."""
        slots = self._slots
        if slots is None:
            slots = self._slots = self._make_slots()
        if slots.is_wished() and (yielding or time.monotonic() < self._yield_until_seconds):
            return None
        return slots.take(serving.concurrency)

    def _go_on_waiting(self) -> None:
        waits_for_slot = self._engine is not None and self._entered > 0
        if self._slots is not None:
            self._slots.wish(wishing=waits_for_slot)
        if waits_for_slot:
            self._pause_seconds = _FIRST_PAUSE_SECONDS  # a slot that nobody has meanwhile is a request not served
        if self._timer is None:
            self._timer = self._loop.call_later(self._pause_seconds, self._tick)
        inside, outside = (f"Waiting {self._goal(is_inside=is_inside)}." for is_inside in (True, False))
        for position, waiter in enumerate(self._waiters):
            if waiter.wants(sentence := inside if position < self._entered else outside):
                # Later, so that what it does finds no step half done.
                self._loop.call_soon(waiter.tell, sentence)

    def _tick(self) -> None:
        self._timer = None
        self._pause_seconds = min(self._pause_seconds * 1.5, _LONGEST_PAUSE_SECONDS)
        self._advance(yielding=False)

    def _goal(self, *, is_inside: bool) -> str:
        """What those inside, or outside, wait for, after "waiting"."""
        if is_inside and self._engine is not None:
            return f"for one of the other requests of {self._name} to end"
        if is_inside or self._loading.is_running:
            return f"for {self._name} to load"
        return f"until {self._name} is evicted, or stays"

    def _on_loaded(self, failure: Failure | None) -> None:
        if failure is None:
            self._advance(yielding=True)
        else:
            self._refuse(failure)

    def _refuse(self, failure: Failure) -> None:
        """Tell everybody who waits."""
        self._loading.failed(failure)
        waiters, self._waiters = self._waiters, deque()
        entered, self._entered = self._entered, 0
        if entered:
            self._turnstile.leave(entered)
        self._rest()
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_exception(failure.to_http_error(show_logs=waiter.serving.show_logs))

    def _rest(self) -> None:
        """Nobody waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._slots is not None:
            self._slots.wish(wishing=False)


def _full(name: str, serving: Serving, waiting: int, slot_seconds: float) -> HttpError:
    return HttpError(
        429,
        f"{name} serves {serving.concurrency} requests at a time, and {waiting} more wait already.",
        code="concurrency_exceeded",
        retry_after_seconds=_retry_after(slot_seconds * waiting / serving.concurrency),
    )


def _not_ready(name: str, waiting: int, load_seconds: float) -> HttpError:
    return HttpError(
        503,
        f"{name} is not ready, and {waiting} requests wait for it already.",
        code="too_many_waiting",
        retry_after_seconds=_retry_after(load_seconds),
    )


def _too_late(goal: str, timeout_seconds: float) -> HttpError:
    return HttpError(
        504,
        f"This request waited {goal}, and activation_timeout ({format_duration(timeout_seconds)}) is over.",
        code="activation_timeout",
    )


def _retry_after(seconds: float) -> int:
    return min(max(math.ceil(seconds), _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)
