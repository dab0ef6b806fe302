"""Relay an engine's output to the journal, under the name of its service.

journald assigns each line to the unit of the process that wrote it: for an engine, its scope. But users expect the
engine's lines in `systemctl status model@qwen` and `journalctl -u model@qwen`. So a process in the control group of the
service writes them. It does not depend on the launcher, and ends with the last process of the engine. It leaves lines
out where an engine writes too many: journald's limit is for all lines of the unit, gpusvc's own among them.

The process is forked from the launcher before the launcher opens anything. A child shares the launcher's memory, and so
costs far less than a program of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import NoReturn, Self

from gpusvc.journal.throttle import Throttle

_SOCKET = "/run/systemd/journal/stdout"

# As in the list of processes (proc_pid_comm(5)); 15 characters at most.
COMMAND = "gpusvc-relay"

_CHUNK_BYTES = 65536

# After this time without output, the end of the text that was left out is recorded.
_SILENCE_SECONDS = 1.0

# journald is back within moments of a restart. The engine's output waits in its pipe meanwhile.
_PAUSE_SECONDS = 0.1


class Relay:
    """The relay, on the launcher's side."""

    def __init__(self, pid: int, order_fd: int) -> None:
        self.pid = pid
        self._order_fd = order_fd

    @classmethod
    def fork(cls, output_fd: int) -> Self:
        """Fork a process that waits for start(), and ends by itself if this process ends. It takes over ``output_fd``.

        Raises:
            OSError: the machine lacks processes or memory.
        """
        order_read, order_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become_relay(output_fd, order_read)
        os.close(order_read)
        os.close(output_fd)
        return cls(pid, order_write)

    def start(self, identifier: str) -> None:
        """Have the output recorded with ``identifier`` as its SYSLOG_IDENTIFIER=."""
        order_fd, self._order_fd = self._order_fd, -1
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; the engine runs without
            os.write(order_fd, identifier.replace("\n", " ").encode(errors="replace"))
        os.close(order_fd)

    def abandon(self) -> None:
        """End the process, unless it was started."""
        if self._order_fd >= 0:
            os.close(self._order_fd)
            os.waitpid(self.pid, 0)

    def has_ended(self, timeout_seconds: float) -> bool:
        """Wait until the relay has ended, so that every line that it got is journald's.

        It ends with the last process of the engine. Return False if it runs on when the time is over.
        """
        return has_ended(self.pid, timeout_seconds)


def has_ended(pid: int, timeout_seconds: float) -> bool:
    """Wait until the process ``pid`` has ended. Return False if it runs on when the time is over."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))
    finally:
        os.close(pidfd)


def _become_relay(output_fd: int, order_fd: int) -> NoReturn:
    """The child's side. No exception and no return may lead back into the launcher's code."""
    try:
        os.setsid()
        # Above all the launcher's end of the engine's pipe, whose end tells the parked process of the launcher's end.
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  only numbers
            if int(name) > 2 and int(name) not in (output_fd, order_fd):
                with contextlib.suppress(OSError):  # the descriptor that listed the directory is closed already
                    os.close(int(name))
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # noqa: PTH123
            comm.write(COMMAND)
        with os.fdopen(order_fd) as pipe:
            identifier = pipe.read()
        if identifier:
            carry(output_fd, identifier)
    finally:
        os._exit(0)


def carry(output_fd: int, identifier: str) -> None:
    """Carry everything from ``output_fd`` to the journal, until its last writer has closed it."""
    stream = _Stream(identifier)
    throttle = Throttle(time.monotonic())
    poll = select.poll()
    poll.register(output_fd, select.POLLIN)
    while True:
        if not poll.poll(_SILENCE_SECONDS * 1000 if throttle.is_dropping else None):
            stream.write(throttle.flush())
            continue
        data = os.read(output_fd, _CHUNK_BYTES)
        if not data:
            stream.write(throttle.flush())
            return
        stream.write(throttle.feed(data, time.monotonic()))


class _Stream:
    """A stream to journald, as systemd-cat(1) opens one; opened again if journald closed it."""

    def __init__(self, identifier: str) -> None:
        # Identifier, unit, priority, whether lines have a prefix such as <3>, forwarding to syslog, kernel and console.
        self._head = f"{identifier}\n\n6\n1\n0\n0\n0\n".encode()
        self._socket: socket.socket | None = None

    def write(self, data: bytes) -> None:
        while data:
            try:
                if self._socket is None:
                    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    self._socket.connect(_SOCKET)
                    self._socket.sendall(self._head)
                self._socket.sendall(data)
            except OSError:
                if self._socket is not None:
                    self._socket.close()
                self._socket = None
                time.sleep(_PAUSE_SECONDS)
            else:
                return
