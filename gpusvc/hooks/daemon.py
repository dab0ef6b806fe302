"""Runs what is in /etc/gpusvc/hooks.d for each event of the journal (gpusvc-hooks(7)); nothing of gpusvc waits for it.

One event after the other, in the order of the journal; the hooks of one event side by side. Its place in the journal is
written down before an event's hooks begin: whatever ends this process, none runs twice, and what waited is not lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import stat
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpusvc.errors import GpusvcError
from gpusvc.journal import eventlog
from gpusvc.journal.eventlog import Event
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.systemd.notify import Notifier

# How long a hook may take, and then how long after SIGTERM it may take to end.
LIMIT_SECONDS = 10.0
_GRACE_SECONDS = 2.0

_AT_A_TIME = 4

# Events that wait. Where hooks are that slow, news of an hour ago is worth less than that of now.
QUEUE_LENGTH = 256

_READ_BYTES = 1 << 16

# As run-parts(8) and systemd have it: what editors and package managers leave behind is no hook.
_HOOK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LEFT_BEHIND = re.compile(r".*\.(dpkg-[a-z]+|ucf-[a-z]+|rpm[a-z]+|bak|old|orig|rej|swp|tmp|disabled)")

# What systemd told this process is not for its hooks.
_NOT_FOR_HOOKS = re.compile(r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|STATE_DIRECTORY|MAINPID")


def hooks_directory(paths: Paths) -> Path:
    return paths.config / "hooks.d"


def cursor_file(paths: Paths) -> Path:
    return paths.state / "hooks" / "cursor"


@dataclass(slots=True)
class _Run:
    """A hook at work. It is the leader of a session and a group of its own."""

    path: Path
    event: Event
    child: subprocess.Popen[bytes]
    pidfd: int
    deadline: float
    """When the next of these signals is due; monotonic."""
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        # Its leader is not reaped yet, so that the number is still this group's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def ended(self, timeout_seconds: float) -> bool:
        """Whether its leader ends within that time."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_seconds) * 1000))


