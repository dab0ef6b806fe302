"""Leaks: the models whose release has to be proven again, and their processes that hold VRAM outside of a scope.

Observations go in, and come out if there is something to do or to report. The first observation is never enough,
because a model ends in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from gpusvc.backoff import Backoff
from gpusvc.quantity import format_size

if TYPE_CHECKING:
    from gpusvc.state.holdings import Stray

# The processes of a model may end this much later than its service.
_PATIENCE_SECONDS = 3.0

# The driver mostly frees the memory of an ended process within this time; a later one is reported.
_STRAY_SECONDS = 5.0

# Between two proofs. Each of them tries for release_timeout.
_FIRST_PAUSE_SECONDS = 20.0
_LONGEST_PAUSE_SECONDS = 1800.0


def in_words(stray: Stray) -> str:
    """Return a sentence about a stray."""
    held = "VRAM" if stray.used_bytes is None else format_size(stray.used_bytes)
    if stray.alive:
        return f"PID {stray.process.pid} of {stray.model} holds {held} of GPU {stray.gpu_index} outside of its scope."
    return (
        f"PID {stray.process.pid} of {stray.model} has ended, but the driver counts {held} of GPU {stray.gpu_index} "
        "as its memory."
    )


class Strays:
    """Reports each stray once, after it was seen for some time."""

    def __init__(self) -> None:
        self._since: dict[tuple[object, ...], float] = {}
        self._told: set[tuple[object, ...]] = set()

    def news(self, now_seconds: float, strays: Iterable[Stray]) -> list[Stray]:
        """Return those of ``strays``, which are all of this moment, that are to be reported now."""
        found = {stray.identity: stray for stray in strays}
        self._since = {identity: self._since.get(identity, now_seconds) for identity in found}
        self._told &= self._since.keys()
        ripe = {identity for identity, since in self._since.items() if now_seconds - since >= _STRAY_SECONDS}
        news = [found[identity] for identity in ripe - self._told]
        self._told |= ripe
        return sorted(news, key=lambda stray: (stray.model, stray.process, stray.gpu_index))


class Unattended:
    """The models that left something behind, and whose service does not run."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._pauses: dict[str, Backoff] = {}
        self._signs: dict[str, object] = {}
        self._postponed: set[str] = set()

    def due(
        self, now_seconds: float, models: Collection[str], sign: Callable[[str], object] = lambda _: None
    ) -> list[str]:
        """Return those of ``models``, which are all of this moment, whose release is to be proven now.

        Args:
            now_seconds: by a clock that nobody sets.
            models: their names.
            sign: returns what is seen to be in the way of a model's proof. If that changes, the proof is soon tried
                again, however long the pause after the last failure is.
        """
        self._since = {model: self._since.get(model, now_seconds) for model in models}
        before, self._signs = self._signs, {model: sign(model) for model in models}
        self._postponed &= self._signs.keys()
        for model in before.keys() & self._signs.keys():
            if before[model] != self._signs[model]:
                self._since[model] = now_seconds
                self._pauses.pop(model, None)
        self._pauses = {
            model: self._pauses.get(model) or Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS) for model in models
        }
        return sorted(
            model
            for model, since in self._since.items()
            if now_seconds - since >= _PATIENCE_SECONDS and self._pauses[model].is_due(now_seconds)
        )

    def is_new(self, model: str) -> bool:
        """Return whether no proof of ``model`` was tried yet."""
        return model not in self._postponed

    def postpone(self, now_seconds: float, model: str) -> None:
        """Note that a proof of ``model`` is tried now; the next try follows after a pause."""
        self._postponed.add(model)
        self._pauses[model].postpone(now_seconds)
