"""A lease: the GPUs and VRAM that one model holds, from its placement to the proof of its release.

A file in /run for each model, which the launcher writes and only a proven release removes. It survives all processes of
gpusvc, but not a reboot, which the model does not survive either.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Self

from gpusvc import files, names
from gpusvc.errors import GpusvcError, PermissionDeniedError, UsageError
from gpusvc.linux.processes import Process, identify
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.record import Record, as_dict, replace
from gpusvc.state import locks

VERSION = 1

# Larger than any time that gpusvc writes, in seconds.
_MAX_SECONDS = 2.0**40

# The largest pid_t.
_MAX_PID = 2**31 - 1

# is_held() takes the lock for microseconds; hold() waits longer than that.
_ONLOOKER_SECONDS = 0.5


class BrokenLeaseError(GpusvcError):
    """A lease file cannot be read or has invalid contents."""


class LeasedGpu(Record):
    """One GPU of a lease; the index is the one that NVML gave when the model was placed."""

    index: int
    uuid: str
    reserved_bytes: int | None
    """The model's need per GPU by its configuration; None: not configured."""
    baseline_bytes: int | None
    """Bytes in use that NVML attributes to no process, at the last consistent reading; None: unknown."""
    used_bytes: int | None = None
    """Bytes that the model's processes held at the last reading; None: unknown."""


