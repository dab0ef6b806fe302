"""The engine's process: forked at once, parked until its scope holds it, then made into the engine.

It is forked before the launcher opens anything, so that it has nothing to inherit: no driver handle (an open file
bypasses the device filter), no bus, no lock. It runs no code of the engine before it is in its scope, has seen with its
own eyes that other GPUs are closed to it, and has given up every privilege.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Self

from gpusvc.config.model import OWNED_VARIABLES
from gpusvc.errors import EngineError, IsolationError
from gpusvc.linux.users import User

_USERS_OWN = ("HOME", "LOGNAME", "USER", "SHELL")

# Of systemd's to the launcher, and none of the engine's business (systemd.exec(5)).
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

_PR_SET_NO_NEW_PRIVS = 38
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522

# landlock(7). These system calls have the same number on all that systemd and NVIDIA know.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_ABI_WITH_SCOPES = 6  # of Linux 6.12
_LANDLOCK_SCOPE_SIGNAL = 2


@dataclass(frozen=True, slots=True)
class Orders:
    """All that the parked process needs to become the engine."""

    command: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    user: User
    closed_nodes: tuple[str, ...]
    """Device nodes that it must not be able to open."""
    require_isolation: bool
    caller: str | None = None
    """Whose standard files and environment it gets: the socket of a caller.Caller."""


def environment(
    inherited: Mapping[str, str],
    model: Mapping[str, str],
    user: User,
    *,
    gpu_uuids: Sequence[str],
    port: int,
    name: str,
) -> dict[str, str]:
    """The engine's environment: the unit's, then the user's, then the model file's, then what gpusvc decides."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **{key: value for key, value in inherited.items() if key not in _NOT_INHERITED},
        "HOME": user.home,
        "LOGNAME": user.name,
        "USER": user.name,
        "SHELL": user.shell,
        **model,
        # By UUID, in full: CUDA's own numbering may differ from NVML's. Set and empty means none; unset would mean all.
        "CUDA_VISIBLE_DEVICES": ",".join(gpu_uuids),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PORT": str(port),
        "GPUSVC_MODEL": name,
    }


class ParkedEngine:
    """The forked process, from the parent's side."""

    def __init__(self, pid: int, orders_fd: int, report_fd: int, output_fd: int) -> None:
        self.pid = pid
        self.output_fd = output_fd
        """What the engine writes to its standard output and error can be read here."""
        self._orders_fd = orders_fd
        self._report_fd = report_fd

    @classmethod
    def fork(cls) -> Self:
        """Fork it; it waits for release(), and ends by itself if this process does."""
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
        """Let it end, unless it is the engine already."""
        if self._orders_fd >= 0:
            os.close(self._orders_fd)
            os.waitpid(self.pid, 0)

    def release(self, orders: Orders) -> list[str]:
        """Make it the engine. Returns sentences about isolation that best effort did not reach.

        Raises:
            IsolationError: it could open a GPU that is not its own, and that is not to be tolerated.
            EngineError: the command could not be executed.
        """
        orders_fd, self._orders_fd = self._orders_fd, -1
        try:
            with os.fdopen(orders_fd, "w") as pipe:
                json.dump(asdict(orders), pipe)
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
    """The child's side; nothing may escape from here, the launcher's code least of all."""
    try:
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        _follow_orders(orders_fd, report_fd)
    except BaseException as error:
        _report(report_fd, "failed", f"The engine could not be prepared: {type(error).__name__}: {error}.")
    finally:
        os._exit(127)


def _follow_orders(orders_fd: int, report_fd: int) -> None:
    os.setsid()
    for fd in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
        if fd > 2 and fd not in {orders_fd, report_fd}:
            with contextlib.suppress(OSError):  # the one that listed the directory is closed already
                os.close(fd)
    with os.fdopen(orders_fd) as pipe:
        text = pipe.read()
    if not text:
        os._exit(0)  # the launcher is gone, or found no place
    given = json.loads(text)
    user = User(**given.pop("user"))
    orders = Orders(**given, user=user)

    for node in orders.closed_nodes:
        found = _try_open(node)
        if found != errno.EPERM:
            message = f"The engine could reach {node}, which is not its GPU (open: {_outcome(found)}, not EPERM)."
            _report(report_fd, "isolation" if orders.require_isolation else "open", message)
            if orders.require_isolation:
                os._exit(127)

    surroundings = orders.environment if orders.caller is None else _as_called(orders, Path(orders.caller))
    _drop_privileges(user)
    for number in signal.valid_signals():  # Python ignores two, and exec would hand that on
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    try:
        os.chdir(orders.working_directory)
    except OSError as error:
        _report(report_fd, "failed", f"{user.name} cannot enter {orders.working_directory}: {_reason(error)}.")
        return
    try:
        os.execvpe(orders.command[0], orders.command, surroundings)  # noqa: S606
    except OSError as error:
        _report(report_fd, "failed", f"{user.name} cannot execute {orders.command[0]}: {_reason(error)}.")


def _as_called(orders: Orders, caller: Path) -> dict[str, str]:
    """Take the caller's files, and its environment but for what tells of the user and what gpusvc decides."""
    from gpusvc.launcher.caller import borrow  # noqa: PLC0415  most engines have no caller

    decided = {*OWNED_VARIABLES, *_USERS_OWN, "GPUSVC_MODEL"}
    return {
        **{key: value for key, value in borrow(caller).items() if key not in _NOT_INHERITED},
        **{key: value for key, value in orders.environment.items() if key in decided},
    }


def _try_open(node: str) -> int:
    """The errno of opening ``node``; 0 if that worked."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _outcome(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "it opened"


def _drop_privileges(user: User) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # A user who runs his own models keeps his groups, and his bounding set, from which no_new_privs lets nothing out.
    if os.geteuid() == 0:
        os.setgroups(user.groups)
        # Also for an engine that runs as root: its exec would gain what is left in the bounding set, or is inheritable,
        # as newer systemd makes the unit's capabilities (capabilities(7)).
        for capability in range(64):
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                if ctypes.get_errno() == errno.EINVAL:
                    break  # past the last one that this kernel knows
                raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    if libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    _keep_to_itself(libc)


def _keep_to_itself(libc: ctypes.CDLL) -> None:
    """Where the kernel can (Linux 6.12), let it signal, trace and look into no processes but its own.

    Engines mostly run as the same user, whose processes may otherwise do all of that to each other. A domain of
    Landlock's keeps all tracing inside; of what else there is, files would take mounts away from engines that bring
    their own container.
    """
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    if abi < _LANDLOCK_ABI_WITH_SCOPES:
        return
    attributes = struct.pack("=QQQ", 0, 0, _LANDLOCK_SCOPE_SIGNAL)  # landlock_ruleset_attr: files, network, scopes
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0 or libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "it cannot be kept to its own processes")
    os.close(ruleset)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)


def _report(fd: int, kind: str, message: str) -> None:
    os.write(fd, json.dumps({"kind": kind, "message": message}).encode() + b"\n")
