"""A reader process, seen by its caller: how it is started, asked, and ended."""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from typing import Any

from gpusvc.gpu.reader import ANSWERS_FD, REQUESTS_FD, STEPS_FD, Pipes, become_reader, pack, unpack


class ReaderProcess:
    """One reader. It ends when its caller ends, or end() is called, unless it hangs in the driver."""

    def __init__(self, pid: int, requests_fd: int, answers_fd: int, steps_fd: int) -> None:
        self.pid = pid
        self.step: int | None = None
        """What the reader was at when has_moved() was called last: the index of a GPU, or reader.LIBRARY."""
        self.steps: set[int] = set()
        """What it was at so far. The caller may clear it."""
        self._requests_fd = requests_fd
        self._answers_fd = answers_fd
        self._steps_fd = steps_fd
        self._message = bytearray()
        self._ended = False

    def send(self, request: Any) -> None:
        """Raises BrokenPipeError if the reader has ended."""
        os.write(self._requests_fd, pack(request))

    def receive(self, timeout_seconds: float, *, or_step: bool = False) -> Any:
        """Return an answer; None if there is none in time, or if ``or_step`` and the reader begins another step.

        Raises:
            EOFError: the reader has ended.
        """
        poll = select.poll()
        poll.register(self._answers_fd, select.POLLIN)
        if or_step:
            poll.register(self._steps_fd, select.POLLIN)
        while ready := dict(poll.poll(timeout_seconds * 1000)):
            if self._answers_fd not in ready:
                return None
            piece = os.read(self._answers_fd, 1 << 18)
            if not piece:
                raise EOFError
            self._message += piece
            answer = unpack(self._message)
            if answer is not None:
                self._message.clear()
                return answer
        return None

    def has_moved(self) -> bool:
        """Return whether it has begun a step since the last call."""
        try:
            steps = os.read(self._steps_fd, 65536)
        except BlockingIOError:
            return False
        if steps:
            self.step = steps[-1]
            self.steps.update(steps)
        return bool(steps)

    def end(self) -> None:
        """Kill it, without waiting: a process that hangs in the driver may never end."""
        if self._requests_fd >= 0:
            for fd in (self._requests_fd, self._answers_fd, self._steps_fd):
                os.close(fd)
            self._requests_fd = -1
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            _left.append(self)
        reap()

    def has_ended(self) -> bool:
        """Return whether it has ended; it is reaped then."""
        if not self._ended:
            try:
                self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:
                self._ended = True
        return self._ended


# Readers that were killed, and not reaped yet.
_left: list[ReaderProcess] = []


def reap() -> None:
    """Reap the readers that have ended since they were killed."""
    _left[:] = [reader for reader in _left if not reader.has_ended()]


def fork() -> ReaderProcess:
    """Start a reader as a copy of this process: it costs a millisecond. For processes with one thread."""
    reap()
    theirs, ours = _pipes()
    pid = os.fork()
    if pid == 0:
        become_reader(theirs)
    return _started(pid, theirs, ours)


def execute() -> ReaderProcess:
    """Start a reader as a program of its own: it is safe for processes with threads, and shares no memory with them."""
    reap()
    theirs, ours = _pipes()
    isolated = ["-I"] if sys.flags.isolated else []
    # First to places above all of theirs, as one of the pipes may stand at the place of another.
    places = ((theirs.requests, REQUESTS_FD), (theirs.answers, ANSWERS_FD), (theirs.steps, STEPS_FD))
    actions: list[Any] = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, 100 + place) for fd, place in places]
    actions += [(os.POSIX_SPAWN_DUP2, 100 + place, place) for _, place in places]
    actions += [(os.POSIX_SPAWN_CLOSE, 100 + place) for _, place in places]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *isolated, "-m", "gpusvc.gpu.reader"],
        os.environ,
        file_actions=actions,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP),
    )
    return _started(pid, theirs, ours)


def _pipes() -> tuple[Pipes, Pipes]:
    """Return the reader's and the caller's ends."""
    (requests_read, requests_write), (answers_read, answers_write), (steps_read, steps_write) = (
        os.pipe(),
        os.pipe(),
        os.pipe(),
    )
    os.set_blocking(steps_read, False)
    os.set_blocking(steps_write, False)
    return Pipes(requests_read, answers_write, steps_write), Pipes(requests_write, answers_read, steps_read)


def _started(pid: int, theirs: Pipes, ours: Pipes) -> ReaderProcess:
    for fd in (theirs.requests, theirs.answers, theirs.steps):
        os.close(fd)
    return ReaderProcess(pid, ours.requests, ours.answers, ours.steps)