class Lease(Record):
    """The lease of one model. ``created`` is in seconds since the epoch."""

    model: str
    port: int
    gpus: tuple[LeasedGpu, ...]
    created: float
    config_digest: str = ""
    release_timeout_seconds: float = 30.0
    stop_timeout_seconds: float = 10.0
    ram_bytes: int | None = None
    """The host memory that the model was promised; None: unknown, or none."""
    evicting: tuple[str, ...] = ()
    """The models that are evicted for this one while it starts."""
    ready: bool = False
    pid: int | None = None
    """The engine's main process."""
    address: str | None = None
    """The address at which the engine listens; None: it does not serve yet, or its end has begun."""
    socket_cgroup_id: int | None = None
    """The control group in which the engine's listening socket was made, by the kernel's number; None: unknown."""
    cgroup: str | None = None
    """The scope's control group; None: no engine has entered it yet."""
    processes: frozenset[Process] = frozenset()
    """Every process of the model that was seen."""
    fenced: bool = False
    """Whether a device filter keeps the engine off all other GPUs."""

    @property
    def scope(self) -> str:
        return names.scope(self.model)

    def seen(self, processes: Collection[Process]) -> Self:
        """Return this lease with ``processes`` added to its processes."""
        return (
            self if self.processes.issuperset(processes) else replace(self, processes=self.processes.union(processes))
        )

    def owned(self, pid: int, identify: Callable[[int], Process | None] = identify) -> Process | None:
        """Return the process of the model that has ``pid``, a PID that NVML lists, or None if it is not the model's.

        A PID that another process has now is not the model's. A PID that no process has any more is the model's: the
        driver still holds memory for it.
        """
        known = [process for process in self.processes if process.pid == pid]
        now = identify(pid) if known else None
        return next((process for process in known if now in {process, None}), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            **as_dict(self),
            "gpus": [as_dict(gpu) for gpu in self.gpus],
            "processes": sorted(self.processes),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of to_json(); raises KeyError, TypeError or ValueError for anything else."""
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']!r}")
        return cls(
            model=str(value["model"]),
            port=_within(value["port"], 65535),
            gpus=tuple(
                LeasedGpu(
                    index=_within(gpu["index"]),
                    uuid=str(gpu["uuid"]),
                    reserved_bytes=_optional(gpu["reserved_bytes"]),
                    baseline_bytes=_optional(gpu["baseline_bytes"]),
                    used_bytes=_optional(gpu["used_bytes"]),
                )
                for gpu in value["gpus"]
            ),
            created=_seconds(value["created"]),
            config_digest=str(value["config_digest"]),
            release_timeout_seconds=_seconds(value["release_timeout_seconds"]),
            stop_timeout_seconds=_seconds(value["stop_timeout_seconds"]),
            ram_bytes=_optional(value.get("ram_bytes")),
            evicting=tuple(map(str, value.get("evicting", ()))),
            ready=bool(value["ready"]),
            pid=None if value["pid"] is None else _within(value["pid"], _MAX_PID),
            address=None if value["address"] is None else str(value["address"]),
            socket_cgroup_id=_optional(value.get("socket_cgroup_id")),
            cgroup=None if value["cgroup"] is None else str(value["cgroup"]),
            fenced=value.get("fenced") is True,
            processes=frozenset(Process(_within(pid, _MAX_PID), _within(ticks)) for pid, ticks in value["processes"]),
        )


def write(paths: Paths, lease: Lease) -> None:
    """Write the lease, whole or not at all.

    Raises:
        GpusvcError: the file system does not take it.
    """
    target = paths.lease_file(lease.model)
    try:
        files.make_directory(target.parent)
        files.write(target, json.dumps(lease.to_json()) + "\n")
    except OSError as error:
        raise GpusvcError(f"The lease {target} cannot be written: {os.strerror(error.errno or 0)}.") from error


def read(paths: Paths, model: str) -> Lease | None:
    """Return the lease of ``model``, or None if it holds nothing.

    Raises:
        BrokenLeaseError: the file cannot be read or its contents are invalid.
    """
    file = paths.lease_file(model)
    try:
        lease = Lease.from_json(json.loads(files.read(file)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BrokenLeaseError(
            f"The lease {file} cannot be read ({type(error).__name__}: {error}).",
            hint=f"`gpusvc release {model}` sets it aside once nothing of the model is left.",
        ) from error
    if lease.model != model:
        raise BrokenLeaseError(
            f"The lease {file} is that of {lease.model!r}.", hint=f"`gpusvc release {model}` sets it aside."
        )
    if lease.cgroup is not None and not _is_scope(lease.cgroup, lease.scope):
        # A release kills every process in this group.
        raise BrokenLeaseError(
            f"The lease {file} names the control group {lease.cgroup}, which is not that of a model.",
            hint=f"`gpusvc release {model}` sets it aside.",
        )
    return lease


def withdraw(paths: Paths, lease: Lease) -> None:
    """Remove the address from the lease file, so that no client connects to the engine: the first step of an end.

    Once the engine has closed its port, another program can listen on it. If the file cannot be written, the end goes
    on: the proof removes the file.
    """
    if lease.address is not None:
        try:
            write(paths, replace(lease, address=None))
        except GpusvcError as error:
            log(4, str(error))


def remove(paths: Paths, model: str) -> None:
    """Remove the lease file. Only for a proven release."""
    paths.lease_file(model).unlink(missing_ok=True)


def set_aside(paths: Paths, model: str) -> None:
    """Rename a lease that cannot be read, so that it does not count, and a person can inspect it."""
    file = paths.lease_file(model)
    file.replace(file.with_suffix(".broken"))


def holders(paths: Paths) -> list[str]:
    """Return the models that have a lease file, readable or not."""
    return sorted(file.parent.name for file in paths.leases_directory.glob("*/lease.json"))


@contextmanager
def hold(paths: Paths, name: str, *, patience_seconds: float = _ONLOOKER_SECONDS) -> Iterator[None]:
    """Hold the model's lock: only its holder makes or drops the lease. The kernel releases it when the holder dies.

    Args:
        paths: where the lease is.
        name: the model.
        patience_seconds: how long to wait for another holder.

    Raises:
        UsageError: another process holds it: the model runs, starts or is being stopped.
        PermissionDeniedError: the caller may not.
    """
    file = paths.lease_directory(name) / "lock"
    try:
        # Users of the model may already wait for the door in this directory, so it must be open to them at once.
        files.make_directory(file.parent)
        handle = locks.open_private(file)
    except PermissionError:
        raise PermissionDeniedError(f"You may not change {file}.", hint="Try again as root, or with sudo.") from None
    except OSError as error:
        raise GpusvcError(
            f"{file} cannot be made: {os.strerror(error.errno or 0) if error.errno else error}."
        ) from None
    try:
        if not locks.lock_within(handle, locks.EXCLUSIVE, patience_seconds):
            raise UsageError(f"{name} is running, starting or stopping.", hint=f"`gpusvc stop {name}` stops it.")
        yield
    finally:
        os.close(handle)


def is_held(paths: Paths, name: str) -> bool:
    """Return whether a process is within hold(): the model's launcher as long as it lives, or a release. For root."""
    try:
        handle = files.open_regular(paths.lease_directory(name) / "lock")
    except (OSError, ValueError):
        return False
    try:
        return not locks.try_lock(handle, locks.SHARED)
    finally:
        os.close(handle)


def _is_scope(cgroup: str, scope: str) -> bool:
    *parents, name = cgroup.split("/")
    return name == scope and parents[:1] == [""] and not {".", ".."}.intersection(parents) and "\0" not in cgroup


def _optional(value: Any) -> int | None:
    return None if value is None else _within(value)


def _within(value: Any, maximum: int = 2**64 - 1) -> int:
    """Return a number that is not negative; raises ValueError, TypeError or OverflowError for anything else."""
    number = int(value)
    if not 0 <= number <= maximum:
        raise ValueError("a number is out of range")
    return number


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not (math.isfinite(seconds) and 0 <= seconds <= _MAX_SECONDS):
        raise ValueError("a time is out of range")
    return seconds
