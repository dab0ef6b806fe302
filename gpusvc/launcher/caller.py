"""The link between ``gpusvc run`` (the caller) and the program that it runs: standard files, environment, end.

The caller listens on a socket as long as it runs. The launcher holds one connection to it, and ends the program when
this connection ends. The process that becomes the program opens a second connection, and receives the standard files
and the environment that a child of the caller would have inherited.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from gpusvc.errors import EngineError

_PRESENCE = b"P"
_LOAN = b"L"
_STANDARD_FILES = (0, 1, 2)
_PIECE = 65536

# For connect(2) and for each message. The caller accepts connections as soon as it can.
_TIMEOUT_SECONDS = 10.0


class Caller:
    """The caller's side: serves both connections from one poll loop. ``fds()`` are the descriptors to poll."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = json.dumps(dict(environment)).encode()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # Only the caller's user and root may connect and get the standard files.
        umask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(umask)
        self._listener.listen()
        self._listener.setblocking(False)
        self._launcher: socket.socket | None = None
        self.has_lent = False
        """The program has received the caller's standard files."""
        self.is_over = False
        """The launcher had connected, and its connection has ended."""
        self.status: int | None = None
        """How the program ended, as os.waitstatus_to_exitcode() returns it; None: it has not ended or was stopped."""

    def fds(self) -> list[int]:
        return [self._listener.fileno(), *([] if self._launcher is None else [self._launcher.fileno()])]

    def serve(self) -> None:
        """Accept connections and read messages, without waiting."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                break
            self._greet(connection)
        if self._launcher is not None:
            self._hear(self._launcher)

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT_SECONDS)
        try:
            wish = connection.recv(1)
            if wish == _PRESENCE:
                connection.setblocking(False)
                self._launcher = connection
                return
            if wish == _LOAN:
                self.has_lent = True
                socket.send_fds(connection, [str(len(self._environment)).encode()], list(_STANDARD_FILES))
                for start in range(0, len(self._environment), _PIECE):
                    connection.send(self._environment[start : start + _PIECE])
        except OSError:
            pass  # the other process was killed; the end of the launcher's connection reports it
        connection.close()

    def _hear(self, launcher: socket.socket) -> None:
        try:
            while said := launcher.recv(32):
                self.status = int(said)
        except BlockingIOError:
            return
        except OSError:
            pass
        self.is_over = True
        launcher.close()
        self._launcher = None

    def close(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None


def attend(path: Path) -> socket.socket:
    """Return a connection that becomes readable when the caller ends.

    Raises:
        EngineError: the caller has ended already.
    """
    return _connect(path, _PRESENCE)


def tell(launcher: socket.socket, ended: int) -> None:
    """Send the caller how the program ended. Does nothing if the caller has ended."""
    with contextlib.suppress(OSError):
        launcher.send(str(ended).encode())


def borrow(path: Path) -> dict[str, str]:
    """Take over the caller's standard files in this process, and return the caller's environment.

    Raises:
        EngineError: the caller has ended.
    """
    with _connect(path, _LOAN) as connection:
        try:
            size, fds, _flags, _address = socket.recv_fds(connection, 32, len(_STANDARD_FILES))
            text = b""
            while size and len(text) < int(size):
                piece = connection.recv(_PIECE)
                if not piece:
                    break
                text += piece
        except OSError as error:
            raise _gone() from error
    if len(fds) != len(_STANDARD_FILES) or not text:
        raise _gone()
    for fd, number in zip(fds, _STANDARD_FILES, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    environment: dict[str, str] = json.loads(text)
    return environment


def _connect(path: Path, wish: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_TIMEOUT_SECONDS)
        connection.connect(str(path))
        connection.send(wish)
    except OSError as error:
        connection.close()
        raise _gone() from error
    return connection


def _gone() -> EngineError:
    return EngineError("The `gpusvc run` that started this program has ended.")
