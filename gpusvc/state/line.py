"""The line of starts that wait for room, as everybody may see it: who waits for what, behind whom, since when.

Each waiting start has a notice: a file in /run that its owner keeps locked, so that a notice without a lock is left
over from a process that died. A notice changes nothing: placement goes by the tickets, which are private.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpusvc import files
from gpusvc.paths import Paths
from gpusvc.quantity import format_duration
from gpusvc.record import Record
from gpusvc.state import locks
from gpusvc.state.locks import HeldLock

_AGE_CLASS_NS = 60 * 10**9

# Larger than any time that gpusvc writes, in seconds.
_MAX_SECONDS = 2.0**40

# No more are read, whatever is in the directory.
_MOST = 1000

# "qwen and 7 more"
_MOST_NAMES = 3

Rank = tuple[int, int, int, str]

Shown = Callable[[str], bool]
"""Whether the reader of a sentence may know of a model."""


def rank(born_ns: int, priority: int, model: str) -> Rank:
    """Return the place in the line, as a key to sort by: age class (a minute each), then priority, then age.

    Args:
        born_ns: when the start joined the line, in nanoseconds since boot.
        priority: the model's; the highest goes first.
        model: decides between equals.
    """
    return (born_ns // _AGE_CLASS_NS, -priority, born_ns, model)


class Blocker(Record):
    """A model that a start waits for, and what that model is doing, such as "in use"."""

    model: str
    state: str


class Waiting(Record):
    """One start that waits for room."""

    model: str
    """The model; "gpusvc evict" is room for another program."""
    since: float
    """When it joined the line, in seconds since the epoch."""
    blockers: tuple[Blocker, ...] = ()
    """The models that have to end, load or leave before there is room; none: only the starts before it."""
    behind: tuple[str, ...] = ()
    """The starts that come first, the next one first."""

    @property
    def position(self) -> int:
        """Its place in the line; 1 is next."""
        return len(self.behind) + 1

    def gist(self, shown: Shown = lambda _: True) -> str:
        """Return a sentence on what it waits for, without a time. ``shown``: the models that the reader knows of."""
        return f"{self._who(shown)} waits {self._what(shown)}"

    def parts(self) -> tuple[str, str]:
        """Return the sentence with its time left out: what comes before the time, and what comes after it."""
        return f"{self._who(_everything)} has waited ", f" {self._what(_everything)}"

    def sentence(self, now_seconds: float, shown: Shown = lambda _: True) -> str:
        """Return gist() with the time that it has waited; ``now_seconds`` since the epoch."""
        waited = format_duration(max(0, int(now_seconds - self.since)))
        return f"{self._who(shown)} has waited {waited} {self._what(shown)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "for": [{"model": blocker.model, "state": blocker.state} for blocker in self.blockers],
            "behind": list(self.behind),
            "sentence": self.gist(),
        }

    def _who(self, shown: Shown) -> str:
        return self.model if shown(self.model) else "Another model"

    def _what(self, shown: Shown) -> str:
        blockers = _listed([(blocker.model, f" ({blocker.state})") for blocker in self.blockers], shown)
        behind = _listed([(model, "") for model in self.behind], shown)
        if blockers and behind:
            what = f"for {blockers}, behind {behind}"
        else:
            what = f"for {blockers}" if blockers else f"in line behind {behind}" if behind else "for room"
        following = "It" if not self.behind else self.behind[0] if shown(self.behind[0]) else "Another model"
        return f"{what}. {following} is next."


class Notice:
    """The notice of one waiting start. It is there from the first tell() to close()."""

    def __init__(self, paths: Paths, name: str, model: str, born_ns: int, priority: int) -> None:
        """``name`` is that of the start's ticket."""
        self._file = paths.line_directory / name
        self._model, self._since = model, time.time()
        self._rank = {"born_ns": born_ns, "priority": priority}
        self._lock: HeldLock | None = None
        self._told: tuple[Blocker, ...] | None = None

    def tell(self, blockers: Sequence[Blocker], behind: Iterable[str]) -> Waiting:
        """Say what the start waits for now. An error is ignored: the start is more important than its notice."""
        if tuple(blockers) != self._told:
            self._told = tuple(blockers)
            said = [[blocker.model, blocker.state] for blocker in blockers]
            with contextlib.suppress(OSError):
                self._write(json.dumps({"model": self._model, "since": self._since, **self._rank, "for": said}))
        return Waiting(self._model, self._since, tuple(blockers), tuple(behind))

    def close(self) -> None:
        """Remove the notice. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._file.unlink()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _write(self, text: str) -> None:
        files.make_directory(self._file.parent)
        with files.written_beside(self._file, text, mode=0o644, durable=False) as draft:
            handle = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            locks.try_lock(handle, locks.EXCLUSIVE)
            before, self._lock = self._lock, HeldLock(handle)
            draft.replace(self._file)
        if before is not None:
            before.close()


def forget(paths: Paths, name: str) -> None:
    """Remove the notice of a start that died. Only for those who hold the placement lock."""
    with contextlib.suppress(OSError):
        (paths.line_directory / name).unlink()


def read(paths: Paths) -> list[Waiting]:
    """Return the starts that wait, the next one first."""
    try:
        entries = sorted(os.listdir(paths.line_directory))[:_MOST]  # noqa: PTH208  the gateway reads it often
    except OSError:
        return []
    found = [notice for name in entries if not name.startswith(".") and (notice := _read(paths, name)) is not None]
    line = [waiting for _, waiting in sorted(found, key=lambda entry: entry[0])]
    return [
        Waiting(waiting.model, waiting.since, waiting.blockers, tuple(one.model for one in line[:place]))
        for place, waiting in enumerate(line)
    ]


def of(line: Iterable[Waiting], model: str) -> Waiting | None:
    """Return the start of ``model``, if it waits."""
    return next((waiting for waiting in line if waiting.model == model), None)


def that_needs(line: Iterable[Waiting], model: str) -> Waiting | None:
    """Return the first start that waits for ``model`` to make room."""
    return next((one for one in line if any(blocker.model == model for blocker in one.blockers)), None)


def _read(paths: Paths, name: str) -> tuple[Rank, Waiting] | None:
    try:
        handle = files.open_regular(paths.line_directory / name)
    except (OSError, ValueError):
        return None
    try:
        if locks.try_lock(handle, locks.SHARED):
            return None  # its owner is dead
        return parse(files.read_open(handle))
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)


def parse(text: bytes | str) -> tuple[Rank, Waiting] | None:
    """Return what a notice says and its place in the line; None: it makes no sense."""
    try:
        value = json.loads(text)
        model, since = str(value["model"]), float(value["since"])
        blockers = tuple(Blocker(str(other), str(state)) for other, state in value["for"])
        place = rank(int(value["born_ns"]), int(value["priority"]), model)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return (place, Waiting(model, since, blockers)) if 0 <= since < _MAX_SECONDS else None


def _listed(entries: Sequence[tuple[str, str]], shown: Shown) -> str:
    """Return the names and what follows each; models that the reader does not know of are only counted."""
    known = [f"{model}{more}" for model, more in entries if shown(model)]
    words, hidden = known[:_MOST_NAMES], len(entries) - len(known[:_MOST_NAMES])
    if hidden:
        words.append(f"{hidden} more" if words else f"{hidden} other model{'s' if hidden > 1 else ''}")
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _everything(_: str) -> bool:
    return True
