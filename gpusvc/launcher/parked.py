"""The parked process: forked at once, parked until it is in its scope, then turned into the engine.

It is forked before the launcher opens a file, so that it inherits none: no driver handle (an open file bypasses the
device filter), no bus, no lock. Before it executes the engine, it is in its scope, has tried that other GPUs are closed
to it, and has given up all privileges.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from gpusvc.config.model import OWNED_VARIABLES
from gpusvc.errors import EngineError, IsolationError
from gpusvc.linux.users import User
from gpusvc.record import Record, as_dict

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Of what comes through the pipe.
_CHUNK_BYTES = 1 << 16

_USERS_OWN = ("HOME", "LOGNAME", "USER", "SHELL")

# What systemd sets for the launcher, and the engine must not get (systemd.exec(5)).
_NOT_INHERITED = frozenset(
    {
        "NOTIFY_SOCKET",
        "JOURNAL_STREAM",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "SYSTEMD_EXEC_PID",
        "MAINPID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
        "RUNTIME_DIRECTORY",
        "STATE_DIRECTORY",
        *_USERS_OWN,
    }
)


class Orders(Record):
    """What the parked process needs to become the engine."""

    command: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    user: User
    closed_nodes: tuple[str, ...]
    """Device nodes that the engine must not be able to open."""
    require_isolation: bool
    unfenced_devices: str
    """CUDA_VISIBLE_DEVICES if the engine can open some of ``closed_nodes``, and isolation is not required."""
    caller: str | None = None
    """The socket of a caller.Caller, whose standard files and environment the engine gets."""


def environment(
    inherited: Mapping[str, str],
    model: Mapping[str, str],
    user: User,
    *,
    visible_devices: str,
    port: int,
    name: str,
) -> dict[str, str]:
    """The engine's environment: the unit's variables, then the user's, the model file's, and gpusvc's own."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **{key: value for key, value in inherited.items() if key not in _NOT_INHERITED},
        "HOME": user.home,
        "LOGNAME": user.name,
        "USER": user.name,
        "SHELL": user.shell,
        **model,
        _VISIBLE: visible_devices,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PORT": str(port),
        "GPUSVC_MODEL": name,
    }


