"""gpusvc-hooks.service: runs the programs of /etc/gpusvc/hooks.d for each event in the journal (gpusvc-hooks(7)).

Events come one after the other, in the order of the journal; the hooks of one event run at the same time. The daemon
records an event's cursor before it begins the event's hooks: however the daemon ends, no hook runs twice for an event,
and no event that waited is lost. No other process of gpusvc waits for hooks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from gpusvc.errors import GpusvcError, SystemdError, UnansweredError
from gpusvc.hooks import cursor
from gpusvc.hooks.directory import HookDirectory
from gpusvc.hooks.runner import Outcome, UnitRunner
from gpusvc.journal import eventlog, journalctl
from gpusvc.journal.eventlog import Event
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.systemd.notify import Notifier

# How long a hook may take.
LIMIT_SECONDS = 10.0

_AT_A_TIME = 4

# Events that wait. If hooks are slower than events come, new events are worth more than old ones.
QUEUE_LENGTH = 256

_READ_BYTES = 1 << 16


class Runner(Protocol):
    """Runs hooks; UnitRunner describes the methods."""

    def fileno(self) -> int: ...

    def __len__(self) -> int: ...

    def start(self, hook: Path, event: Event) -> None: ...

    def pause_seconds(self) -> float | None: ...

    def ended(self) -> Iterator[Outcome]: ...

    def end_all(self) -> list[Outcome]: ...


class HookDaemon:
    """Follows the journal until it is told to stop.

    Args:
        paths: where the hooks are, and the cursor.
        notifier: reports to systemd.
        runner: runs the hooks.
        queue_length: how many events may wait. If more come, the oldest is dropped.
    """

    def __init__(self, paths: Paths, notifier: Notifier, runner: Runner, *, queue_length: int = QUEUE_LENGTH) -> None:
        self._paths = paths
        self._notifier = notifier
        self._runner = runner
        self._directory = HookDirectory(paths)
        self._queue_length = queue_length
        self._queue: deque[Event] = deque()
        self._dropped = 0
        self._event: Event | None = None
        self._waiting: deque[Path] = deque()
        self._poll = select.poll()

    def run(self) -> int:
        """Run until SIGTERM or SIGINT. Return the exit status: 0, or 1 if journalctl ended.

        Raises:
            GpusvcError: the journal cannot be read, or the service manager does not answer.
        """
        with _signals(signal.SIGTERM, signal.SIGINT) as wakeup:
            last = cursor.restore(self._paths)
            # --cursor includes the entry itself, which is skipped below: --after-cursor of older journalctls skips one
            # entry too many if the cursor is not an event's.
            where = [f"--cursor={last}"] if last else []
            command = eventlog.command("--follow", "--no-tail", *where)
            with journalctl.opened(command) as reader:
                self._notifier.ready("Waiting for events.")
                try:
                    return self._follow(reader, last, wakeup)
                finally:
                    self._notifier.stopping()
                    self._end_all()

    def _follow(self, reader: subprocess.Popen[bytes], last: str | None, wakeup: int) -> int:
        output = journalctl.output_of(reader).fileno()
        for descriptor in (output, wakeup, self._runner.fileno()):
            self._poll.register(descriptor, select.POLLIN)
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
                        if event.cursor != last:
                            self._put(event)
                    if not chunk:
                        self._poll.unregister(output)
                        followed = False
            self._reap()
            self._begin(new=followed)
            self._reap()  # a call to the service manager may have read the message that a hook ended
            self._begin(new=followed)
        log(3, f"journalctl ended with exit status {reader.wait()}: there is nothing to follow.")
        return 1

    def _put(self, event: Event) -> None:
        if len(self._queue) >= self._queue_length:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(event)

    def _begin(self, *, new: bool) -> None:
        """Begin hooks as far as possible; those of the next event too if ``new``."""
        while True:
            while self._waiting and len(self._runner) < _AT_A_TIME:
                self._start(self._waiting.popleft())
            if len(self._runner):
                return
            if self._event is not None:
                self._event = None
                self._notifier.status("Waiting for events.")
            if not (new and self._queue):
                return
            self._take(self._queue.popleft())

    def _start(self, hook: Path) -> None:
        event = self._event
        assert event is not None  # noqa: S101
        try:
            self._runner.start(hook, event)
        except UnansweredError:
            raise  # the service is restarted, and goes on with the next event
        except SystemdError as error:
            log(4, f"{hook.name} cannot be run for {event}: {error.message}")

    def _take(self, event: Event) -> None:
        if self._dropped:
            log(4, f"Hooks are too slow: the oldest {self._dropped} of the events that waited were dropped.")
            self._dropped = 0
        cursor.keep(self._paths, event.cursor)
        self._event = event
        self._waiting.extend(self._directory.hooks())
        if self._waiting:
            names = ", ".join(hook.name for hook in self._waiting)
            self._notifier.status(f"Running hooks for {event}: {names}.")

    def _reap(self) -> None:
        for outcome in self._runner.ended():
            if outcome.problem is not None:
                log(4, f"{outcome.problem}.")

    def _pause_milliseconds(self) -> float | None:
        pause = self._runner.pause_seconds()
        return None if pause is None else pause * 1000

    def _end_all(self) -> None:
        for outcome in self._runner.end_all():
            log(5, f"{outcome.problem}.")


@contextlib.contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[int]:
    """Yield a descriptor that is readable after one of these signals. The signals do nothing else."""
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
        with contextlib.closing(UnitRunner(LIMIT_SECONDS)) as runner:
            return HookDaemon(Paths.here(), Notifier(), runner).run()
    except GpusvcError as error:
        log(3, str(error))
        return error.exit_code
