"""What models left behind: whose release has to be proven again, and which of their processes still hold VRAM.

Looks go in, what is to be done or said comes out. Nothing is done or said at the first look: what ends, ends in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from gpusvc.backoff import Backoff
from gpusvc.linux.processes import Process
from gpusvc.quantity import format_size

# Between the end of a service and the end of what is left of it there is a moment.
_PATIENCE_SECONDS = 3.0

# The driver lets go of the memory of the dead within this time, or is slow enough to be worth a word.
_STRAY_SECONDS = 5.0

# A proof that failed has been tried for all of its release_timeout already; one that was killed has not.
_FIRST_PAUSE_SECONDS = 20.0
_LONGEST_PAUSE_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Stray:
    """A process that was a model's, is in its scope no more, and is on the driver's list all the same."""

    model: str
    process: Process
    gpu_index: int
    alive: bool
    used_bytes: int | None = field(compare=False)

    def __str__(self) -> str:
        held = "VRAM" if self.used_bytes is None else format_size(self.used_bytes)
        if self.alive:
            return f"PID {self.process.pid} of {self.model} holds {held} of GPU {self.gpu_index} outside of its scope."
        return (
            f"PID {self.process.pid} of {self.model} is gone, but the driver counts {held} of GPU {self.gpu_index} "
            "as its."
        )


class Strays:
    """Tells of each stray once, when it has been there for a while."""

    def __init__(self) -> None:
        self._since: dict[Stray, float] = {}
        self._told: set[Stray] = set()

    def news(self, now_seconds: float, strays: Iterable[Stray]) -> list[Stray]:
        """Of these, which are all that there are, those to be told of now."""
        self._since = {stray: self._since.get(stray, now_seconds) for stray in strays}
        self._told &= self._since.keys()
        ripe = {stray for stray, since in self._since.items() if now_seconds - since >= _STRAY_SECONDS}
        news = sorted(ripe - self._told, key=lambda stray: (stray.model, stray.process, stray.gpu_index))
        self._told |= ripe
        return news


class Unattended:
    """The models of which something is left while nobody seems to be at them."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._pauses: dict[str, Backoff] = {}
        self._signs: dict[str, object] = {}
        self._postponed: set[str] = set()

    def due(
        self, now_seconds: float, models: Collection[str], sign: Callable[[str], object] = lambda _: None
    ) -> list[str]:
        """Of these, which are all that there are, those to be looked into now.

        Args:
            now_seconds: by a clock that nobody sets.
            models: their names.
            sign: of a model, what is seen to be in the way of its proof. Where that changes, the proof is worth another
                try soon, however long ago the last one failed.
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
        """Whether it was never postponed."""
        return model not in self._postponed

    def postpone(self, now_seconds: float, model: str) -> None:
        """All was done that can be done now."""
        self._postponed.add(model)
        self._pauses[model].postpone(now_seconds)
