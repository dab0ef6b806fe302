"""The release of a model: stop its scope, wait for an empty control group, prove its VRAM free, drop its lease.

It runs as ExecStopPost= of model@.service after every end of the service, at the beginning of the next start, as
`gpusvc release`, and as gpusvc-release@.service where the watchdog finds leftovers. Only a proof removes a lease.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.errors import GpusvcError, NvmlError, NvmlSilentError, UnreleasedError, UsageError
from gpusvc.gpu.reading import total
from gpusvc.journal import events
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.quantity import format_size, shown
from gpusvc.record import Record, replace
from gpusvc.release import proof
from gpusvc.release.proof import Obstacle
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError, Lease
from gpusvc.systemd.notify import ROPE_SECONDS, Notifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpusvc.gpu.driver import Driver
    from gpusvc.gpu.reading import Gpu
    from gpusvc.systemd.manager import Manager

# NVML has no event to wait for, and its process lists take the driver's lock: read often at first, then less often.
_FIRST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.5

# How long one reading waits for the driver. In between, systemd and the operator hear what the release waits for.
_SHORTEST_READING_SECONDS = 1.0
_LONGEST_READING_SECONDS = 5.0

# How long the driver may take to free memory where bytes may be those of other programs: they never go then.
_OTHERS_SECONDS = 5.0

# The two clocks of _asleep_seconds() are read one after the other.
_RESUMED_SECONDS = 0.5

# How long to wait for another release, such as an operator's `gpusvc release`.
_PATIENCE_SECONDS = 30.0

# After the model's stop_timeout: time for PID 1 to send SIGKILL to all processes and for them to end.
_KILL_GRACE_SECONDS = 5.0


class Release(Record):
    """A proven release: the VRAM that came back (``bytes`` None: unknown), and how long the proof took."""

    model: str
    bytes: int | None
    seconds: float
    gpus: tuple[int, ...]

    def __str__(self) -> str:
        if not self.gpus:
            return f"{self.model} is released after {self.seconds:.2f} s: no process of it is left."
        where = "GPU " + ", ".join(map(str, self.gpus))
        held = "its VRAM" if self.bytes is None else f"{format_size(self.bytes)} of VRAM"
        back = f"{held} on {where} came back"
        return f"{self.model} is released after {self.seconds:.2f} s: no process of it is left, {back}."

    def tell(self) -> None:
        """Write the release to the journal."""
        events.emit(events.EventType.RELEASE, str(self), model=self.model, gpu=self.gpus, bytes=self.bytes)


def release(
    paths: Paths,
    name: str,
    *,
    on_wait: Callable[[str], None] = lambda _: None,
    patience_seconds: float | None = None,
    driver: Driver | None = None,
) -> Release | None:
    """Prove the release of ``name`` and drop its lease. Return None if it held nothing. Call it within lease.hold().

    Args:
        paths: where the lease is.
        name: the model.
        on_wait: called with a sentence on what the release waits for, about twice a second.
        patience_seconds: a limit for the driver's time, if it is lower than the model's own release_timeout.
        driver: one that the caller has started; None: another one is started if it is needed.

    Raises:
        UnreleasedError: it is not proven; the lease stays.
    """
    # Without a readable lease, the processes can only be in the model's scope.
    scope = f"{paths.control_group}/{names.SLICE}/{names.scope(name)}"
    unknown = Lease(model=name, port=0, gpus=(), created=0.0, cgroup=scope)
    try:
        lease = leases.read(paths, name)
    except BrokenLeaseError as error:
        log(4, str(error))
        _empty(unknown, Cgroup(scope), on_wait)
        leases.set_aside(paths, name)
        return Release(model=name, bytes=None, seconds=0.0, gpus=())
    if lease is None:
        if not Cgroup(scope).populated():
            return None
        lease = unknown
    leases.withdraw(paths, lease)
    if patience_seconds is not None:
        lease = replace(lease, release_timeout_seconds=min(patience_seconds, lease.release_timeout_seconds))
    began = time.monotonic()
    if lease.cgroup is not None:
        lease = _empty(lease, Cgroup(lease.cgroup), on_wait)
    if lease.gpus:
        _prove(paths, lease, driver, on_wait)
    leases.remove(paths, name)
    return Release(
        model=name,
        bytes=total(gpu.used_bytes for gpu in lease.gpus),
        seconds=time.monotonic() - began,
        gpus=tuple(gpu.index for gpu in lease.gpus),
    )


def _prove(paths: Paths, lease: Lease, driver: Driver | None, on_wait: Callable[[str], None]) -> None:
    """Wait for the proof from ``driver``, or from a driver that is started for it."""
    with contextlib.ExitStack() as stack:
        if driver is None:
            from gpusvc.gpu.driver import Driver  # noqa: PLC0415  a model without GPUs needs no driver
            from gpusvc.state import hung  # noqa: PLC0415

            driver = stack.enter_context(Driver(step_seconds=None, hung=hung.read(paths)))
        stack.callback(_leave, driver)
        _wait_for_vram(lease, driver, on_wait)


def _empty(lease: Lease, cgroup: Cgroup, on_wait: Callable[[str], None]) -> Lease:
    """Stop the scope and wait until no process is in it. Return the lease with the processes that were in it."""
    if not cgroup.populated():
        return lease
    lease = lease.seen(processes.identify_all(cgroup.pids()))
    _stop_scope(lease.scope, cgroup)
    deadline = time.monotonic() + lease.stop_timeout_seconds + _KILL_GRACE_SECONDS
    while not cgroup.wait_empty(0.5):
        on_wait(f"Stopping: {_count(cgroup)} of {lease.model} still there.")
        if time.monotonic() > deadline:
            break
    else:
        return lease
    # PID 1 should have sent SIGKILL by now. It may be unreachable, so the kernel does it.
    try:
        cgroup.kill()
    except OSError as error:
        log(4, f"cgroup.kill of {lease.scope}: {os.strerror(error.errno or 0)}.")
    deadline = time.monotonic() + lease.release_timeout_seconds
    while not cgroup.wait_empty(0.5):
        on_wait(f"Stopping: {_count(cgroup)} of {lease.model} still there, after SIGKILL.")
        if time.monotonic() > deadline:
            left = [Obstacle(f"PID {pid} survives SIGKILL", pid) for pid in cgroup.pids()]
            raise _unreleased(lease, left, lease.stop_timeout_seconds + lease.release_timeout_seconds)
    return lease


def _count(cgroup: Cgroup) -> str:
    number = len(cgroup.pids())
    return "1 process" if number == 1 else f"{number} processes"


def _stop_scope(scope: str, cgroup: Cgroup) -> None:
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  rarely needed: PID 1 has mostly emptied the scope

    try:
        with Manager() as manager:
            if manager.unit(scope) is not None:
                if cgroup.frozen():  # systemd does not stop a frozen scope
                    _thaw(manager, scope)
                manager.enqueue("Stop", scope)
    except GpusvcError as error:
        if cgroup.populated():  # otherwise the scope has ended by itself
            log(4, str(error))


def _thaw(manager: Manager, scope: str) -> None:
    try:
        manager.thaw(scope)
    except GpusvcError as error:
        log(4, f"{error} Sending it SIGKILL.")  # a slice above it may be frozen; SIGKILL works all the same
        manager.kill(scope, signal.SIGKILL)


def _wait_for_vram(lease: Lease, driver: Driver, on_wait: Callable[[str], None]) -> None:
    began = told = time.monotonic()
    asleep = _asleep_seconds()
    pause = _FIRST_PAUSE_SECONDS
    while True:
        if _asleep_seconds() - asleep > _RESUMED_SECONDS:
            # The driver frees memory after the machine resumes, not while it sleeps.
            asleep, began = _asleep_seconds(), time.monotonic()
        left_seconds = began + lease.release_timeout_seconds - time.monotonic()
        try:
            gpus = _read(lease, driver, min(max(left_seconds, _SHORTEST_READING_SECONDS), _LONGEST_READING_SECONDS))
            left = proof.obstacles(lease, gpus, processes.identify)
        except NvmlSilentError as error:
            left = [Obstacle(str(error))]  # the next reading waits for the same answer
        except NvmlError as error:
            # Unknown does not count as released. A new client may succeed.
            left = [Obstacle(str(error))]
            driver.close()
        if not left:
            return
        now = time.monotonic()
        if all(obstacle.may_be_of_others for obstacle in left) and now - began > min(
            _OTHERS_SECONDS, lease.release_timeout_seconds
        ):
            log(5, f"{left[0].sentence}. They are taken for memory of the other programs there.")
            return
        if now - began > lease.release_timeout_seconds:
            raise _unreleased(lease, left, now - began)
        if now - told > _LONGEST_PAUSE_SECONDS:
            on_wait(f"Stopping: {left[0].sentence.rstrip('.')}.")
            told = now
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def _asleep_seconds() -> float:
    """Return how long the machine has slept since it was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


