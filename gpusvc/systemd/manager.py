"""The service manager over D-Bus (org.freedesktop.systemd1(5)): units and jobs in general, nothing about models."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Any, Self

from gpusvc.errors import SystemdError, UnansweredError
from gpusvc.paths import Paths, is_user_instance
from gpusvc.systemd import jobs
from gpusvc.systemd.bus import (
    AlreadySubscribedError,
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
from gpusvc.systemd.units import ActiveState, ServiceStatus, TransientUnit, Unit

_NAME = b"org.freedesktop.systemd1"
_PATH = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_JOB = b"org.freedesktop.systemd1.Job"


class Manager:
    """One connection to the service manager of this instance; a context manager. Not for threads, nor across a fork.

    Raises:
        SystemdError: from every method, if the manager refuses or cannot be reached.
        UnansweredError: from every method, if the manager does not answer.
        PermissionDeniedError: from every method that changes something, if the caller may not do that.
    """

    def __init__(self, *, patience_seconds: float = jobs.ABSENT_SECONDS) -> None:
        """``patience_seconds``: for how long a manager that does not answer is asked again."""
        self._patience_seconds = patience_seconds
        self._jobs = JobTable()
        self._on_signal: list[Callable[..., None]] = []
        self._is_subscribed = False
        # The sender of signals. On a connection without a bus, no peer has a name.
        self._sender: bytes | None = _NAME
        if is_user_instance():
            self._open_user()
            return
        self._bus = DBus()
        with translated("reach the service manager"):
            self._bus.open()

    def _open_user(self) -> None:
        """Connect to the user's bus, or without one (dbus-user-session) to the socket that systemctl(1) uses."""
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
        """Queue a job. Return its path, for wait() or drain().

        Args:
            verb: "Start", "Stop" or "Restart".
            unit: the unit.
            replace: whether the job cancels a queued job of the unit that does something else.

        Raises:
            JobConflictError: there is such a job, and ``replace`` is false.
        """
        self._subscribe()
        mode = "replace" if replace else "fail"
        path: bytes = self._call(f"{verb.lower()} {unit}", f"{verb}Unit", "ss", unit, mode)
        return self._remember(path, verb, unit)

    def cancel_stop(self, unit: str) -> None:
        """Cancel the job that stops ``unit``, if there is one: its client learns that the stop failed.

        The unit stops all the same.
        """
        rows = self._call("list jobs", "ListJobs", "") or []
        # pystemd unwraps an answer of one element.
        for number, name, kind, *_ in [rows] if isinstance(rows, tuple) else rows:
            if name.decode() == unit and kind == b"stop":
                self._call(f"cancel the stop of {unit}", "CancelJob", "u", number, again=False)

    def reset_failed(self, unit: str) -> None:
        """Have systemd forget that ``unit`` failed."""
        self._call(f"reset {unit}", "ResetFailedUnit", "s", unit)

    def kill(self, unit: str, number: int) -> None:
        """Send the signal ``number`` to every process of ``unit``."""
        self._call(f"kill {unit}", "KillUnit", "ssi", unit, "all", number, again=False)

    def thaw(self, unit: str) -> None:
        """Let the processes of ``unit`` go on if they are frozen."""
        self._call(f"thaw {unit}", "ThawUnit", "s", unit)

    def version(self) -> str:
        """Return the version of systemd, in its own spelling."""
        with translated("read the version of the service manager"):
            return bytes(self._bus.get_property(_NAME, _PATH, _MANAGER, b"Version", b"s")).decode()

    def reload(self) -> None:
        """Have systemd read all unit files again."""
        self._call("have unit files read again", "Reload", "")

    def start_transient(self, unit: TransientUnit) -> str:
        """Queue the start of a transient unit. Return the job's path, for wait() or drain()."""
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

    def wait(self, job: str, timeout_seconds: float) -> JobResult | None:
        """Return how ``job``, which this connection queued, ended; None if it did not end in this time."""
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
        """Receive the ends of all jobs from now on. Return a descriptor that is readable when drain() is due.

        Any other call may read the messages too, so call drain() also after each of them.
        """
        self._subscribe()
        fd: int = self._bus.get_fd()
        return fd

    def drain(self) -> list[EndedJob]:
        """Return the jobs of all units that ended since the last call. Does not wait."""
        self._process()
        return self._jobs.take_all()

    def follow(self, job: str, verb: str, unit: str) -> None:
        """Follow a job that an earlier connection queued, so that unheard() finds its end."""
        self._jobs.follow(job, verb, unit)

    def unheard(self) -> list[EndedJob]:
        """Return the followed jobs that ended although no signal came. Call it at least every LOOK_SECONDS."""
        found = []
        for path, job in self._jobs.queued().items():
            result = self._unheard(path)
            if result is not None:
                self._jobs.forget(path)
                found.append(EndedJob(path, job.unit, result))
        return found

    def units(self, *patterns: str) -> list[Unit]:
        """Return the loaded units whose names match one of the shell ``patterns``."""
        rows = self._call("list units", "ListUnitsByPatterns", "asas", [], list(patterns)) or []
        # pystemd returns a list of one element as the element.
        rows = [rows] if isinstance(rows, tuple) else rows
        return [
            Unit(name=row[0].decode(), active=ActiveState(row[3].decode()), sub=row[4].decode(), path=row[6].decode())
            for row in rows
        ]

    def unit(self, name: str) -> Unit | None:
        """Return the unit; None if it is not loaded."""
        return next(iter(self.units(name)), None)

    def service_status(self, unit: Unit) -> ServiceStatus:
        """Return the status of the service ``unit``."""
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
        """Call a method of the manager. ``again``: it may be called a second time if there is no answer."""
        encoded = apply_signature(signature.encode(), [encode(argument) for argument in arguments])

        def call() -> Any:
            return self._bus.call_method(_NAME, _PATH, _MANAGER, method.encode(), encoded).body

        if again:
            return patiently(doing, call, patience_seconds=self._patience_seconds)
        with translated(doing), undisturbed():
            return call()

    def _remember(self, path: bytes, verb: str, unit: str) -> str:
        self._jobs.follow(path.decode(), verb, unit)
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
        return self._jobs.take(path) or job.result_by_state(None if unit is None else unit.active)

    def _process(self) -> None:
        with translated("hear from the service manager"), undisturbed():
            # libsystemd handles some messages itself and then looks empty, while others wait that no poll() reports.
            nothing = 0
            while nothing < 2:
                nothing = nothing + 1 if self._bus.process().is_empty() else 0

    def _subscribe(self) -> None:
        """Receive the ends of jobs. Called before the first job is queued, so that no end is missed."""
        if self._is_subscribed:
            return

        def job_removed(message: Any, error: object = None, userdata: object = None) -> None:  # noqa: ARG001
            message.process_reply(False)
            _id, path, unit, result = message.body
            self._jobs.ended(EndedJob(path.decode(), unit.decode(), JobResult(result.decode())))

        # pystemd keeps a pointer to each callback and no reference: this attribute keeps them alive.
        self._on_signal.append(job_removed)
        with translated("listen to the service manager"):
            self._bus.match_signal(self._sender, _PATH, _MANAGER, b"JobRemoved", job_removed)
        with contextlib.suppress(AlreadySubscribedError):
            self._call("subscribe to the service manager", "Subscribe", "")
        self._is_subscribed = True
