"""One request inside a model, and one that waits for that."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

from gpusvc.config.serving import Serving
from gpusvc.gateway.activation.engine import Engine
from gpusvc.gateway.activation.line import News
from gpusvc.state.line import Shown

# How often a waiting client gets the same comment again: clients and proxies have timeouts.
_NEWS_SECONDS = 5.0


class Model(Protocol):
    """The model that a passage leads into."""

    touch: Callable[[], None]

    def leave(self, slot: int | None, began_seconds: float, *, is_inside: bool) -> None:
        """Note that a request is over. ``is_inside``: it counted as a use of the model."""

    def step_out(self) -> None:
        """Note that a request does not count as a use of the model any more."""

    def step_in(self) -> bool:
        """Count a request as a use again. Return False if the model is being evicted."""


class Passage:
    """One request inside a model, which is not evicted before close()."""

    __slots__ = (
        "_began",
        "_is_inside",
        "_model",
        "_slot",
        "address",
        "authorization",
        "cgroup_id",
        "port",
        "serving",
        "touch",
    )

    def __init__(self, model: Model, serving: Serving, engine: Engine, slot: int | None) -> None:
        self.serving = serving
        self.address = engine.address
        self.port = engine.port
        self.cgroup_id = engine.cgroup_id
        self.authorization = engine.authorization
        self.touch = model.touch
        """Note that the request makes progress; called for each piece of a response, and cheap."""
        self._model: Model | None = model
        self._is_inside = True
        self._slot = slot
        self._began = 0.0 if slot is None else time.monotonic()

    def close(self) -> None:
        """Release the model, and the slot if there is one. Safe to call twice."""
        model, self._model = self._model, None
        if model is not None:
            model.leave(self._slot, self._began, is_inside=self._is_inside)

    def rest(self) -> None:
        """Do not count as a use of the model until wake(): an idle connection alone must not keep it from eviction."""
        if self._model is not None and self._is_inside:
            self._is_inside = False
            self._model.step_out()

    def wake(self) -> None:
        """Count as a use again, unless the model is being evicted. Safe to call when it does not rest."""
        if self._model is not None and not self._is_inside:
            self._is_inside = self._model.step_in()


class Onlooker:
    """A request that looks at an engine without using the model: it neither loads the model nor keeps it."""

    __slots__ = ("address", "authorization", "cgroup_id", "port", "serving")

    def __init__(self, serving: Serving, engine: Engine) -> None:
        self.serving = serving
        self.address = engine.address
        self.port = engine.port
        self.cgroup_id = engine.cgroup_id
        self.authorization = engine.authorization

    def touch(self) -> None:
        """Do nothing: it is no use of the model, so that its progress does not count."""

    def close(self) -> None:
        """Do nothing: it holds nothing."""

    def rest(self) -> None:
        """Do nothing: it does not count as a use."""

    def wake(self) -> None:
        """Do nothing, as rest()."""


class Waiter:
    """A request that waits for its model."""

    __slots__ = ("future", "knows", "on_wait", "serving", "told", "told_seconds")

    def __init__(
        self,
        serving: Serving,
        future: asyncio.Future[Passage],
        on_wait: Callable[[str], None] | None,
        knows: Shown = lambda _: True,
    ) -> None:
        """``knows``: the models that the client may know of."""
        self.knows = knows
        self.serving = serving
        self.future = future
        self.on_wait = on_wait
        self.told: object = None
        self.told_seconds = -math.inf

    def hear(self, goal: str, line: News) -> None:
        """Be told what it waits for ("for qwen to load") and of the line, if that is new or the last news are old."""
        told, now = (goal, line.key), time.monotonic()
        if told != self.told or now - self.told_seconds >= _NEWS_SECONDS:
            self.told, self.told_seconds = told, now
            # Later, so that what the request does finds no step half done.
            self.future.get_loop().call_soon(self._tell, f"Waiting {goal}.{line.sentence(self.knows)}")

    def _tell(self, sentence: str) -> None:
        if self.on_wait is not None and not self.future.done():
            self.on_wait(sentence)
