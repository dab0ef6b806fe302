"""Several worker processes that do the same work on the same sockets, and the supervisor that keeps them running.

Workers share only what the kernel holds for them. The supervisor restarts a worker that ended and kills one that hangs.
When the supervisor ends, however it ends, all workers end. It does not depend on what the workers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from gpusvc.backoff import Backoff
from gpusvc.log import log
from gpusvc.systemd.notify import Notifier

# Workers report once a second that they are alive.
_HUNG_SECONDS = 20.0
_LOOK_SECONDS = 1.0

# A worker that ran for so long is restarted without delay.
_STEADY_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

# Added to the time that workers may take to end by themselves.
_GRACE_SECONDS = 5.0

# Blocked, except while the supervisor waits for them. A worker sends SIGUSR1 when it is ready.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1}

_PR_SET_PDEATHSIG = 1


class Superior(Protocol):
    """What a serving process reports to: systemd, or the supervisor of workers."""

    def ready(self) -> None:
        """Report that this process accepts connections."""

    def alive(self) -> None:
        """Report that this process does not hang. Called every second."""

    def reloading(self) -> None:
        """Report that this process reads its files again; ready() follows when that is done."""

    def stopping(self, seconds: float) -> None:
        """Report that this process accepts no more connections and ends within ``seconds``."""


@dataclass(slots=True)
class _Slot:
    """The place of one worker. A worker that replaces it gets the same number."""

    number: int
    pid: int | None = None
    began_seconds: float = 0.0
    is_ready: bool = False
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))


class Supervisor:
    """Runs and watches the workers. It has no event loop and no threads, so that it can fork at any time."""

    def __init__(
        self,
        count: int,
        work: Callable[[int, Superior], int],
        notifier: Notifier,
        where: str,
        *,
        drain_seconds: Callable[[], float],
    ) -> None:
        """
        Args:
            count: the number of workers.
            work: runs in each worker until SIGTERM. It gets the worker's number, from 0 on, and what to report to. It
                returns the exit status.
            notifier: reports to systemd.
            where: the addresses that the workers serve, for `systemctl status`.
            drain_seconds: returns how long workers may take to end. Called when they are told to end.
        """
        self._work = work
        self._notifier = notifier
        self._where = where
        self._drain_seconds = drain_seconds
        self._slots = [_Slot(number) for number in range(count)]
        # Shared with the workers: the monotonic time of each worker's last report, negative until the worker is ready.
        self._beats = memoryview(mmap.mmap(-1, 8 * count)).cast("d")
        self._is_told_ready = False
        self._told = ""

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, and pass SIGHUP on to the workers. Return the exit status."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            while True:
                status = self._reap()
                if status is not None:
                    return self._end(status)
                self._look_after()
                self._tell()
                received = signal.sigtimedwait(_SIGNALS, self._rest())
                number = None if received is None else received.si_signo
                if number in {signal.SIGTERM, signal.SIGINT}:
                    return self._end(0)
                if number == signal.SIGHUP:
                    self._reload()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, slot: _Slot) -> None:
        slot.began_seconds = time.monotonic()
        slot.is_ready = False
        self._beats[slot.number] = -slot.began_seconds
        supervisor = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        slot.pid = os.fork()
        if slot.pid == 0:
            self._be_worker(slot.number, supervisor)

    def _be_worker(self, number: int, supervisor: int) -> NoReturn:
        status = 1
        try:
            # No worker outlives the supervisor: the next supervisor starts workers of its own.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # Ctrl-C reaches the whole process group; the supervisor passes it on as SIGTERM.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # SIGTERM and SIGHUP stay blocked until the work has handlers for them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS - {signal.SIGTERM, signal.SIGHUP})
            if os.getppid() == supervisor:
                status = self._work(number, _Line(self._beats, number, supervisor))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> int | None:
        """Note which workers have ended.

        Return the exit status for the supervisor if a worker ended before it was ready and before systemd was told that
        all are; else None.
        """
        for slot in self._slots:
            if slot.pid is None:
                continue
            slot.is_ready = self._beats[slot.number] > 0
            pid, ended = os.waitpid(slot.pid, os.WNOHANG)
            if pid == 0:
                continue
            slot.pid = None
            status = os.waitstatus_to_exitcode(ended)
            how = f"signal {-status}" if status < 0 else f"status {status}"
            if not self._is_told_ready and not slot.is_ready:
                log(3, f"Worker {slot.number + 1} could not begin: it ended with {how}.")
                return status if status > 0 else 1
            log(4, f"Worker {slot.number + 1} ended with {how}, and is started again.")
            now = time.monotonic()
            if now - slot.began_seconds >= _STEADY_SECONDS:
                slot.backoff.reset()
            else:
                slot.backoff.postpone(now)
            slot.is_ready = False
        return None

    def _look_after(self) -> None:
        """Start workers that are missing, and kill workers that hang."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.pid is None:
                if slot.backoff.is_due(now):
                    self._start(slot)
            elif now - abs(self._beats[slot.number]) > _HUNG_SECONDS:
                log(3, f"Worker {slot.number + 1} hangs, and is killed.")
                os.kill(slot.pid, signal.SIGKILL)
                self._beats[slot.number] = -now  # so that the next look does not kill it again

    def _tell(self) -> None:
        """Tell systemd that the supervisor is alive, and which workers are missing."""
        missing = [str(slot.number + 1) for slot in self._slots if not slot.is_ready]
        sentence = f"Serving at {self._where} with {len(self._slots)} workers."
        if missing:
            sentence += f" Not there: {', '.join(missing)}."
        if not self._is_told_ready:
            if not missing:
                self._is_told_ready = True
                self._told = sentence
                self._notifier.ready(sentence)
        elif sentence != self._told:
            self._told = sentence
            self._notifier.status(sentence)
        self._notifier.feed_watchdog()

    def _rest(self) -> float:
        """Return the seconds until the next look. Signals end the wait earlier."""
        return _FIRST_PAUSE_SECONDS if any(slot.pid is None for slot in self._slots) else _LOOK_SECONDS

    def _reload(self) -> None:
        """Have the ready workers read their files again. Workers that are not ready yet will read them anyway."""
        if self._is_told_ready:
            self._notifier.reloading()
        for slot in self._slots:
            if slot.pid is not None and slot.is_ready:
                os.kill(slot.pid, signal.SIGHUP)
        if self._is_told_ready:
            self._notifier.ready(self._told)

    def _end(self, status: int) -> int:
        """End all workers, and kill those that are not done in time. Return ``status``."""
        seconds = self._drain_seconds() + _GRACE_SECONDS
        self._notifier.stopping()
        self._notifier.extend_timeout(seconds + _GRACE_SECONDS)
        deadline = time.monotonic() + seconds
        left = {slot.pid for slot in self._slots if slot.pid is not None}
        _kill(left, signal.SIGTERM)
        while left:
            rest = deadline - time.monotonic()
            if rest <= 0:
                _kill(left, signal.SIGKILL)
            received = signal.sigtimedwait(_SIGNALS, min(max(rest, 0.0), _LOOK_SECONDS))
            if received is not None and received.si_signo in {signal.SIGTERM, signal.SIGINT}:
                deadline = 0.0  # the second request to end kills at once
            left = {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0}
        return status


class _Line:
    """Reports from a worker to its supervisor."""

    def __init__(self, beats: memoryview[float], number: int, supervisor: int) -> None:
        self._beats = beats
        self._number = number
        self._supervisor = supervisor

    def ready(self) -> None:
        self.alive()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._supervisor, signal.SIGUSR1)

    def alive(self) -> None:
        self._beats[self._number] = time.monotonic()

    def reloading(self) -> None:
        """Do nothing: the supervisor itself asked for it."""

    def stopping(self, seconds: float) -> None:
        """Do nothing: the supervisor itself asked for it."""


def _kill(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to children that were not waited for yet: their PIDs cannot belong to other processes."""
    for pid in pids:
        os.kill(pid, number)
