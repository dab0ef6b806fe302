"""The launcher while the engine serves: health checks, systemd's watchdog, and the lease."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.journal.events import EventType
from gpusvc.launcher import readiness, watching
from gpusvc.launcher.sampling import Sampler
from gpusvc.log import log
from gpusvc.quantity import format_duration
from gpusvc.record import replace
from gpusvc.state import lease as leases
from gpusvc.state import readiness as ready_since
from gpusvc.state import use
from gpusvc.systemd.notify import ROPE_SECONDS

if TYPE_CHECKING:
    from gpusvc.launcher.run import Run
    from gpusvc.linux.cgroup import Cgroup
    from gpusvc.linux.sockets import Listener

_CHECK_SECONDS = 10.0
_ANSWER_SECONDS = 5.0

# The least time by which systemd waits longer for the launcher than the launcher waits for the engine.
_GRACE_SECONDS = 2.0


def advise(run: Run) -> None:
    """Write to the log what a person should know of the model's file, once the model is ready."""
    from gpusvc.config.advice import advice  # noqa: PLC0415  not before the model is ready

    for each in advice(run.paths, run.host, run.config):
        log(4, f"{each.file}: {each.message} {each.hint or ''}".rstrip())


class Supervision:
    """One engine that serves. ``where`` is None for a program of `gpusvc run`, which has no port to check."""

    def __init__(self, run: Run, cgroup: Cgroup, pidfd: int, where: Listener | None) -> None:
        self._run = run
        self._cgroup = cgroup
        self._pidfd = pidfd
        self._where = where
        self._sampler = Sampler(run, cgroup)
        timeout = run.config.health_timeout_seconds
        self._every_seconds = min(_CHECK_SECONDS, timeout / 4 or _CHECK_SECONDS)
        self._last_answer = time.monotonic()
        self._is_given_up = False

    def serve(self) -> None:
        """Tell systemd and the lease that the model is ready, and return when the engine has ended."""
        self._announce()
        while not self._is_over():
            self._check()
            self._sampler.sample()
            self._sampler.write()
        leases.withdraw(self._run.paths, self._run.lease)
        self._run.notifier.stopping()  # the processes that the engine leaves may take longer than the watchdog waits

    def _announce(self) -> None:
        run = self._run
        run.lease = replace(run.lease, ready=True)
        if self._where is not None:
            where = self._where
            run.lease = replace(run.lease, address=where.reachable_at, socket_cgroup_id=where.cgroup_id)
        self._sampler.sample()
        run.write_lease()
        use.touch(run.paths, run.name)
        ready_since.mark(run.paths, run.name)
        if self._where is not None and not self._where.is_loopback:
            from gpusvc.launcher import reach  # noqa: PLC0415  few engines listen there

            reach.let_gateway_reach(self._where.reachable_at)
        timeout = run.config.health_timeout_seconds
        # The launcher itself ends an engine that does not answer in time. systemd ends a launcher that does not.
        grace = max(2 * self._every_seconds, _GRACE_SECONDS)
        run.notifier.set_watchdog(timeout + grace if timeout else 0)
        sentence = run.ready_sentence()
        run.notifier.ready(sentence)
        run.emit(EventType.READY, f"Ready after {time.monotonic() - run.began_seconds:.2f} s. {sentence}")
        if self._where is not None:
            advise(run)
        self._last_answer = time.monotonic()

    def _check(self) -> None:
        """Ask the health path, and feed systemd's watchdog if it answers.

        Raises:
            EngineError: a process outside the control group may receive the engine's requests.
        """
        run = self._run
        if self._where is not None:
            readiness.settled_listener(self._cgroup, run.lease.port, run.user, self._pidfd)
        status = None
        if self._where is not None:
            status = readiness.ask(
                self._where, run.config.health, min(_ANSWER_SECONDS, self._every_seconds), key=run.upstream_key
            )
        if self._where is None or readiness.is_well(status):
            self._feed(run.ready_sentence())
        elif self._cgroup.frozen():  # the administrator froze it, so it does not hang
            self._feed(f"Frozen: `systemctl thaw {run.lease.scope}` lets it go on.")
        else:
            self._wait_for_health(status)

    def _wait_for_health(self, status: int | None) -> None:
        """Say since when the health path answers ``status`` or nothing; after health_timeout, end the engine."""
        run, silent = self._run, time.monotonic() - self._last_answer
        what = "not answered" if status is None else f"answered HTTP {status}"
        sentence = f"{run.config.health or 'The port'} has {what} for {format_duration(round(silent))}"
        run.notifier.status(f"{sentence}.")
        if 0 < run.config.health_timeout_seconds <= silent and not self._is_given_up:
            self._is_given_up = True
            run.emit(
                EventType.FAIL,
                f"{sentence}: the engine is ended, and systemd restarts it.",
                level=3,
                reason="health_timeout",
            )
            run.notifier.trigger_watchdog()

    def _feed(self, sentence: str) -> None:
        self._last_answer = time.monotonic()
        self._run.notifier.feed_watchdog()
        self._run.notifier.status(sentence)

    def _is_over(self) -> bool:
        """Wait until the next check is due; whether the engine ended. A program is stopped when its caller is gone."""
        caller, timeout = self._run.caller, self._run.config.health_timeout_seconds
        if caller is None:
            due = self._last_answer + timeout - time.monotonic() if timeout and not self._is_given_up else 0.0
            return watching.ended(self._pidfd, min(self._every_seconds, due) if due > 0 else self._every_seconds)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(caller, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._every_seconds * 1000)}
        if caller.fileno() not in ready or self._pidfd in ready:
            return self._pidfd in ready
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  only where a program outlives its caller

        log(4, "The caller of this program is gone, so the program is stopped.")
        with Manager() as manager:
            manager.enqueue("Stop", names.service(self._run.name))
        return watching.ended(self._pidfd, ROPE_SECONDS)  # systemd's SIGTERM comes first
