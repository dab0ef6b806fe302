"""The observation of one tick: leases, locks, control groups and GPUs, joined into evidence for judge().

It changes nothing and draws no conclusion. Evidence says what could not be read, so that judge() draws none either.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusvc import files, names
from gpusvc.config.host import BusyAction
from gpusvc.files import Stamp
from gpusvc.gpu.meter import Reading
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.state import counters, holdings, keepalive, use
from gpusvc.state import lease as leases
from gpusvc.state.counters import NO_ANSWERS
from gpusvc.state.lease import BrokenLeaseError, Lease
from gpusvc.watchdog.judge import Evidence, GpuEvidence

if TYPE_CHECKING:
    from pathlib import Path

    from gpusvc.config.files import HostConfig, ModelConfig
    from gpusvc.config.host import HostWatchdog
    from gpusvc.config.watched import Watched
    from gpusvc.gpu.meter import Meter
    from gpusvc.gpu.reading import Gpu, Hung
    from gpusvc.paths import Paths
    from gpusvc.state.counters import Answers
    from gpusvc.state.holdings import Holding, Stray

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Observation:
    """What one tick saw. ``now_seconds`` is by CLOCK_BOOTTIME."""

    now_seconds: float
    host: HostConfig | None
    """None: the configuration cannot be read."""
    leases: Mapping[str, Lease]
    evidence: Mapping[str, Evidence]
    gpus: tuple[GpuEvidence, ...]
    unattended: frozenset[str]
    """Models of which a lease or processes are left, but no control group of their service."""
    strays: tuple[Stray, ...]
    problem: str | None
    """Why NVML cannot be read, in a sentence; None: it was read, or was not needed."""
    hung: tuple[Hung, ...] = ()


@dataclass(slots=True)
class _Kept:
    """A lease from its last reading (None: it cannot be read), and the paths of its model's files."""

    stamp: Stamp
    lease: Lease | None
    recorded: dict[int, processes.Process]
    directory: str
    pin: str
    keep: Path
    cgroup: Cgroup | None


class Observer:
    """Makes an observation at each tick. It keeps what did not change since the last one."""

    def __init__(
        self,
        paths: Paths,
        watched: Watched,
        meter: Meter,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        group_of: Callable[[int], Cgroup | None] = Cgroup.of_process,
    ) -> None:
        """
        Args:
            paths: where leases, locks and pins are.
            watched: the configuration.
            meter: reads NVML, only while there is a model with a GPU: an open client keeps GPUs awake, and prevents
                an upgrade of the driver.
            now: returns CLOCK_BOOTTIME, in seconds.
            wall: returns seconds since the epoch.
            group_of: returns the control group of a PID.
        """
        self._paths = paths
        self._services = Cgroup(paths.control_group)
        self._scopes = Cgroup(f"{paths.control_group}/{names.SLICE}")
        self._watched = watched
        self._meter = meter
        self._now = now
        self._wall = wall
        self._group_of = group_of
        self._kept: dict[str, _Kept] = {}

    def look(self, leaving: Collection[str]) -> Observation:
        """Return the observation of this moment. ``leaving`` are the models that the watchdog is stopping."""
        host = self._watched.host()
        self._kept = dict(self._read_leases())
        held = {name: kept.lease for name, kept in self._kept.items() if kept.lease is not None}
        attended = set(filter(None, map(names.of_service, self._services.children())))
        now, wall = self._now(), self._wall()
        configs = self._watched.models(held)
        reading = self._read_gpus(now, wall, held)
        joined = holdings.join(held.values(), reading.gpus, self._group_of)
        answers = counters.answers(counters.directory(self._paths)) if held else {}
        leaving = {*leaving, *_evicted(held, attended)}
        return Observation(
            now_seconds=now,
            host=host,
            leases=held,
            evidence={
                name: self._evidence(
                    joined[name],
                    host,
                    configs[name],
                    reading,
                    now,
                    wall,
                    answers.get(name, NO_ANSWERS),
                    leaving=name in leaving,
                )
                for name in held
            },
            gpus=_free(reading, host),
            unattended=frozenset({*self._kept, *_populated(self._scopes, but=attended)} - attended),
            strays=tuple(stray for holding in joined.values() for stray in holding.strays),
            problem=reading.problem,
            hung=reading.hung,
        )

    def close(self) -> None:
        self._meter.close()

    def _read_leases(self) -> Iterator[tuple[str, _Kept]]:
        """Yield all leases by model; only those whose file changed are read again."""
        # Strings rather than pathlib: this is done for every model at every tick.
        directory = str(self._paths.leases_directory)
        try:
            found = os.listdir(directory)  # noqa: PTH208
        except OSError:
            return
        for name in sorted(filter(names.is_name, found)):
            try:
                stamp = files.stamp(f"{directory}/{name}/lease.json")
            except OSError:
                continue
            before = self._kept.get(name)
            yield name, before if before is not None and before.stamp == stamp else self._read_lease(name, stamp)

    def _read_lease(self, name: str, stamp: Stamp) -> _Kept:
        lease = None
        with contextlib.suppress(BrokenLeaseError):
            lease = leases.read(self._paths, name)
        return _Kept(
            stamp,
            lease,
            recorded={process.pid: process for process in lease.processes} if lease is not None else {},
            directory=str(self._paths.lease_directory(name)),
            pin=str(self._paths.pin_file(name)),
            keep=self._paths.keep_file(name),
            cgroup=Cgroup(lease.cgroup) if lease is not None and lease.cgroup is not None else None,
        )

    def _read_gpus(self, now: float, wall: float, held: Mapping[str, Lease]) -> Reading:
        of_interest = {gpu.uuid for lease in held.values() for gpu in lease.gpus}
        if not of_interest:
            self._meter.close()
            return Reading()
        return self._meter.read(now, wall, of_interest)

    def _evidence(
        self,
        holding: Holding,
        host: HostConfig | None,
        config: ModelConfig | None,
        reading: Reading,
        now: float,
        wall: float,
        answers: Answers | None,
        *,
        leaving: bool,
    ) -> Evidence:
        lease = holding.lease
        name = lease.model
        policy = config or (host.watchdog if host is not None else None)
        is_kept = config is not None and config.serving.keep
        kept = self._kept[name]
        glance = use.glance(kept.directory)
        # A model that somebody froze makes no progress, but is not stuck.
        is_frozen = kept.cgroup is not None and glance.in_use is True and kept.cgroup.frozen()
        idle_timeout = 0.0 if is_kept else _idle_timeout(policy, kept.keep, lease.created)
        attached = None if policy is None else policy.attached_timeout_seconds
        return Evidence(
            name=name,
            run=lease.created,
            ready=lease.ready,
            leaving=leaving,
            missing=self._missing(lease, host, config, reading),
            in_use=glance.in_use,
            last_use=glance.last_use,
            last_progress=glance.last_progress,
            unused_seconds=None if glance.last_use is None else min(max(0.0, wall - glance.last_use), _age(kept, now)),
            gpu_active=_has_worked(lease, reading, holding.inside),
            cpu_seconds=kept.cgroup.cpu_seconds() if kept.cgroup is not None else None,
            gpu_uuids=tuple(gpu.uuid for gpu in lease.gpus),
            vram_bytes=holdings.used_bytes(lease, reading.gpus, holding.pids),
            pinned=(config is not None and config.pinned) or os.path.exists(kept.pin),  # noqa: PTH110
            # While the configuration cannot be read, these values lead to no verdict.
            idle_timeout_seconds=idle_timeout,
            busy_timeout_seconds=policy.busy_timeout_seconds if policy is not None and not is_frozen else 0.0,
            busy_action=policy.busy_action if policy is not None else BusyAction.NONE,
            attached_timeout_seconds=idle_timeout if attached is None or is_kept else attached,
            failing_time_seconds=policy.failing_time_seconds if policy is not None and not is_frozen else 0.0,
            answers=answers,
        )

    def _missing(
        self, lease: Lease, host: HostConfig | None, config: ModelConfig | None, reading: Reading
    ) -> str | None:
        if host is None:
            return "the host's configuration cannot be read."
        # A model whose file was removed follows the host's policy. A file that cannot be read may pin its model.
        if config is None and os.path.lexists(self._paths.model_file(lease.model)):
            return "its configuration cannot be read."
        if not lease.gpus:
            return None
        if reading.problem is not None:
            return reading.problem
        by_uuid = {gpu.uuid: gpu for gpu in reading.gpus}
        for leased in lease.gpus:
            gpu = by_uuid.get(leased.uuid)
            if gpu is None:
                return f"NVML does not show GPU {leased.index}."
            if gpu.problem is not None or gpu.processes is None:
                return f"GPU {gpu.index} cannot be read: {gpu.problem or 'its processes are unknown.'}"
            if gpu.uuid in reading.problems:
                return reading.problems[gpu.uuid]
        return None


