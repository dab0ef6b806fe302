"""The models that the watchdog has leave: their doors are held closed, and they are followed until they are gone.

Nothing here waits. What takes time is begun, and looked at again when somebody calls follow().
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.backoff import Backoff
from gpusvc.config.host import BusyAction
from gpusvc.errors import GpusvcError
from gpusvc.journal import events
from gpusvc.journal import units as unitlog
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

# A model that was to leave and is up by now is up because somebody else wanted that.
_CHANGE_OF_MIND_SECONDS = 5.0

# Beyond the model's own timeouts; then its door opens again whatever became of it.
_GRACE_SECONDS = 90.0

# How long the journal may take to tell the last words of an engine, and how many lines those are.
_WORDS_SECONDS = 5.0
_WORDS = 10

# What systemd refused is not asked for at every tick.
_FIRST_PAUSE_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 300.0

_OVER = ("inactive", "failed")

_THEN = {
    BusyAction.RESTART: ("Restart", " It is restarted."),
    BusyAction.STOP: ("Stop", " It is stopped."),
    BusyAction.NONE: (None, ""),
}


class _Words:
    """The last words of an engine, out of the journal: asked for now, and there some time later."""

    def __init__(self, name: str) -> None:
        self._deadline = time.monotonic() + _WORDS_SECONDS
        self._file = os.memfd_create("words")  # a pipe could fill up
        self._child: subprocess.Popen[bytes] | None = None
        command = unitlog.command(name, f"--lines={_WORDS}", "--output=cat", "--quiet")
        with contextlib.suppress(OSError):
            self._child = subprocess.Popen(  # noqa: S603
                [*command, "--no-pager"], stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.DEVNULL
            )

    def are_there(self) -> bool:
        """Whether no more will come."""
        return self._child is None or self._child.poll() is not None or time.monotonic() > self._deadline

    def take(self) -> list[str]:
        """The lines, oldest first; ends this."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        with open(self._file, "rb") as file:  # noqa: PTH123  a descriptor
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()]


@dataclass(slots=True)
class _Eviction:
    """One of them; its door is closed from when it was asked to go."""

    doors: Doors
    since: float
    deadline: float


@dataclass(slots=True)
class _Stuck:
    """One that will be dealt with as soon as its last words are heard."""

    evidence: Evidence
    lease: Lease
    verdict: Verdict
    words: _Words
    probing: Probing | None

    def is_ready(self) -> bool:
        """Whether the last lines of the log and the outcome of the probe are there, or will not come."""
        return self.words.are_there() and (self.probing is None or self.probing.outcome is not None)


class Evictions:
    """All that leave now. ``now`` is a clock that nobody sets, in seconds."""

    def __init__(self, paths: Paths, systemd: LoggingConnection, now: Callable[[], float]) -> None:
        self._paths = paths
        self._systemd = systemd
        self._now = now
        self._leaving: dict[str, _Eviction] = {}
        self._stuck: dict[str, _Stuck] = {}
        self._refused: dict[str, Backoff] = {}

    @property
    def models(self) -> frozenset[str]:
        return frozenset({*self._leaving, *self._stuck})

    def evict(self, evidence: Evidence, lease: Lease, *, reason: str, announce: Callable[[], None]) -> None:
        """Have an idle model leave, unless somebody uses it after all. ``announce`` is called once it is certain."""
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
            self._stuck[lease.model] = _Stuck(evidence, lease, verdict, _Words(lease.model), probing)

    def follow(self) -> None:
        """See how far they are."""
        for name, stuck in list(self._stuck.items()):
            if stuck.is_ready():
                del self._stuck[name]
                self._unstick(stuck, stuck.words.take())
        if not self._leaving:
            return
        states = self._systemd.states([names.service(name) for name in self._leaving])
        for name, evicted in list(self._leaving.items()):
            if self._is_over(name, evicted, states):
                evicted.doors.release()
                del self._leaving[name]

    def close(self) -> None:
        """Open all doors; systemd goes on with what it was asked for."""
        for evicted in self._leaving.values():
            evicted.doors.release()
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
            return  # it moves
        if verb is not None and not self._is_up(name):
            return
        said = "\n".join(["Its last words:", *words]) if words else "It left no word."
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
        """Whether it is neither gone nor on its way already."""
        service = names.service(name)
        return (self._systemd.states([service]) or {}).get(service) == "active"

    def _is_over(self, name: str, evicted: _Eviction, states: Mapping[str, str] | None) -> bool:
        now = self._now()
        if now > evicted.deadline:
            log(4, f"{name} was to leave and has not; `systemctl status {names.service(name)}` says what it does.")
            return True
        if states is None:
            return False
        state = states[names.service(name)]
        return state in _OVER or (state == "active" and now - evicted.since > _CHANGE_OF_MIND_SECONDS)