class HookDaemon:
    """Follows the journal until it is told to stop.

    Args:
        paths: where the hooks are, and the cursor.
        notifier: told what is going on.
        limit_seconds: how long one hook may take.
        queue_length: how many events may wait; beyond that the oldest is dropped.
    """

    def __init__(
        self,
        paths: Paths,
        notifier: Notifier,
        *,
        limit_seconds: float = LIMIT_SECONDS,
        queue_length: int = QUEUE_LENGTH,
    ) -> None:
        self._paths = paths
        self._notifier = notifier
        self._limit_seconds = limit_seconds
        self._queue_length = queue_length
        self._queue: deque[Event] = deque()
        self._dropped = 0
        self._event: Event | None = None
        self._waiting: deque[Path] = deque()
        self._running: dict[int, _Run] = {}
        self._warned: set[tuple[str, int]] = set()
        self._poll = select.poll()

    def run(self) -> int:
        """The exit status: 0 if it was told to stop, 1 if journalctl ended.

        Raises:
            GpusvcError: the journal cannot be read.
        """
        with _signals(signal.SIGTERM, signal.SIGINT) as wakeup:
            cursor = self._cursor()
            # --cursor with the entry itself, which is skipped below: older journalctls skip one too many after a
            # cursor that is no event's.
            where = [f"--cursor={cursor}"] if cursor else []
            with eventlog.opened(eventlog.command("--follow", "--no-tail", *where)) as journalctl:
                self._notifier.ready("Waiting for events.")
                try:
                    return self._follow(journalctl, cursor, wakeup)
                finally:
                    self._notifier.stopping()
                    self._end_all()

    def _cursor(self) -> str | None:
        """Where to go on: after the last event that was taken on, or at the end of the journal."""
        file = cursor_file(self._paths)
        try:
            cursor = file.read_text().strip()
        except OSError:
            cursor = ""
        if eventlog.is_cursor(cursor):
            return cursor
        if cursor:
            log(4, f"{file} holds no cursor: only new events are seen.")
        newest = eventlog.newest_cursor()
        if newest is not None:
            self._keep(newest)
        return newest

    def _keep(self, cursor: str) -> None:
        file = cursor_file(self._paths)
        draft = file.with_suffix(".new")
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_text(cursor + "\n")
            draft.replace(file)
        except OSError as error:
            log(4, f"{file}: {error.strerror}; after a restart, hooks may run again for events that they have seen.")

    def _follow(self, journalctl: subprocess.Popen[bytes], cursor: str | None, wakeup: int) -> int:
        output = eventlog.output_of(journalctl).fileno()
        self._poll.register(output, select.POLLIN)
        self._poll.register(wakeup, select.POLLIN)
        rest = b""
        followed = True
        while followed or self._event is not None:
            for descriptor, _ in self._poll.poll(self._pause_milliseconds()):
                if descriptor == wakeup:
                    return 0
                if descriptor == output:
                    chunk = os.read(output, _READ_BYTES)
                    *lines, rest = (rest + chunk).split(b"\n")
                    for event in filter(None, map(eventlog.parse, lines)):
                        if event.cursor != cursor:
                            self._put(event)
                    if not chunk:
                        self._poll.unregister(output)
                        followed = False
                else:
                    self._reap(self._forget(descriptor))
            self._end_overdue()
            self._begin(new=followed)
        log(3, f"journalctl ended with exit status {journalctl.wait()}: there is nothing to follow.")
        return 1

    def _put(self, event: Event) -> None:
        if len(self._queue) >= self._queue_length:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(event)

    def _begin(self, *, new: bool) -> None:
        """Begin what can begin now, with the next event if ``new``."""
        while True:
            while self._waiting and len(self._running) < _AT_A_TIME:
                self._spawn(self._waiting.popleft())
            if self._running:
                return
            if self._event is not None:
                self._event = None
                self._notifier.status("Waiting for events.")
            if not (new and self._queue):
                return
            self._take(self._queue.popleft())

    def _take(self, event: Event) -> None:
        if self._dropped:
            log(4, f"Hooks are too slow: the oldest {self._dropped} of the events that waited were dropped.")
            self._dropped = 0
        self._keep(event.cursor)
        self._event = event
        self._waiting.extend(self._hooks())
        if self._waiting:
            names = ", ".join(hook.name for hook in self._waiting)
            self._notifier.status(f"Running hooks for {event}: {names}.")

    def _hooks(self) -> Iterator[Path]:
        """Those that are there now, in the order of their names."""
        directory = hooks_directory(self._paths)
        try:
            if not self._is_safe(directory, directory.stat()):
                return
            files = sorted(directory.iterdir())
        except OSError:
            return
        for file in files:
            if not is_hook_name(file.name):
                continue
            try:
                status = file.stat()
            except OSError:
                continue
            is_program = stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)
            if is_program and self._is_safe(file, status):
                yield file

    def _is_safe(self, path: Path, status: os.stat_result) -> bool:
        """Whether nobody else than root can say what runs here; a warning, once, if somebody can."""
        if status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return True
        version = (str(path), status.st_ctime_ns)
        if version not in self._warned:
            self._warned.add(version)
            log(4, f"{path} is passed over: it must belong to root, and nobody else may write to it.")
        return False

    def _spawn(self, hook: Path) -> None:
        event = self._event
        assert event is not None  # noqa: S101
        try:
            child = subprocess.Popen(  # noqa: S603
                [str(hook)],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=environment(os.environ, event),
                start_new_session=True,
            )
        except OSError as error:
            log(4, f"{hook.name} cannot be run for {event}: {error.strerror}.")
            return
        pidfd = os.pidfd_open(child.pid)
        self._running[pidfd] = _Run(hook, event, child, pidfd, time.monotonic() + self._limit_seconds)
        self._poll.register(pidfd, select.POLLIN)

    def _forget(self, pidfd: int) -> _Run:
        self._poll.unregister(pidfd)
        return self._running.pop(pidfd)

    def _reap(self, run: _Run) -> None:
        """A hook has ended; what it left in its group ends too."""
        run.signal(signal.SIGKILL)
        status = run.child.wait()
        os.close(run.pidfd)
        if status and len(run.signals) == 2:  # otherwise it has been told already why it ended
            manner = f"exit status {status}" if status > 0 else f"signal {-status}"
            log(4, f"{run.path.name} failed for {run.event}: {manner}.")

    def _abandon(self, run: _Run) -> None:
        """It hangs in the kernel, perhaps in the GPU's driver, where even SIGKILL does nothing."""
        log(4, f"{run.path.name} survives SIGKILL; nothing waits for it any more.")
        os.close(run.pidfd)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for run in [run for run in self._running.values() if now >= run.deadline]:
            if not run.signals:
                self._abandon(self._forget(run.pidfd))
                continue
            number, *left = run.signals
            if number is signal.SIGTERM:
                log(4, f"{run.path.name} took longer than {self._limit_seconds:g} s for {run.event}, and is ended.")
            run.signal(number)
            run.signals = tuple(left)
            run.deadline = now + _GRACE_SECONDS

    def _pause_milliseconds(self) -> float | None:
        if not self._running:
            return None
        return max(0.0, min(run.deadline for run in self._running.values()) - time.monotonic()) * 1000

    def _end_all(self) -> None:
        """SIGTERM, and after a grace SIGKILL, for all hooks and whatever is in their groups."""
        for run in self._running.values():
            log(5, f"{run.path.name} is ended in the middle of {run.event}: the service stops.")
            run.signal(signal.SIGTERM)
            run.signals = ()
        deadline = time.monotonic() + _GRACE_SECONDS
        for run in [*self._running.values()]:
            if not run.ended(deadline - time.monotonic()):
                run.signal(signal.SIGKILL)
            end = self._reap if run.ended(_GRACE_SECONDS) else self._abandon
            end(self._forget(run.pidfd))


def is_hook_name(name: str) -> bool:
    """Whether a file of that name is meant to be run: no hidden file, no backup, nothing of a package manager."""
    return _HOOK_NAME.fullmatch(name) is not None and _LEFT_BEHIND.fullmatch(name) is None


def environment(inherited: Mapping[str, str], event: Event) -> dict[str, str]:
    """What a hook is told; what the event does not tell is there, and empty."""
    told = {
        "GPUSVC_EVENT": event.kind,
        "GPUSVC_MODEL": event.model or "",
        "GPUSVC_GPU": ",".join(map(str, event.gpus)),
        "GPUSVC_BYTES": "" if event.bytes is None else str(event.bytes),
        "GPUSVC_REASON": event.reason or "",
        "GPUSVC_MESSAGE": event.message,
        "GPUSVC_PRIORITY": str(event.level),
        "GPUSVC_TIME": f"{event.seconds:.6f}",
    }
    kept = {name: value for name, value in inherited.items() if not _NOT_FOR_HOOKS.fullmatch(name)}
    return kept | {name: value.replace("\0", "�") for name, value in told.items()}


@contextlib.contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[int]:
    """A descriptor that is readable once one of these has come; they do nothing else."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def main() -> int:
    """ExecStart= of gpusvc-hooks.service."""
    try:
        return HookDaemon(Paths.here(), Notifier()).run()
    except GpusvcError as error:
        log(3, str(error))
        return error.exit_code
