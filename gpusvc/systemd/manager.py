"""The service manager, as it answers on D-Bus.

Everything here is about units in general. What a model is, and which properties its scope needs, is for others to know.
Interface: org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Any, Self

from gpusvc.errors import SystemdError, UnansweredError
from gpusvc.paths import Paths, is_user_instance
from gpusvc.systemd import jobs
from gpusvc.systemd.bus import (
    DBus,
    DBusAddress,
    DBusBaseError,
    apply_signature,
    code_of,
    encode,
    patiently,
    translated,
    undisturbed,
)
from gpusvc.systemd.jobs import EndedJob, JobResult, JobTable
from gpusvc.systemd.units import ActiveState, Scope, ServiceStatus, TransientUnit, Unit

_NAME = b"org.freedesktop.systemd1"
_PATH = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_JOB = b"org.freedesktop.systemd1.Job"

# systemd executes itself anew within this time, and nobody answers meanwhile.
_ABSENT_SECONDS = 10.0


class Manager:
    """One connection to the service manager of this instance; a context manager. Not for threads, nor across a fork.

    Raises:
        SystemdError: from every method, when the manager refuses or cannot be reached.
        UnansweredError: likewise, when nobody answered.
        PermissionDeniedError: from every method that changes something, when the caller may not.
    """

    def __init__(self, *, patience_seconds: float = _ABSENT_SECONDS) -> None:
        """``patience_seconds``: how long a manager that executes itself anew is asked again and again."""
        self._patience_seconds = patience_seconds
        self._jobs = JobTable()
        self._on_signal: Callable[..., None] | None = None
        # Whom signals are from; on a connection without a bus in between nobody has a name.
        self._sender: bytes | None = _NAME
        if is_user_instance():
            self._open_user()
            return
        self._bus = DBus()
        with translated("reach the service manager"):
            self._bus.open()

    def _open_user(self) -> None:
        """By the user's bus; where there is none (dbus-user-session), by the socket that systemctl(1) itself uses."""
        self._bus = DBus(user_mode=True)
        try:
            self._bus.open()
        except DBusBaseError:
            private = Paths.here().runtime.parent / "systemd/private"
            self._bus = DBusAddress(b"unix:path=" + os.fsencode(private), peer_to_peer=True)
            self._sender = None
            try:
                self._bus.open()
            except DBusBaseError as error:
                raise SystemdError(
                    f"Could not reach the service manager of this user: {os.strerror(code_of(error))}.",
                    hint="It runs while the user is logged in; `loginctl enable-linger` has it run from boot on.",
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bus.close()

    def enqueue(self, verb: str, unit: str, *, replace: bool = True) -> str:
        """Queue a job: ``verb`` is "Start", "Stop" or "Restart". Its path, for wait() or drain().

        Args:
            verb: what is to be done.
            unit: to which unit.
            replace: whether a job that is queued for it, and wants something else, is cancelled.

        Raises:
            JobConflictError: there is such a job, and it is not to be replaced.
        """
        self._subscribe()
        mode = "replace" if replace else "fail"
        path: bytes = self._call(f"{verb.lower()} {unit}", f"{verb}Unit", "ss", unit, mode)
        return self._remember(path, verb, unit)

    def reset_failed(self, unit: str) -> None:
        """Forget that ``unit`` failed."""
        self._call(f"reset {unit}", "ResetFailedUnit", "s", unit)

    def kill(self, unit: str, number: int) -> None:
        """Send the signal ``number`` to every process of ``unit``."""
        self._call(f"kill {unit}", "KillUnit", "ssi", unit, "all", number, again=False)

    def thaw(self, unit: str) -> None:
        """Let the processes of ``unit`` go on, which somebody froze; nothing, if nobody did."""
        self._call(f"thaw {unit}", "ThawUnit", "s", unit)

    def version(self) -> str:
        """The release of systemd, as it spells it."""
        with translated("read the version of the service manager"):
            return bytes(self._bus.get_property(_NAME, _PATH, _MANAGER, b"Version", b"s")).decode()

    def reload(self) -> None:
        """Have all unit files read again."""
        self._call("have unit files read again", "Reload", "")

    def start_transient(self, unit: TransientUnit) -> str:
        """Queue the start of a transient unit. Returns the job's path, for wait() or drain()."""
        self._subscribe()
        arguments = apply_signature(b"ss", [unit.name.encode(), b"fail"])
        arguments.append((ord("a"), b"(sv)"))
        for name, signature, value in unit.properties():
            arguments += [(ord("r"), b"sv"), (ord("s"), name.encode()), (ord("v"), signature.encode())]
            arguments += apply_signature(signature.encode(), [encode(value)])
            arguments += [(-1, None), (-1, None)]
        arguments.append((-1, None))
        arguments += [(ord("a"), b"(sa(sv))"), (-1, None)]
        with translated(f"make {unit.name}"), undisturbed():
            path: bytes = self._bus.call_method(_NAME, _PATH, _MANAGER, b"StartTransientUnit", arguments).body
        return self._remember(path, "Start", unit.name)

    def start_scope(self, scope: Scope) -> str:
        """Queue the making of ``scope``. Returns the job's path, for wait()."""
        return self.start_transient(scope)

    def wait(self, job: str, timeout_seconds: float) -> JobResult | None:
        """How ``job``, which this connection queued, ended; None if it has not within the time."""
        deadline = time.monotonic() + timeout_seconds
        poll = select.poll()
        poll.register(self._bus.get_fd(), select.POLLIN)
        while True:
            self._process()
            result = self._jobs.take(job) or self._unheard(job)
            if result is not None:
                self._jobs.forget(job)
                return result
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            poll.poll(min(remaining, jobs.LOOK_SECONDS) * 1000)

    def listen(self) -> int:
        """For who cannot wait(): hear of the end of every job from now on. A file that is readable when drain() is due.

        Any other call may take the news along, so that drain() is due after each of those too.
        """
        self._subscribe()
        fd: int = self._bus.get_fd()
        return fd

    def drain(self) -> list[EndedJob]:
        """The jobs of all units that ended since the last call; without waiting."""
        self._process()
        return self._jobs.take_all()

    def units(self, *patterns: str) -> list[Unit]:
        """The loaded units whose names match any of the shell ``patterns``."""
        rows = self._call("list units", "ListUnitsByPatterns", "asas", [], list(patterns)) or []
        # pystemd unwraps an answer of one element.
        rows = [rows] if isinstance(rows, tuple) else rows
        return [
            Unit(name=row[0].decode(), active=ActiveState(row[3].decode()), sub=row[4].decode(), path=row[6].decode())
            for row in rows
        ]

    def unit(self, name: str) -> Unit | None:
        """The unit if it is loaded."""
        return next(iter(self.units(name)), None)

    def service_status(self, unit: Unit) -> ServiceStatus:
        """What the service ``unit`` says of itself."""
        service = b"org.freedesktop.systemd1.Service"
        return ServiceStatus(
            text=self._get(unit, service, "StatusText", "s").decode(errors="replace"),
            result=self._get(unit, service, "Result", "s").decode(),
            exit_status=self._get(unit, service, "ExecMainStatus", "i"),
            since=self._get(unit, b"org.freedesktop.systemd1.Unit", "StateChangeTimestamp", "t") / 1_000_000,
        )

    def restarts(self, unit: Unit) -> int:
        """Return how often systemd restarted the service ``unit`` by itself since somebody started it."""
        return int(self._get(unit, b"org.freedesktop.systemd1.Service", "NRestarts", "u"))

    def _get(self, unit: Unit, interface: bytes, name: str, signature: str) -> Any:
        path = unit.path.encode()
        return patiently(
            f"read {name} of {unit.name}",
            lambda: self._bus.get_property(_NAME, path, interface, name.encode(), signature.encode()),
            patience_seconds=self._patience_seconds,
        )

    def _call(self, doing: str, method: str, signature: str, *arguments: object, again: bool = True) -> Any:
        """``again``: it does no harm if it is heard twice."""
        encoded = apply_signature(signature.encode(), [encode(argument) for argument in arguments])

        def call() -> Any:
            return self._bus.call_method(_NAME, _PATH, _MANAGER, method.encode(), encoded).body

        if again:
            return patiently(doing, call, patience_seconds=self._patience_seconds)
        with translated(doing), undisturbed():
            return call()

    def _remember(self, path: bytes, verb: str, unit: str) -> str:
        self._jobs.queued(path.decode(), verb, unit)
        return path.decode()

    def _unheard(self, path: str) -> JobResult | None:
        """Return how a job ended of whose end no signal came; None if it goes on or nobody answers."""
        job = self._jobs.overdue(path)
        if job is None:
            return None
        try:
            with translated(f"look at a job of {job.unit}"):
                self._bus.get_property(_NAME, path.encode(), _JOB, b"State", b"s")
            return None  # it goes on
        except UnansweredError:
            return None
        except SystemdError:
            pass  # there is no such job any more
        unit = self.unit(job.unit)
        self._process()
        return self._jobs.take(path) or job.result_by_state(is_up=unit is not None and unit.active.is_up)

    def _process(self) -> None:
        with translated("hear from the service manager"), undisturbed():
            # What libsystemd keeps to itself looks like nothing; and nobody polls for what it has read already.
            nothing = 0
            while nothing < 2:
                nothing = nothing + 1 if self._bus.process().is_empty() else 0

    def _subscribe(self) -> None:
        """Hear of the end of jobs; before the first job is queued, so that none can end unheard."""
        if self._on_signal is not None:
            return

        def job_removed(message: Any, error: object = None, userdata: object = None) -> None:  # noqa: ARG001
            message.process_reply(False)
            _id, path, unit, result = message.body
            self._jobs.ended(EndedJob(path.decode(), unit.decode(), JobResult(result.decode())))

        # pystemd keeps a bare pointer to the callback: this attribute is what keeps it alive.
        self._on_signal = job_removed
        with translated("listen to the service manager"):
            self._bus.match_signal(self._sender, _PATH, _MANAGER, b"JobRemoved", job_removed)
        self._call("subscribe to the service manager", "Subscribe", "")
