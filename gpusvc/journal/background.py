"""The last lines of a model's log, read by a child process, for a caller that must not wait."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

from gpusvc.journal import units

# How long journalctl may take.
_ANSWER_SECONDS = 5.0


class BackgroundLines:
    """Lines that are being read. take() has to be called at the end in any case."""

    def __init__(self, name: str, lines: int) -> None:
        """Begin to read the last ``lines`` lines of the model ``name``: the engine's, gpusvc's and systemd's."""
        self._deadline = time.monotonic() + _ANSWER_SECONDS
        self._file = os.memfd_create("lines")  # a pipe could fill up
        self._child: subprocess.Popen[bytes] | None = None
        command = units.command(name, f"--lines={lines}", "--output=cat", "--quiet", "--no-pager")
        with contextlib.suppress(OSError):
            self._child = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.DEVNULL
            )

    def are_there(self) -> bool:
        """Return whether no more lines will come."""
        return self._child is None or self._child.poll() is not None or time.monotonic() > self._deadline

    def take(self) -> list[str]:
        """End the child, and return the lines without empty ones, oldest first."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        with open(self._file, "rb") as file:  # noqa: PTH123  a descriptor
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()]