class ParkedEngine:
    """The forked process, on the parent's side."""

    def __init__(self, pid: int, orders_fd: int, report_fd: int, output_fd: int) -> None:
        self.pid = pid
        self.output_fd = output_fd
        """The read end of the engine's standard output and error."""
        self._orders_fd = orders_fd
        self._report_fd = report_fd

    @classmethod
    def fork(cls) -> Self:
        """Fork. The child waits for release(), and ends by itself if this process ends."""
        orders_read, orders_write = os.pipe()
        report_read, report_write = os.pipe()
        output_read, output_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become_engine(orders_read, report_write, output_write)
        for fd in (orders_read, report_write, output_write):
            os.close(fd)
        return cls(pid, orders_write, report_read, output_read)

    def abandon(self) -> None:
        """End the process, unless it is the engine already."""
        if self._orders_fd >= 0:
            os.close(self._orders_fd)
            os.waitpid(self.pid, 0)

    def read_ahead(self, files: Sequence[str], user: User) -> None:
        """Have it read these files into the page cache, with the rights of ``user``, until it gets its orders."""
        errand = json.dumps({"files": list(files), "user": as_dict(user)}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # release() reports that it was killed
            os.write(self._orders_fd, errand)

    def release(self, orders: Orders) -> list[str]:
        """Turn it into the engine; return a sentence for each open GPU node that is tolerated.

        Raises:
            IsolationError: it could open the node of another GPU, and isolation is required.
            EngineError: the command could not be executed.
        """
        orders_fd, self._orders_fd = self._orders_fd, -1
        try:
            with os.fdopen(orders_fd, "w") as pipe:
                json.dump({**as_dict(orders), "user": as_dict(orders.user)}, pipe)
        except BrokenPipeError:
            raise EngineError("The engine's process was killed before it became the engine.") from None
        with os.fdopen(self._report_fd) as pipe:
            # The end of the file is the exec itself: the child's end closes with it.
            reports = [json.loads(line) for line in pipe]
        warnings = []
        for report in reports:
            match report["kind"]:
                case "open":
                    warnings.append(report["message"])
                case "isolation":
                    raise IsolationError(
                        report["message"],
                        hint="The kernel has to attach a BPF device filter; "
                        '`isolation = "best-effort"` in gpusvc.toml goes without.',
                    )
                case _:
                    raise EngineError(report["message"])
        return warnings


def _become_engine(orders_fd: int, report_fd: int, output_fd: int) -> NoReturn:
    """The child's side. No exception and no return may lead back into the launcher's code."""
    try:
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        _follow_orders(orders_fd, report_fd)
    except BaseException as error:
        _report(report_fd, "failed", f"The engine could not be prepared: {type(error).__name__}: {error}.")
    finally:
        os._exit(127)


def _follow_orders(orders_fd: int, report_fd: int) -> None:
    # Imported here, while the launcher does something else.
    from gpusvc.launcher import confinement  # noqa: PLC0415

    os.setsid()
    _close_all_but(orders_fd, report_fd)
    text = _await_orders(orders_fd)
    if not text:
        os._exit(0)  # the launcher ended without orders
    given = json.loads(text)
    user = User(**given.pop("user"))
    orders = Orders(**given, user=user)

    for node in orders.closed_nodes:
        found = confinement.open_errno(node)
        if found != errno.EPERM:
            message = f"The engine could reach {node}, which is not its GPU (open: {_outcome(found)}, not EPERM)."
            _report(report_fd, "isolation" if orders.require_isolation else "open", message)
            if orders.require_isolation:
                os._exit(127)
            orders.environment[_VISIBLE] = orders.unfenced_devices

    variables = orders.environment if orders.caller is None else _as_called(orders, orders.caller)
    confinement.drop_privileges(user)
    _reset_signals()
    _execute(orders, variables, report_fd)


def _await_orders(orders_fd: int) -> bytes:
    """Return the orders; empty if the launcher ended without. Errands, one in a line, come before them."""
    received = b""
    while chunk := os.read(orders_fd, _CHUNK_BYTES):
        received += chunk
        while b"\n" in received:
            errand, _, received = received.partition(b"\n")
            _run(json.loads(errand), orders_fd)
    os.close(orders_fd)
    return received


def _run(errand: dict[str, Any], orders_fd: int) -> None:
    """Read files ahead until something comes through the pipe, or its end."""
    from gpusvc.launcher.readahead import read_ahead  # noqa: PLC0415  only a start that evicts models reads ahead

    poll = select.poll()
    poll.register(orders_fd, select.POLLIN)
    read_ahead(errand["files"], User(**errand["user"]), lambda: bool(poll.poll(0)))


def _close_all_but(*kept: int) -> None:
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208  only numbers
        fd = int(number)
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the descriptor that listed the directory is closed already
                os.close(fd)


def _reset_signals() -> None:
    """Python ignores two signals, and exec would pass that on."""
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _execute(orders: Orders, variables: Mapping[str, str], report_fd: int) -> None:
    name = orders.user.name
    try:
        os.chdir(orders.working_directory)
    except OSError as error:
        _report(report_fd, "failed", f"{name} cannot enter {orders.working_directory}: {_reason(error)}.")
        return
    try:
        os.execvpe(orders.command[0], orders.command, variables)  # noqa: S606
    except OSError as error:
        _report(report_fd, "failed", f"{name} cannot execute {orders.command[0]}: {_reason(error)}.")


def _as_called(orders: Orders, caller: str) -> dict[str, str]:
    """Take over the caller's files; its environment, with the variables of the user and of gpusvc from the orders."""
    from gpusvc.launcher.caller import borrow  # noqa: PLC0415  most engines have no caller

    decided = {*OWNED_VARIABLES, *_USERS_OWN, "GPUSVC_MODEL"}
    return {
        **{key: value for key, value in borrow(Path(caller)).items() if key not in _NOT_INHERITED},
        **{key: value for key, value in orders.environment.items() if key in decided},
    }


def _outcome(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "it opened"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)


def _report(fd: int, kind: str, message: str) -> None:
    os.write(fd, json.dumps({"kind": kind, "message": message}).encode() + b"\n")