def _leave(driver: Driver) -> None:
    """Let no reader that cannot be killed delay the end of this unit."""
    stuck = driver.stuck_readers()
    if stuck:
        from gpusvc.systemd.apart import set_apart  # noqa: PLC0415  rarely needed

        set_apart(stuck)


def _read(lease: Lease, driver: Driver, patience_seconds: float) -> Sequence[Gpu]:
    """Return the GPUs that the proof needs: those of the lease, if a device filter kept the model off all others.

    A GPU that hangs must not delay the release of models on the other GPUs, so the driver is not asked about it.
    """
    if lease.fenced:
        own = driver.snapshot(only=[gpu.index for gpu in lease.gpus], patience_seconds=patience_seconds)
        if {gpu.uuid for gpu in lease.gpus} <= {gpu.uuid for gpu in own}:
            return own
    return driver.snapshot(patience_seconds=patience_seconds)


def _unreleased(lease: Lease, left: list[Obstacle], seconds: float) -> UnreleasedError:
    lines = [f"{lease.model} is stuck: its release is not proven after {seconds:.0f} s."]
    lines += [f"{obstacle.sentence.rstrip('.')}." for obstacle in left]
    for pid in sorted({obstacle.pid for obstacle in left if obstacle.pid is not None}):
        trace = processes.trace(pid)
        state = "no such process" if trace.state is None else f"state {trace.state}"
        lines.append(f"PID {pid}: {trace.command}, {state}; kernel stack: {trace.stack or 'not readable'}")
    return UnreleasedError(
        "\n".join(lines),
        hint=f"Its VRAM counts as taken. `gpusvc release {lease.model}` tries the proof again, and with --forget "
        "drops the lease without a proof. A process in state D "
        "that SIGKILL does not end hangs in the driver: dmesg may say why, and a GPU reset (nvidia-smi --gpu-reset) "
        "or a reboot ends it.",
    )


