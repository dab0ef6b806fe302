"""One request inside a model, and one that waits for that."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

from gpusvc.config.serving import Serving
from gpusvc.gateway.activation.engine import Engine

# How often a waiting client is told the same again: clients and proxies have timeouts.
_NEWS_SECONDS = 5.0


class Model(Protocol):
    """The model that a passage leads into, as its worker sees it."""

    touch: Callable[[], None]

    def leave(self, slot: int | None, began_seconds: float) -> None:
        """One request is over."""


class Passage:
    """One request inside a model, which is not evicted before close()."""

    __slots__ = ("_began", "_model", "_slot", "address", "port", "serving", "touch")

    def __init__(self, model: Model, serving: Serving, engine: Engine, slot: int | None) -> None:
        self.serving = serving
        self.address = engine.address
        self.port = engine.port
        self.touch = model.touch
        """Note that the request makes progress; called for each piece of a response, and cheap."""
        self._model: Model | None = model
        self._slot = slot
        self._began = 0.0 if slot is None else time.monotonic()

    def close(self) -> None:
        """Release the model, and the slot if there is one. Safe to call twice."""
        model, self._model = self._model, None
        if model is not None:
            model.leave(self._slot, self._began)


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

    def wants(self, sentence: str) -> bool:
        """Whether it is to be told this: it is new, or the last news was long ago."""
        now = time.monotonic()
        if self.on_wait is None or (sentence == self.told and now - self.told_seconds < _NEWS_SECONDS):
            return False
        self.told, self.told_seconds = sentence, now
        return True

    def tell(self, sentence: str) -> None:
        if self.on_wait is not None and not self.future.done():
            self.on_wait(sentence)
