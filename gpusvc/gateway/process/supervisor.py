"""Several processes that do the same work on the same sockets, and the one that keeps them going.

They share nothing but what the kernel holds for them. The supervisor starts one again that ended, kills one that hangs,
and takes all with it when it ends, however it ends. What they work on it does not know.
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

# A worker says each second that it is there.
_HUNG_SECONDS = 20.0
_LOOK_SECONDS = 1.0

# Whoever was well for so long failed by chance.
_STEADY_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

# Over what a worker takes to end by itself.
_GRACE_SECONDS = 5.0

# Blocked but when they are waited for. A worker sends SIGUSR1 when it is ready.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1}

_PR_SET_PDEATHSIG = 1


class Superior(Protocol):
    """Whom a process that serves reports to: systemd, or the supervisor of workers."""

    def ready(self) -> None:
        """It takes connections."""

    def alive(self) -> None:
        """It does not hang; said each second."""

    def reloading(self) -> None:
        """It was asked to read its files again; ready() is said when that is done."""

    def stopping(self, seconds: float) -> None:
        """It takes no more connections, and ends in so many seconds at the latest."""


@dataclass(slots=True)
class _Slot:
    """One worker's place; whoever comes next in it takes over its number."""

    number: int
    pid: int | None = None
    began_seconds: float = 0.0
    is_ready: bool = False
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))


class Supervisor:
    """The supervisor. It runs no event loop and no thread, so that it can fork at any time."""

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
            count: of processes.
            work: what each of them does until SIGTERM: takes its number, from 0 on, and whom to report to; returns its
                exit status.
            notifier: the line to systemd.
            where: at what they work, for `systemctl status`.
            drain_seconds: how long they may take to end, asked when they are to.
        """
        self._work = work
        self._notifier = notifier
        self._where = where
        self._drain_seconds = drain_seconds
        self._slots = [_Slot(number) for number in range(count)]
        # Shared with all of them: when each was last heard of; below 0 until it is ready.
        self._beats = memoryview(mmap.mmap(-1, 8 * count)).cast("d")
        self._is_told_ready = False
        self._told = ""

    def run(self) -> int:
        """Until SIGTERM or SIGINT; SIGHUP is passed on. The exit status."""
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
            # Nothing of a worker outlives the supervisor: the next one has workers of its own.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # Ctrl-C reaches the whole group of processes; the supervisor passes it on as SIGTERM.
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
        """See who has ended. The status to end with: of a worker that could not even begin, while none ever did."""
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
        """Start who is missing, and end who hangs."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.pid is None:
                if slot.backoff.is_due(now):
                    self._start(slot)
            elif now - abs(self._beats[slot.number]) > _HUNG_SECONDS:
                log(3, f"Worker {slot.number + 1} hangs, and is killed.")
                os.kill(slot.pid, signal.SIGKILL)
                self._beats[slot.number] = -now  # once

    def _tell(self) -> None:
        """Let systemd know that all is well, and what is not."""
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
        """Until the next look; signals come before it."""
        return _FIRST_PAUSE_SECONDS if any(slot.pid is None for slot in self._slots) else _LOOK_SECONDS

    def _reload(self) -> None:
        """Have the workers read their files again. Those that are not ready yet are about to do that anyway."""
        if self._is_told_ready:
            self._notifier.reloading()
        for slot in self._slots:
            if slot.pid is not None and slot.is_ready:
                os.kill(slot.pid, signal.SIGHUP)
        if self._is_told_ready:
            self._notifier.ready(self._told)

    def _end(self, status: int) -> int:
        """Have all of them end, those that do not when their time is over included; then ``status``."""
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
                deadline = 0.0  # asked twice
            left = {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0}
        return status


class _Line:
    """A worker's side: what it reports to the supervisor."""

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
        """It was the supervisor who said so."""

    def stopping(self, seconds: float) -> None:
        """Likewise."""


def _kill(pids: Iterable[int], number: signal.Signals) -> None:
    """Children that nobody waited for yet, so that no number can be another process by now."""
    for pid in pids:
        os.kill(pid, number)
