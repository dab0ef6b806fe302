"""The values of one reading of a GPU by NVML."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gpusvc.record import Record


class GpuProcess(Record):
    """One process that has a context on a GPU. ``used_bytes`` None: NVML does not report it (MIG, some containers)."""

    pid: int
    used_bytes: int | None


class ProcessSample(Record):
    """The share of the GPU's time that one process had until ``timestamp_us`` (epoch)."""

    pid: int
    sm_percent: int
    timestamp_us: int


class Gpu(Record):
    """One GPU at one moment. None means that NVML does not report the value, never zero.

    ``index`` is NVML's (PCI order) and ``minor`` the N of ``/dev/nvidiaN``; they may differ. Where ``problem`` is set
    the GPU could not be read: the readings are None then, and its UUID, name, minor and bus ID are those of an earlier
    reading, or empty. Bytes are None where memory is unified with the CPU's.
    """

    index: int
    uuid: str
    name: str
    minor: int | None
    pci_bus_id: str
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    processes: tuple[GpuProcess, ...] | None = None
    utilisation_percent: int | None = None
    mig: bool = False
    exclusive: bool = False
    """Whether its compute mode lets one process in only (EXCLUSIVE_PROCESS)."""
    prohibited: bool = False
    """Whether its compute mode lets no process in (PROHIBITED)."""
    problem: str | None = None

    @property
    def node(self) -> str | None:
        return None if self.minor is None else f"/dev/nvidia{self.minor}"

    @property
    def is_unified(self) -> bool:
        """Whether it has no memory of its own: VRAM is host memory. A GPU that cannot be read does not count as one."""
        return self.total_bytes is None and self.problem is None

    def used_by(self, pids: Collection[int]) -> int | None:
        """Return the bytes that these processes hold. NVML under-counts managed memory. None: unknown."""
        if self.processes is None:
            return None
        return total(process.used_bytes for process in self.processes if process.pid in pids)


class Hung(Record):
    """A GPU about which the driver does not answer, or the whole driver (``index`` is reader.LIBRARY then).

    ``since_seconds`` is by CLOCK_MONOTONIC. UUID, name, minor and bus ID are empty or None if they were never read.
    """

    index: int
    since_seconds: float
    uuid: str = ""
    name: str = ""
    minor: int | None = None
    pci_bus_id: str = ""


def total(values: Iterable[int | None]) -> int | None:
    """Return the sum; None if one of the values is None (unknown)."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