def _age(kept: _Kept, now: float) -> float:
    """Return for how long the engine has run, by a clock that nobody sets; 0 if the lease does not record it."""
    engine = None if kept.lease is None else kept.recorded.get(kept.lease.pid or 0)
    return 0.0 if engine is None else max(0.0, now - engine.start_ticks / _TICKS_PER_SECOND)


def _idle_timeout(policy: ModelConfig | HostWatchdog | None, keep: Path, run: float) -> float:
    """Return the idle timeout in effect: a client's, or else the policy's; 0: where the policy is unknown."""
    if policy is None:
        return 0.0
    wanted = keepalive.read(keep, run)
    return policy.idle_timeout_seconds if wanted is None else wanted


def _has_worked(lease: Lease, reading: Reading, pids: frozenset[int]) -> bool | None:
    """Return whether one of its GPUs worked for it; None: it has none, or one that does not report this."""
    by_uuid = {gpu.uuid: gpu for gpu in reading.gpus}
    told = [_worked_for(by_uuid.get(leased.uuid), reading.workers.get(leased.uuid), pids) for leased in lease.gpus]
    if True in told:
        return True
    return None if None in told or not told else False


def _worked_for(gpu: Gpu | None, workers: frozenset[int] | None, pids: frozenset[int]) -> bool | None:
    """Return whether a GPU worked for these processes. It may report its work as a whole, for whatever process."""
    if workers is not None:
        return bool(workers & pids)
    if gpu is None or gpu.utilisation_percent is None:
        return None
    if not gpu.utilisation_percent:
        return False
    is_alone = gpu.processes is not None and all(process.pid in pids for process in gpu.processes)
    return True if is_alone else None


def _free(reading: Reading, host: HostConfig | None) -> tuple[GpuEvidence, ...]:
    if host is None:
        return ()
    reserve = host.gpu.reserve_bytes
    return tuple(GpuEvidence(gpu.uuid, gpu.index, gpu.free_bytes, reserve) for gpu in reading.gpus if gpu.uuid)


def _evicted(held: Mapping[str, Lease], attended: Collection[str]) -> Iterator[str]:
    """Yield the models that starting models evict."""
    for name, lease in held.items():
        if not lease.ready and name in attended:
            yield from lease.evicting


def _populated(scopes: Cgroup, *, but: Collection[str]) -> Iterator[str]:
    for unit in scopes.children():
        name = names.of_scope(unit)
        if name is not None and name not in but and Cgroup(f"{scopes.path}/{unit}").populated():
            yield name
