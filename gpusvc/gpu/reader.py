"""The reader process: it calls NVML for one caller, who can kill it.

A call of NVML enters the driver, and a GPU that hangs may keep it there for ever, in a state that no signal ends. So no
process of gpusvc that has other duties calls NVML itself. This one has no other duties: it holds no lock, no socket
and no standard file of its caller, so that nothing waits for it if it never returns.

The caller writes requests into one pipe and reads the answers from another. Before each step that may hang, the reader
writes one byte into a third pipe, so that the caller knows at which GPU it hangs.
"""

from __future__ import annotations

import fcntl
import gc
import marshal
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from gpusvc.errors import NvmlError, NvmlUnavailableError
from gpusvc.gpu.nvml import Nvml
from gpusvc.gpu.reading import Gpu, GpuProcess
from gpusvc.record import Record

# Where the pipes are in the reader process.
REQUESTS_FD, ANSWERS_FD, STEPS_FD = 3, 4, 5

# A step that concerns no single GPU. The step of GPU n is n.
LIBRARY = 255

_LENGTH_BYTES = 4
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_NAME = b"gpusvc-nvml"


class Pipes(Record):
    """The reader's ends of the three pipes."""

    requests: int
    answers: int
    steps: int


def pack(value: Any) -> bytes:
    """Return a message: its length, and the value as marshal(3) writes it, which both ends read alike."""
    body = marshal.dumps(value)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def unpack(message: bytes | bytearray) -> Any:
    """Return the value of a message, or None if the message is not complete."""
    size = int.from_bytes(message[:_LENGTH_BYTES], "little")
    if len(message) < _LENGTH_BYTES or len(message) < _LENGTH_BYTES + size:
        return None
    return marshal.loads(message[_LENGTH_BYTES:])  # noqa: S302  both ends are processes of gpusvc, and one made the other


def become_reader(pipes: Pipes) -> NoReturn:
    """Turn this process, which was forked a moment ago, into the reader. Nothing leads back into the caller's code."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        gc.freeze()  # what the caller had loaded stays in pages that both share
        _take(pipes)
        _serve()
    finally:
        os._exit(0)


def _take(pipes: Pipes) -> None:
    """Have the pipes at their places, and no other file of the caller: a lock or a pipe would outlive it."""
    null = os.open(os.devnull, os.O_RDWR)
    # First to places above all of theirs, as one of the pipes may stand at the place of another.
    wanted = (null, null, null, pipes.requests, pipes.answers, pipes.steps)
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(wanted)) for fd in wanted]
    for place, fd in enumerate(above):
        os.dup2(fd, place)
    os.closerange(len(wanted), os.sysconf("SC_OPEN_MAX"))


def _serve() -> None:
    """Answer requests until the caller closes its pipe or ends."""
    _prepare()
    reader = _Answering()
    reader.open()
    while True:
        request = _receive()
        if request is None:
            return
        _send(pack(reader.answer(*request)))


def _prepare() -> None:
    # Where the caller dies while NVML hangs, nobody else would end this process.
    import ctypes  # noqa: PLC0415  pynvml needs it too

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, _NAME)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


class _Answering:
    """The client of NVML, which is opened before the first request, as this takes time."""

    def __init__(self) -> None:
        self._nvml: Nvml | None = None
        self._error: NvmlError | None = None

    def open(self) -> None:
        _step(LIBRARY)
        try:
            self._nvml = Nvml(on_step=_step)
        except NvmlError as error:
            self._error = error  # the first request gets it, the second one tries again

    def answer(self, method: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        try:
            error, self._error = self._error, None
            if error is not None:
                raise error
            if self._nvml is None:
                _step(LIBRARY)
                self._nvml = Nvml(on_step=_step)
            return "value", flat(getattr(self._nvml, method)(**arguments))
        except NvmlUnavailableError as unavailable:
            return "unavailable", unavailable.message, unavailable.hint
        except NvmlError as failed:
            return "failed", failed.message, failed.hint
        except Exception as unexpected:
            return "failed", f"NVML cannot be read: {type(unexpected).__name__}: {unexpected}.", None


def flat(value: Any) -> Any:
    """Return ``value`` in types that marshal knows: a Gpu or another record becomes the tuple of its values."""
    if isinstance(value, Record):
        return tuple(flat(value.__dict__[name]) for name in value.fields)
    if isinstance(value, tuple):
        return tuple(map(flat, value))
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return value


def gpu_of(values: tuple[Any, ...]) -> Gpu:
    """Return the Gpu of which flat() made ``values``."""
    gpu = dict(zip(Gpu.fields, values, strict=True))
    if gpu["processes"] is not None:
        gpu["processes"] = tuple(GpuProcess(*process) for process in gpu["processes"])
    return Gpu(**gpu)


def _step(number: int) -> None:
    with suppress(BlockingIOError):  # a caller that has not looked for long has enough to see
        os.write(STEPS_FD, bytes((min(number, LIBRARY),)))


def _receive() -> Any:
    """Return the next request; None: the caller is gone."""
    message = bytearray()
    while True:
        piece = os.read(REQUESTS_FD, 65536)
        if not piece:
            return None
        message += piece
        request = unpack(message)
        if request is not None:
            return request


def _send(message: bytes) -> None:
    while message:
        message = message[os.write(ANSWERS_FD, message) :]


def main() -> int:
    """``python -m gpusvc.gpu.reader``: the pipes are at their places already."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
