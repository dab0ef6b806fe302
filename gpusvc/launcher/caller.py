"""Who says ``gpusvc run``, from the side of the program that is run: its standard files, its environment, its presence.

The caller listens on a socket for as long as it is there. The launcher holds one connection to it: when that ends, so
does the program. The process that becomes the program makes another, and gets what it would have inherited from the
caller, had the caller forked it itself.
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

# connect(2) to a socket whose owner does nothing but accept.
_TIMEOUT_SECONDS = 10.0


class Caller:
    """The caller's side: serves both connections from one poll loop, whose files are ``fds()``."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = json.dumps(dict(environment)).encode()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # Only root may ask for the files of whoever ran this.
        umask = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(umask)
        self._listener.listen()
        self._listener.setblocking(False)
        self._launcher: socket.socket | None = None
        self.has_lent = False
        """The program has the caller's files."""
        self.is_over = False
        """The launcher was there, and is not any more."""
        self.status: int | None = None
        """How the program ended, as os.waitstatus_to_exitcode() has it; None: it has not, or was stopped."""

    def fds(self) -> list[int]:
        return [self._listener.fileno(), *([] if self._launcher is None else [self._launcher.fileno()])]

    def serve(self) -> None:
        """Do what can be done without waiting."""
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
            pass  # it was killed meanwhile; the launcher's end tells
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
    """A connection that can be read when the caller is gone.

    Raises:
        EngineError: it is gone already.
    """
    return _connect(path, _PRESENCE)


def tell(launcher: socket.socket, ended: int) -> None:
    """Let the caller know how the program ended; it may be gone itself."""
    with contextlib.suppress(OSError):
        launcher.send(str(ended).encode())


def borrow(path: Path) -> dict[str, str]:
    """Take over the caller's standard files in this process; its environment.

    Raises:
        EngineError: it is gone.
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
    return EngineError("Who wanted this program to run is gone.")
