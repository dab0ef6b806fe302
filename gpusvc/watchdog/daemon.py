"""gpusvc-watchdog.service: each tick it observes the models, judges them, and acts through systemd.

It may be killed at any moment, also during an eviction: the kernel opens the doors that it held closed, systemd
finishes its job, and the next watchdog starts from the locks, leases and control groups. Only a few ticks are lost.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.config.host import HostWatchdog
from gpusvc.config.watched import Watched
from gpusvc.errors import GpusvcError
from gpusvc.gpu.meter import Meter
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.state import hung, upstream_key, use
from gpusvc.systemd.connection import LoggingConnection, ServiceManager
from gpusvc.systemd.notify import Notifier
from gpusvc.watchdog import announcements, verdicts
from gpusvc.watchdog.evictions import Evictions
from gpusvc.watchdog.judge import Finding, History, Judgement, Pressure, judge
from gpusvc.watchdog.leaks import Strays, Unattended, in_words
from gpusvc.watchdog.observer import Observation, Observer
from gpusvc.watchdog.probe import Probing

if TYPE_CHECKING:
    from gpusvc.errors import ConfigError
    from gpusvc.watchdog.judge import Verdict

# Between ticks: how often the evictions are followed, because requests may wait before a closed door, and how often
# systemd's watchdog is fed.
_FOLLOW_SECONDS = 0.2
_FEED_SECONDS = 15.0

# How often the text of `systemctl status` is renewed if only times in it changed, and how many models it names.
_STATUS_SECONDS = 10.0
_STATUS_MODELS = 5


class Watchdog:
    """The watchdog's loop."""

    def __init__(
        self,
        paths: Paths,
        watched: Watched,
        observer: Observer,
        connect: Callable[[], ServiceManager],
        notifier: Notifier,
        *,
        now: Callable[[], float],
    ) -> None:
        """``now`` returns CLOCK_BOOTTIME, in seconds."""
        self._paths = paths
        self._watched = watched
        self._observer = observer
        self._notifier = notifier
        self._systemd = LoggingConnection(connect, now=now, on_answer=notifier.feed_watchdog)
        self._evictions = Evictions(paths, self._systemd, now)
        self._history = History()
        self._short: set[str] = set()
        self._strays = Strays()
        self._unattended = Unattended()
        self._shown: object = None
        self._status_due = 0.0
        self._hung = False

    def run(self) -> None:
        """Run until SIGTERM or SIGINT. SIGHUP makes it read the configuration again."""
        # They are blocked except while sigtimedwait() waits for them, so that they interrupt nothing.
        signals = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self._notifier.ready("Watching.")
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + self._interval()
                self.tick()
            else:
                self._evictions.follow()
            self._notifier.feed_watchdog()
            rest = min(due - time.monotonic(), _FOLLOW_SECONDS if self._evictions.models else _FEED_SECONDS)
            received = signal.sigtimedwait(signals, max(0.0, rest))
            if received is None:
                continue
            if received.si_signo != signal.SIGHUP:
                break
            log(6, "The configuration is read again.")
            self._watched.reread()
            due = time.monotonic()
        self._notifier.stopping()
        self.close()

    def tick(self) -> Judgement:
        """Observe, judge, act, and report."""
        self._evictions.follow()
        seen = self._observer.look(self._evictions.models)
        policy = seen.host.watchdog if seen.host is not None else HostWatchdog()
        judgement = judge(
            self._history,
            seen.now_seconds,
            list(seen.evidence.values()),
            seen.gpus,
            interval_seconds=policy.interval_seconds,
            pressure_seconds=policy.pressure_time_seconds,
        )
        self._history = judgement.history
        for name, evidence in seen.evidence.items():
            if evidence.gpu_active:
                with contextlib.suppress(GpusvcError):
                    use.touch(self._paths, name)
        for verdict in judgement.verdicts:
            if verdict.kind is Finding.IDLE:
                self._evict(seen, verdict.model, verdict.reason, partial(announcements.idle, seen, verdict))
            elif verdict.kind is Finding.STUCK:
                self._evictions.unstick(seen.evidence[verdict.model], seen.leases[verdict.model], verdict)
            elif verdict.kind is Finding.FAILING:
                self._try_failing(seen, verdict)
        self._relieve(seen, judgement.pressures)
        self._tend(seen)
        if not self._evictions.models:
            self._systemd.close()
        self._tell(seen, judgement)
        return judgement

    def close(self) -> None:
        self._evictions.close()
        self._systemd.close()
        self._observer.close()

    def _interval(self) -> float:
        host = self._watched.host()
        return (host.watchdog if host is not None else HostWatchdog()).interval_seconds

    def _evict(self, seen: Observation, name: str, reason: str, announce: Callable[[], None]) -> None:
        self._evictions.evict(seen.evidence[name], seen.leases[name], reason=reason, announce=announce)

    def _try_failing(self, seen: Observation, verdict: Verdict) -> None:
        """Ask a failing engine for one token; Evictions acts on the outcome."""
        lease = seen.leases[verdict.model]
        config = self._watched.models([verdict.model])[verdict.model]
        probe = config.probe if config is not None else None
        probing = None
        address = lease.address or "127.0.0.1"
        # The unit's IPAddressAllow= lets the watchdog reach no other address.
        if probe is not None and lease.port and (address.startswith("127.") or address == "::1"):
            key = upstream_key.read(self._paths, verdict.model, upstream_key.WATCHDOG)
            probing = Probing(address, lease.port, probe.path, probe.body, key)
        self._evictions.unstick(seen.evidence[verdict.model], lease, verdict, probing)

    def _relieve(self, seen: Observation, pressures: Iterable[Pressure]) -> None:
        """Evict the victims. A pressure without a victim is announced once, for as long as it lasts."""
        short, self._short = self._short, set()
        for pressure in pressures:
            self._short.add(pressure.gpu_uuid)
            if pressure.victim is not None:
                self._evict(seen, pressure.victim, pressure.reason, partial(announcements.pressure, seen, pressure))
            elif pressure.gpu_uuid not in short:
                announcements.pressure(seen, pressure)

    def _tend(self, seen: Observation) -> None:
        """Report what models left behind, and start their release proofs."""
        now = seen.now_seconds
        for stray in self._strays.news(now, seen.strays):
            announcements.leak(
                in_words(stray), stray.model, "a process", gpu=[stray.gpu_index], vram_bytes=stray.used_bytes
            )

        def in_the_way(name: str) -> tuple[object, ...]:
            return seen.problem, frozenset(stray.identity for stray in seen.strays if stray.model == name)

        due = self._unattended.due(now, seen.unattended, in_the_way)
        states = (
            self._systemd.states([unit(name) for name in due for unit in (names.service, names.proof)]) if due else {}
        )
        if states is None:
            return
        for name in due:
            is_new = self._unattended.is_new(name)
            self._unattended.postpone(now, name)
            state, proof = states[names.service(name)], states[names.proof(name)]
            if state not in {"inactive", "failed"} or proof not in {"inactive", "failed"}:
                continue  # the unit runs, in another slice than this watchdog looks at
            if state == "failed" and is_new and any(in_the_way(name)):
                continue  # its own unit has just reported that its proof failed
            if is_new:
                left = "its lease" if name in seen.leases else "something of it"
                announcements.leak(f"{name} does not run, and {left} is left: its release is proven now.", name, left)
            self._systemd.try_ask(partial(_prove, unit=names.proof(name)))

    def _tell(self, seen: Observation, judgement: Judgement) -> None:
        """Write the verdicts and the status text, if they changed."""
        if seen.hung or self._hung:
            hung.write(self._paths, seen.hung)
            self._hung = bool(seen.hung)
        shown = [(verdict.model, verdict.kind, verdict.source) for verdict in judgement.verdicts]
        now = seen.now_seconds
        if shown != self._shown:
            verdicts.write(self._paths, judgement.verdicts)
        elif now < self._status_due:
            return
        self._shown, self._status_due = shown, now + _STATUS_SECONDS
        self._notifier.status(status(judgement, seen.problem))


