"""What a client that waits is told of the line of starts that wait for room."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from gpusvc.paths import Paths
from gpusvc.state import line
from gpusvc.state.line import Shown, Waiting

# How long one reading serves all requests of this worker.
_FRESH_SECONDS = 1.0


class News(NamedTuple):
    """What the line says that has to do with one model; None: nothing."""

    waiting: Waiting | None

    @property
    def key(self) -> object:
        """Something that differs if sentence() does, apart from its times."""
        return None if self.waiting is None else (self.waiting.model, self.waiting.blockers, self.waiting.behind)

    def gist(self, knows: Shown) -> str:
        """Return a space and a sentence without times, or nothing. ``knows``: the models that the client knows of."""
        return "" if self.waiting is None else f" {self.waiting.gist(knows)}"

    def sentence(self, knows: Shown) -> str:
        """Return gist(), and since when."""
        return "" if self.waiting is None else f" {self.waiting.sentence(time.time(), knows)}"


class Line:
    """The line, read at most once a second, and only while a request waits for news of it."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._line: Sequence[Waiting] = ()
        self._read_seconds = -math.inf

    def news(self, model: str, *, is_inside: bool) -> News:
        """Return the place of ``model`` in the line; or, if it is being evicted (not ``is_inside``), for whom it is."""
        now = time.monotonic()
        if now - self._read_seconds >= _FRESH_SECONDS:
            self._read_seconds = now
            self._line = line.read(self._paths)
        return News(line.of(self._line, model) if is_inside else line.that_needs(self._line, model))
