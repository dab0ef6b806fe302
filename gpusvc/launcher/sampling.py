"""What the lease records of a model that runs: its processes, for the release proof, and the VRAM they hold."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from gpusvc.errors import GpusvcError, NvmlError
from gpusvc.linux import memory, processes
from gpusvc.log import log
from gpusvc.placement.request import HOST_MEMORY
from gpusvc.quantity import MIB
from gpusvc.record import replace
from gpusvc.release import proof
from gpusvc.state import footprints

if TYPE_CHECKING:
    from gpusvc.gpu.reading import Gpu
    from gpusvc.launcher.run import Run
    from gpusvc.linux.cgroup import Cgroup
    from gpusvc.state.lease import LeasedGpu

# How long a sample waits for the driver: health checks must not wait for a GPU that hangs.
_DRIVER_SECONDS = 0.5

# A change of the peak that is worth a write.
_LEARNED_BYTES = 16 * MIB


class Sampler:
    """Keeps the lease and the learned footprint of a run up to date."""

    def __init__(self, run: Run, cgroup: Cgroup) -> None:
        self._run = run
        self._cgroup = cgroup
        self._peaks: dict[str, int] = {}
        self._written = run.lease
        self._apart: set[int] = set()

    def sample(self) -> None:
        """Take one reading of NVML into the lease. What cannot be read keeps its last value."""
        run = self._run
        self._learn_memory()
        if run.driver is None:
            return
        try:
            gpus = run.driver.snapshot(only=run.own_indices(), patience_seconds=_DRIVER_SECONDS, fresh=False)
        except NvmlError as error:
            log(4, f"NVML cannot be read: {error}")
            return
        finally:
            self._set_apart(run.driver.stuck_readers())
        inside = set(self._cgroup.pids())
        listed = {process.pid for gpu in gpus for process in gpu.processes or ()}
        lease = run.lease.seen(processes.identify_all(inside & listed))
        # A process that has ended matters to the proof only while the driver lists it.
        remembered = frozenset(p for p in lease.processes if p.pid in inside or p.pid in listed)
        own = {process.pid for process in remembered}
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        sampled = tuple(_resampled(leased, by_uuid.get(leased.uuid), own) for leased in lease.gpus)
        run.lease = replace(lease, processes=remembered, gpus=sampled)
        self._learn(by_uuid, own)

    def write(self) -> None:
        """Write the lease if it changed. A full file system ends no model: the next write may work."""
        if self._run.lease == self._written:
            return
        try:
            self._run.write_lease()
            self._written = self._run.lease
        except GpusvcError as error:
            log(4, str(error))

    def _set_apart(self, stuck: list[int]) -> None:
        """Let readers that cannot be killed delay no stop of this model."""
        new = set(stuck) - self._apart
        if new:
            from gpusvc.systemd.apart import set_apart  # noqa: PLC0415  rarely needed

            set_apart(new)
            self._apart |= new

    def _learn_memory(self) -> None:
        """Learn the host memory of a model that is ready: a load maps more than the engine keeps."""
        run = self._run
        if not run.lease.ready or run.caller is not None:
            return
        used = memory.used_by(str(self._cgroup.directory), self._cgroup.pids())
        if used > self._peaks.get(HOST_MEMORY, 0) + _LEARNED_BYTES:
            self._peaks[HOST_MEMORY] = used
            footprints.learn(run.paths, run.name, run.lease.config_digest, HOST_MEMORY, used)

    def _learn(self, by_uuid: Mapping[str, Gpu], own: AbstractSet[int]) -> None:
        run = self._run
        for leased in run.lease.gpus:
            gpu = by_uuid.get(leased.uuid)
            if gpu is None or leased.used_bytes is None:
                continue
            held = leased.used_bytes + _managed_bytes(gpu, leased.baseline_bytes, own)
            if held > self._peaks.get(leased.uuid, 0) + _LEARNED_BYTES:
                self._peaks[leased.uuid] = held
                footprints.learn(run.paths, run.name, run.lease.config_digest, gpu.name, held)


def _resampled(leased: LeasedGpu, gpu: Gpu | None, pids: AbstractSet[int]) -> LeasedGpu:
    if gpu is None or gpu.problem is not None or gpu.processes is None:
        return leased
    baseline = proof.baseline_bytes(gpu, processes.identify, pids)
    if baseline is None:
        baseline = leased.baseline_bytes
    elif leased.baseline_bytes is not None and any(process.pid in pids for process in gpu.processes):
        # The driver attributes managed memory to no process: what seems to be nobody's may be the model's own.
        baseline = min(baseline, leased.baseline_bytes)
    return replace(leased, baseline_bytes=baseline, used_bytes=gpu.used_by(pids))


def _managed_bytes(gpu: Gpu, baseline_bytes: int | None, own: AbstractSet[int]) -> int:
    """Return the managed memory of the model on ``gpu``, as far as it can be told: if no other process is there."""
    others = (process.pid for process in gpu.processes or () if process.pid not in own)
    rest = proof.unattributed_bytes(gpu, processes.identify, own)
    if rest is None or baseline_bytes is None or any(processes.identify(pid) for pid in others):
        return 0
    return max(0, rest - baseline_bytes)