def status(judgement: Judgement, problem: str | None) -> str:
    """Return the text of `systemctl status`: problems first, then the other models."""
    told = sorted(judgement.verdicts, key=lambda verdict: verdict.kind is Finding.NONE)
    number = len(told)
    count = "no model" if not number else "1 model" if number == 1 else f"{number} models"
    sentences = [f"Watching {count}."]
    sentences += [problem] if problem is not None else []
    sentences += [pressure.reason for pressure in judgement.pressures]
    sentences += [verdict.reason for verdict in told[:_STATUS_MODELS]]
    sentences += [f"And {number - _STATUS_MODELS} more."] if number > _STATUS_MODELS else []
    return " ".join(sentences)


def _prove(manager: ServiceManager, *, unit: str) -> str:
    # Not "Start": polkit sees the same verb for StartTransientUnit, and a transient unit could run anything as root.
    return manager.enqueue("Restart", unit)


def boottime() -> float:
    """Return CLOCK_BOOTTIME: seconds since boot, with those of suspend. Nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> int:
    """ExecStart= of gpusvc-watchdog.service."""

    def report(error: ConfigError) -> None:
        log(4, str(error))

    def connect() -> ServiceManager:
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  a machine without models needs no bus

        return Manager()

    paths = Paths.here()
    watched = Watched(paths, report)
    observer = Observer(paths, watched, Meter(), now=boottime, wall=time.time)
    Watchdog(paths, watched, observer, connect, Notifier(), now=boottime).run()
    return 0
