"""The models that the watchdog stops or restarts. It holds their doors closed, and follows them until they have ended.

Nothing here waits: follow() looks at all of them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.backoff import Backoff
from gpusvc.config.host import BusyAction
from gpusvc.errors import GpusvcError
from gpusvc.journal import events
from gpusvc.journal.background import BackgroundLines
from gpusvc.log import log
from gpusvc.placement import eviction
from gpusvc.placement.eviction import Doors
from gpusvc.state import use
from gpusvc.watchdog.judge import Finding
from gpusvc.watchdog.probe import Outcome

if TYPE_CHECKING:
    from gpusvc.paths import Paths
    from gpusvc.state.lease import Lease
    from gpusvc.systemd.connection import LoggingConnection
    from gpusvc.watchdog.judge import Evidence, Verdict
    from gpusvc.watchdog.probe import Probing

# A model that is up again after this time was started by somebody else, or its job was cancelled.
_CHANGE_OF_MIND_SECONDS = 5.0

# This time after the model's own timeouts its door opens again in any case.
_GRACE_SECONDS = 90.0

# How many last lines of a stuck model are read.
_WORDS = 10

# Between two tries of an eviction that systemd refuses.
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 300.0

_OVER = ("inactive", "failed")

_THEN = {
    BusyAction.RESTART: ("Restart", " It is restarted."),
    BusyAction.STOP: ("Stop", " It is stopped."),
    BusyAction.NONE: (None, ""),
}


@dataclass(slots=True)
class _Eviction:
    """A model that systemd stops or restarts, behind a closed door. Times are by the clock of Evictions."""

    doors: Doors
    since: float
    deadline: float


@dataclass(slots=True)
class _Stuck:
    """A stuck or failing model whose last lines are being read."""

    evidence: Evidence
    lease: Lease
    verdict: Verdict
    words: BackgroundLines
    probing: Probing | None

    def is_ready(self) -> bool:
        """Return whether the last lines of the log and the outcome of the probe are there, or will not come."""
        return self.words.are_there() and (self.probing is None or self.probing.outcome is not None)


class Evictions:
    """The evictions and restarts in progress."""

    def __init__(self, paths: Paths, systemd: LoggingConnection, now: Callable[[], float]) -> None:
        """``now`` is a clock that nobody sets, in seconds."""
        self._paths = paths
        self._systemd = systemd
        self._now = now
        self._leaving: dict[str, _Eviction] = {}
        self._stuck: dict[str, _Stuck] = {}
        self._refused: dict[str, Backoff] = {}

    @property
    def models(self) -> frozenset[str]:
        """The models that are being stopped or restarted, or soon will be."""
        return frozenset({*self._leaving, *self._stuck})

    def evict(self, evidence: Evidence, lease: Lease, *, reason: str, announce: Callable[[], None]) -> None:
        """Evict an idle model, unless somebody used it since ``evidence``. ``announce`` is called before the stop."""
        name = lease.model
        refused = self._refused.setdefault(name, Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))
        if not refused.is_due(self._now()):
            return
        if not self._is_up(name):
            return
        with contextlib.ExitStack() as undo:
            doors = undo.enter_context(Doors(self._paths))
            try:
                attempt = self._systemd.try_ask(
                    lambda manager: eviction.attempt(
                        self._paths,
                        manager,
                        doors,
                        name,
                        reason=reason.rstrip("."),
                        # A use since the tick began has left its time, even if it has ended again.
                        is_wanted=lambda: use.last_use(self._paths, name) == evidence.last_use,
                        on_stop=lambda _: announce(),
                    )
                )
            except GpusvcError as error:
                self._systemd.complain(error)
                return
            if attempt is None:
                refused.postpone(self._now())
            if attempt is None or attempt.job is None:
                return
            undo.pop_all()
        self._refused.pop(name, None)
        self._leaving[name] = self._eviction_of(doors, lease)

    def unstick(self, evidence: Evidence, lease: Lease, verdict: Verdict, probing: Probing | None = None) -> None:
        """Read the last lines of a stuck or failing model; then restart it, stop it or leave it alone.

        A failing model is only restarted or stopped if ``probing``, a request to its engine, fails too.
        """
        if lease.model not in self._stuck:
            self._stuck[lease.model] = _Stuck(evidence, lease, verdict, BackgroundLines(lease.model, _WORDS), probing)

    def follow(self) -> None:
        """Act on the models whose last lines are there, and open the doors of those that have ended."""
        for name, stuck in list(self._stuck.items()):
            if stuck.is_ready():
                del self._stuck[name]
                self._unstick(stuck, stuck.words.take())
        if not self._leaving:
            return
        states = self._systemd.states([names.service(name) for name in self._leaving])
        for name, evicted in list(self._leaving.items()):
            if self._is_over(name, evicted, states):
                evicted.doors.open_all()
                del self._leaving[name]

    def close(self) -> None:
        """Open all doors. systemd finishes its jobs."""
        for evicted in self._leaving.values():
            evicted.doors.open_all()
        for stuck in self._stuck.values():
            stuck.words.take()
        self._leaving.clear()
        self._stuck.clear()

    def _unstick(self, stuck: _Stuck, words: Sequence[str]) -> None:
        name, before = stuck.lease.model, stuck.evidence
        verb, sentence = _THEN[stuck.verdict.action or BusyAction.NONE]
        kind, said_first = events.EventType.STUCK, ""
        if stuck.verdict.kind is Finding.FAILING:
            kind = events.EventType.FAILING
            if stuck.probing is None:
                verb, sentence = None, " The watchdog does nothing, because it has no probe that it can send."
            elif stuck.probing.outcome is not Outcome.FAILS:
                log(6, f"{stuck.verdict.reason} The watchdog's own request {stuck.probing.reason}: it does nothing.")
                return
            else:
                said_first = f" The watchdog's own request {stuck.probing.reason}."
        elif use.last_progress(self._paths, name) != before.last_progress or not use.is_used(self._paths, name):
            return  # it made progress
        if verb is not None and not self._is_up(name):
            return
        said = "\n".join(["Its last words:", *words]) if words else "It wrote nothing."
        events.emit(
            kind,
            f"{stuck.verdict.reason}{said_first}{sentence}\n{said}",
            model=name,
            gpu=[gpu.index for gpu in stuck.lease.gpus],
            bytes=before.vram_bytes,
            reason=stuck.verdict.reason,
            level=4,
        )
        if verb is None:
            return
        with contextlib.ExitStack() as undo:
            doors = undo.enter_context(Doors(self._paths))
            with contextlib.suppress(GpusvcError):
                doors.close(name)  # new users wait; without the door they would see it go
            if self._systemd.try_ask(lambda manager: manager.enqueue(verb, names.service(name))) is not None:
                undo.pop_all()
                self._leaving[name] = self._eviction_of(doors, stuck.lease)

    def _eviction_of(self, doors: Doors, lease: Lease) -> _Eviction:
        now = self._now()
        patience = lease.stop_timeout_seconds + lease.release_timeout_seconds + _GRACE_SECONDS
        return _Eviction(doors, since=now, deadline=now + patience)

    def _is_up(self, name: str) -> bool:
        """Return whether its unit is active, so that it neither starts nor stops."""
        service = names.service(name)
        return (self._systemd.states([service]) or {}).get(service) == "active"

    def _is_over(self, name: str, evicted: _Eviction, states: Mapping[str, str] | None) -> bool:
        now = self._now()
        if now > evicted.deadline:
            log(4, f"{name} did not stop in time; `systemctl status {names.service(name)}` shows what it does.")
            return True
        if states is None:
            return False
        state = states[names.service(name)]
        return state in _OVER or (state == "active" and now - evicted.since > _CHANGE_OF_MIND_SECONDS)