def _fail_stop(service: str) -> None:
    """Have `systemctl stop` exit with 1. systemd itself ends a stop job well, even if ExecStopPost= fails."""
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  only for this end

    try:
        with Manager() as manager:
            manager.cancel_stop(service)
    except GpusvcError as error:
        log(4, f"`systemctl stop` may report success: {error}")


def main() -> int:
    """ExecStopPost= of model@NAME.service: the exit status is 0 only for a proven release."""
    name, paths, notifier = sys.argv[1], Paths.here(), Notifier()
    if not names.is_name(name):
        log(3, f"{shown(name)} cannot be a model's name.")
        return UsageError.exit_code

    notifier.extend_timeout(ROPE_SECONDS)
    try:
        with leases.hold(paths, name, patience_seconds=_PATIENCE_SECONDS):
            released = release(paths, name, on_wait=notifier.waiting)
    except UsageError as error:
        log(4, str(error))  # another process holds the lock, so the release was not tried
        return error.exit_code
    except GpusvcError as error:
        notifier.status(error.message.replace("\n", " "))
        events.emit(events.EventType.UNRELEASED, str(error), model=name, level=3)
        _fail_stop(names.service(name))
        return error.exit_code
    except OSError as error:
        log(3, f"The release of {name} could not be proven: {error}.")
        return 1
    if released is not None:
        released.tell()
    return 0
