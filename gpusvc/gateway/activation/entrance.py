"""The way into one model: who waits, in order, and how far each of them has come.

Whoever waits is first outside the door, then inside while the model loads (so that what was loaded for them is not
evicted before they were served), then perhaps in line for a slot of ``concurrency``; all of them first come, first
served. There is one start however many wait for it.
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
from gpusvc.gateway.activation.slots import Slots
from gpusvc.gateway.activation.starter import Failure, Starter
from gpusvc.gateway.http.replies import HttpError
from gpusvc.quantity import format_duration
from gpusvc.state.use import NoDoorError, Turnstile

# How old a look at the lease may be. A model that is inside its turnstile is not evicted, so that what can be missed
# is that it died or was stopped. Then nobody listens on its port, which is noticed; and for somebody else to listen
# there instead, another model must be placed, get its scope and start its engine, which takes many times as long.
_LOOK_SECONDS = 0.005

# Doors and the slots of other workers have nothing to wait on.
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.05

# How long a worker leaves alone a slot that it gave back while somebody waited in another one: each of those has looked
# by then.
_YIELD_SECONDS = 0.025

# How often whoever waits is told so although nothing is new: clients and proxies have timeouts.
_NEWS_SECONDS = 5.0

# A failure is told to whoever comes within so short a time without asking again. How long a model is left alone after
# one is for the API to say, which also knows when somebody has started it by hand.
_FAILURE_SECONDS = 1.0

# What the API calls a start that somebody ended. That says nothing of the next one.
_STOPPED = "stopped"

# How often the API may call a model ready that is not to be seen, or does not answer, before it is given up.
_DISAPPOINTMENTS = 5
_FIRST_DISAPPOINTMENT_SECONDS = 0.1

_PROBE_SECONDS = 2.0

# What a client is told about when to try again, if a guess from the last times is out of reason.
_SHORTEST_RETRY_SECONDS = 1
_LONGEST_RETRY_SECONDS = 60
_LOAD_SECONDS = 10.0  # a guess before the first load


class Passage:
    """One request inside a model, which is not evicted before close()."""

    __slots__ = ("_began", "_entrance", "_slot", "address", "port", "serving", "touch")

    def __init__(self, entrance: Entrance, serving: Serving, engine: Engine, slot: int | None) -> None:
        self.serving = serving
        self.address = engine.address
        self.port = engine.port
        self.touch = entrance.touch
        """Say that the request makes progress, at each piece of an answer; costs next to nothing."""
        self._entrance: Entrance | None = entrance
        self._slot = slot
        self._began = 0.0 if slot is None else time.monotonic()

    def close(self) -> None:
        """The request is over; a second time is nothing."""
        entrance, self._entrance = self._entrance, None
        if entrance is not None:
            entrance.leave(self._slot, self._began)


class Waiter:
    """One request that waits."""

    __slots__ = ("future", "on_wait", "serving", "told", "told_seconds")

    def __init__(
        self, serving: Serving, future: asyncio.Future[Passage], on_wait: Callable[[str], None] | None
    ) -> None:
        self.serving = serving
        self.future = future
        self.on_wait = on_wait
        self.told = ""
        self.told_seconds = -math.inf

    def tell(self, sentence: str) -> None:
        if self.on_wait is not None and not self.future.done():
            self.on_wait(sentence)


class Entrance:
    """Of one model, in one worker."""

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
        self._starter = starter
        self._make_slots = make_slots
        self._slots: Slots | None = None
        self.touch = turnstile.touch

        self._engine: Engine | None = None
        self._looked_seconds = -math.inf
        self._waiters: deque[Waiter] = deque()
        self._entered = 0  # of the waiters, the first so many are inside
        self._timer: asyncio.TimerHandle | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._start: asyncio.Task[None] | None = None
        self._disappointments = 0
        self._failure: Failure | None = None
        self._failed_seconds = -math.inf
        self._load_seconds = _LOAD_SECONDS
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
            refusal = self._too_late(waiter, timeout_seconds)
            self._quit(waiter)
            raise refusal from None
        except BaseException:
            self._quit(waiter)
            raise

    def leave(self, slot: int | None, began_seconds: float) -> None:
        """A passage ends."""
        if self._closed:
            return
        if slot is not None and self._slots is not None:
            self._slots.give(slot)
            now = time.monotonic()
            self._slot_seconds += (now - began_seconds - self._slot_seconds) / 8
            if self._slots.is_wished():
                self._yield_until_seconds = now + _YIELD_SECONDS
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
        self._abandon()
        self._turnstile.close()
        if self._slots is not None:
            self._slots.close()

    def _join(self, serving: Serving, on_wait: Callable[[str], None] | None, max_waiting: int) -> Waiter:
        if self._closed:
            raise HttpError(503, "The gateway is shutting down.", code="shutting_down", retry_after_seconds=5)
        failed_just_now = time.monotonic() - self._failed_seconds < _FAILURE_SECONDS
        if self._failure is not None and failed_just_now and self._finder.find() is None:
            raise self._failure.to_http_error(show_logs=serving.show_logs)
        if len(self._waiters) >= max_waiting:
            raise self._full(serving)
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
                    self._abandon()
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
        elif (self._entered or not has_door) and self._start is None:
            # Behind a closed door nothing is started: that would be for its evictor to stop.
            self._start = self._loop.create_task(self._bring_up())
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
                self._disappointments = 0

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
        now = time.monotonic()
        inside, outside = (f"Waiting {self._goal(is_inside=is_inside)}." for is_inside in (True, False))
        for position, waiter in enumerate(self._waiters):
            if waiter.on_wait is None:
                continue
            sentence = inside if position < self._entered else outside
            if sentence != waiter.told or now - waiter.told_seconds >= _NEWS_SECONDS:
                waiter.told, waiter.told_seconds = sentence, now
                # Not from here, so that nothing that it does finds half a step done.
                self._loop.call_soon(waiter.tell, sentence)

    def _tick(self) -> None:
        self._timer = None
        self._pause_seconds = min(self._pause_seconds * 1.5, _LONGEST_PAUSE_SECONDS)
        self._advance(yielding=False)

    def _goal(self, *, is_inside: bool) -> str:
        """What those inside, or outside, wait for, after "waiting"."""
        if is_inside and self._engine is not None:
            return f"for one of the other requests of {self._name} to end"
        if is_inside or self._start is not None:
            return f"for {self._name} to load"
        return f"until {self._name} is evicted, or stays"

    async def _bring_up(self) -> None:
        """Have the model ready, or everybody told why it is not. Cancelled when nobody waits for that any more."""
        try:
            await self._make_ready()
        finally:
            if self._start is asyncio.current_task():
                self._start = None
        self._advance(yielding=True)

    async def _make_ready(self) -> None:
        began = time.monotonic()
        suspected = self._finder.suspected
        if suspected is not None and await _answers(suspected):
            self._finder.trust(suspected)
            return
        failure = await self._starter.start(self._name)
        if failure is not None:
            self._refuse(failure)
        elif self._finder.find() is not None:
            self._load_seconds = time.monotonic() - began
        else:
            await self._bear_disappointment()

    async def _bear_disappointment(self) -> None:
        """It was ready, and is not: stopped or dead by now, or dead and the API did not know that yet."""
        self._disappointments += 1
        if self._disappointments <= _DISAPPOINTMENTS:
            await asyncio.sleep(_FIRST_DISAPPOINTMENT_SECONDS * 2 ** (self._disappointments - 1))
            return
        self._refuse(
            Failure(
                503,
                f"{self._name} was started, and did not stay.",
                hint=f"`gpusvc logs {self._name}` shows why.",
                code="model_not_ready",
                retry_after_seconds=10,
            )
        )

    def _refuse(self, failure: Failure) -> None:
        """Tell everybody who waits."""
        self._failure = failure if failure.code != _STOPPED else None
        self._failed_seconds = time.monotonic()
        self._disappointments = 0
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

    def _abandon(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            start.cancel()

    def _full(self, serving: Serving) -> HttpError:
        waiting = len(self._waiters)
        if serving.concurrency and self._entered and self._engine is not None:
            return HttpError(
                429,
                f"{self._name} serves {serving.concurrency} requests at a time, and {waiting} more wait already.",
                code="concurrency_exceeded",
                retry_after_seconds=_retry_after(self._slot_seconds * waiting / serving.concurrency),
            )
        return HttpError(
            503,
            f"{self._name} is not ready, and {waiting} requests wait for it already.",
            code="too_many_waiting",
            retry_after_seconds=_retry_after(self._load_seconds),
        )

    def _too_late(self, waiter: Waiter, timeout_seconds: float) -> HttpError:
        goal = self._goal(is_inside=waiter not in list(self._waiters)[self._entered :])
        return HttpError(
            504,
            f"This request waited {goal}, and activation_timeout ({format_duration(timeout_seconds)}) is over.",
            code="activation_timeout",
        )


async def _answers(engine: Engine) -> bool:
    """Whether somebody takes connections there."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(engine.address, engine.port)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


def _retry_after(seconds: float) -> int:
    return min(max(math.ceil(seconds), _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)
