"""One GPU through NVML's functions: its name, memory, processes and work. It knows NVML's quirks and judges nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from gpusvc.gpu import returns
from gpusvc.gpu.reading import Gpu, GpuProcess, ProcessSample, total
from gpusvc.record import replace

# How often memory and processes are read again while the memory in use changes.
_TRIES_FOR_ONE_MOMENT = 5

_MAX_TRIES = 5


class Device:
    """One GPU by its handle. A new one for each reading: it costs little, and a kept handle is invalid after a reset.

    Its methods raise the exceptions of pynvml, the module that is passed in.
    """

    def __init__(self, nv: ModuleType, handle: object) -> None:
        self._nv = nv
        self._handle = handle
        # For symbols that the driver lacks, newer releases raise this, which is not a subclass of NVMLError.
        self._mismatch = getattr(nv, "NVMLLibraryMismatchError", nv.NVMLError)

    def named(self, index: int) -> Gpu:
        """Return the GPU's identity, without readings."""
        nv, handle = self._nv, self._handle
        pci = self._optional(nv.nvmlDeviceGetPciInfo, handle)
        return Gpu(
            index=index,
            uuid=text(nv.nvmlDeviceGetUUID(handle)),
            name=text(nv.nvmlDeviceGetName(handle)),
            minor=self._optional(nv.nvmlDeviceGetMinorNumber, handle),
            pci_bus_id="" if pci is None else text(pci.busId),
        )

    def read(self, named: Gpu, *, processes: bool, utilisation: bool) -> Gpu:
        """Return ``named`` with the readings of this moment."""
        (size, used, free), listed = self._memory_and_processes(processes=processes)
        if _is_numa_node(named.pci_bus_id):
            used = None  # it may include the kernel's page cache
        mode = self._optional(self._nv.nvmlDeviceGetMigMode, self._handle)
        return replace(
            named,
            total_bytes=size,
            used_bytes=used,
            free_bytes=free,
            processes=listed,
            utilisation_percent=self._utilisation() if utilisation else None,
            mig=mode is not None and bool(mode[0]),
        )

    def process_utilisation(self, since_us: int) -> tuple[tuple[ProcessSample, ...] | None, int]:
        """Return what Nvml.process_utilisation() returns."""
        nv = self._nv
        try:
            entries = self._optional(self._despite_growth, nv.nvmlDeviceGetProcessUtilization, self._handle, since_us)
        except nv.NVMLError as error:
            # Where there are no samples, pynvml may also raise an error with the code of success.
            if error.value not in (returns.NOT_FOUND, returns.SUCCESS):
                raise
            entries = ()
        if entries is None:
            return None, since_us
        # Drivers leave entries in the buffer that are empty, old, or out of range.
        samples = tuple(
            ProcessSample(entry.pid, entry.smUtil, entry.timeStamp)
            for entry in entries
            if entry.pid and entry.timeStamp > since_us and entry.smUtil <= 100
        )
        return samples, max((sample.timestamp_us for sample in samples), default=since_us)

    def _optional(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Return what ``call`` returns; None where this driver or this GPU does not support it."""
        try:
            return call(*arguments)
        except self._nv.NVMLError as error:
            if error.value in returns.ABSENT:
                return None
            raise
        except self._mismatch:
            return None

    def _memory_and_processes(
        self, *, processes: bool
    ) -> tuple[tuple[int | None, int | None, int | None], tuple[GpuProcess, ...] | None]:
        """Return memory and processes of the same moment, as far as possible: NVML has no single call for both.

        If a process allocated between the two calls, other processes would seem to free or take memory.
        """
        memory = self._memory()
        if not processes:
            return memory, None
        for _ in range(_TRIES_FOR_ONE_MOMENT):
            before, listed = memory, self._processes()
            memory = self._memory()
            if memory == before:
                break
        return memory, listed

    def _memory(self) -> tuple[int | None, int | None, int | None]:
        """Return total, used and free bytes.

        The second version of the call reports the driver's own memory apart from the used bytes. The first version
        counts it as used or not, depending on the driver. This is not corrected: used bytes are only compared with
        earlier ones of the same driver, and free bytes mean the same in both versions.
        """
        version = getattr(self._nv, "nvmlMemory_v2", None)
        memory = None
        try:
            if version is not None:
                memory = self._nv.nvmlDeviceGetMemoryInfo(self._handle, version)
        except self._nv.NVMLError as error:
            if error.value not in returns.NO_MEMORY_V2:
                raise
        if memory is None:
            memory = self._optional(self._nv.nvmlDeviceGetMemoryInfo, self._handle)
        if memory is None or not memory.total:
            return None, None, None
        return memory.total, memory.used, memory.free

    def _utilisation(self) -> int | None:
        try:
            rates = self._optional(self._nv.nvmlDeviceGetUtilizationRates, self._handle)
        except self._nv.NVMLError as error:
            if error.value in returns.STALE:
                raise
            return None
        return None if rates is None else int(rates.gpu)

    def _processes(self) -> tuple[GpuProcess, ...] | None:
        """Return all processes with a context, by PID; None if NVML does not give one of the lists."""
        lists = [self._process_list(kind) for kind in ("Compute", "Graphics")]
        known = [entries for entries in lists if entries is not None]
        return _joined(known) if len(known) == len(lists) else None

    def _process_list(self, kind: str) -> list[Any] | None:
        # Entries of the second version (drivers before 510) have the layout of the third.
        for version in ("_v3", "_v2"):
            call = getattr(self._nv, f"nvmlDeviceGet{kind}RunningProcesses{version}", None)
            if call is None:
                continue
            try:
                entries: list[Any] | None = self._optional(self._despite_growth, call, self._handle)
            except self._nv.NVMLError as error:
                if error.value in returns.STALE:
                    raise
                return None
            if entries is not None:
                return entries
        return None

    def _despite_growth(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Return what ``call`` returns. Repeat it if the list grew between its requests for size and entries."""
        for _ in range(_MAX_TRIES - 1):
            try:
                return call(*arguments)
            except self._nv.NVMLError as error:
                if error.value != returns.INSUFFICIENT_SIZE:
                    raise
        return call(*arguments)


def _joined(lists: Iterable[list[Any]]) -> tuple[GpuProcess, ...]:
    """Return the processes of NVML's lists, by PID.

    A process that computes and draws is in both lists, each time with all the memory that it holds: the larger number
    counts. A process that is in one list more than once holds memory of several MIG instances: their sum counts.
    """
    held: dict[int, int | None] = {}
    for entries in lists:
        for pid in {entry.pid for entry in entries}:
            used = total(entry.usedGpuMemory for entry in entries if entry.pid == pid)
            before = held.get(pid)
            held[pid] = before if used is None else used if before is None else max(before, used)
    return tuple(GpuProcess(pid, used) for pid, used in sorted(held.items()))


def _is_numa_node(pci_bus_id: str) -> bool:
    """Return whether the kernel manages the GPU's memory, as on GH200 (driver README, "NUMA status")."""
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        status = Path(f"/proc/driver/nvidia/gpus/{domain[-4:]}:{rest}/numa_status").read_text()
    except OSError:
        return False
    return "online" in status.lower()


def text(value: str | bytes) -> str:
    """Return a text of pynvml, which is str or bytes, depending on its release."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
