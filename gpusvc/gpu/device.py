"""One GPU through NVML's functions: its name, memory, processes and work. It knows NVML's quirks and judges nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from gpusvc.gpu import returns
from gpusvc.gpu.nodes import pci_address
from gpusvc.gpu.reading import Gpu, GpuProcess, ProcessSample, total
from gpusvc.record import replace

DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")

# How often memory and processes are read again while the memory in use changes.
_TRIES_FOR_ONE_MOMENT = 5

_MAX_TRIES = 5

# The drivers whose third version of the process lists has entries of another size (nvitop, pull request 79).
_FIRST_LARGER = (535, 43)
_FIRST_MENDED = (535, 154, 5)

# nvmlComputeMode_t
_EXCLUSIVE = (1, 3)  # of a thread, which drivers no longer have, and of a process
_PROHIBITED = 2

_MAX_PID = 2**31 - 1


class Device:
    """One GPU by its handle. A new one for each reading: it costs little, and a kept handle is invalid after a reset.

    Its methods raise the exceptions of pynvml, the module that is passed in.
    """

    def __init__(self, nv: ModuleType, handle: object, driver_version: str = "") -> None:
        self._nv = nv
        self._has_larger_entries = _FIRST_LARGER <= _numbers(driver_version) < _FIRST_MENDED
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
        mode = self._optional(self._nv.nvmlDeviceGetMigMode, self._handle)
        mig = mode is not None and bool(mode[0])
        (size, used, free), listed = self._memory_and_processes(processes=processes, mig=mig)
        compute = self._optional(self._nv.nvmlDeviceGetComputeMode, self._handle)
        if _is_numa_node(named.pci_bus_id):
            # The kernel's page cache may fill the rest, and gives way to programs. So it is neither used nor taken.
            attributed = None if listed is None else total(process.used_bytes for process in listed)
            used = None
            free = free if size is None or attributed is None else max(free or 0, size - attributed)
        return replace(
            named,
            total_bytes=size,
            used_bytes=used,
            free_bytes=free,
            processes=listed,
            utilisation_percent=self.utilisation() if utilisation else None,
            mig=mig,
            exclusive=compute in _EXCLUSIVE,
            prohibited=compute == _PROHIBITED,
        )

    def process_utilisation(self, since_us: int) -> tuple[tuple[ProcessSample, ...] | None, int]:
        """Return what Nvml.process_utilisation() returns."""
        entries = None
        # Some newer GPUs (Blackwell, GB10) support the second function only; older drivers have the first one only.
        for name in ("nvmlDeviceGetProcessUtilization", "nvmlDeviceGetProcessesUtilizationInfo"):
            call = getattr(self._nv, name, None)
            if entries is None and call is not None:
                entries = self._work(call, since_us)
        if entries is None:
            return None, since_us
        # Drivers leave entries in the buffer that are empty, old, or out of range.
        samples = tuple(
            ProcessSample(entry.pid, entry.smUtil, entry.timeStamp)
            for entry in entries
            if entry.pid and entry.timeStamp > since_us and entry.smUtil <= 100
        )
        return samples, max((sample.timestamp_us for sample in samples), default=since_us)

    def utilisation(self) -> int | None:
        """Return the share of time in which the GPU worked for anybody, in percent; None: unknown."""
        try:
            rates = self._optional(self._nv.nvmlDeviceGetUtilizationRates, self._handle)
        except self._nv.NVMLError as error:
            if error.value in returns.STALE:
                raise
            return None
        return None if rates is None else int(rates.gpu)

    def _work(self, call: Callable[..., Any], since_us: int) -> Iterable[Any] | None:
        """Return the samples of ``call``; None where it is not supported."""
        try:
            entries: Iterable[Any] | None = self._optional(self._despite_growth, call, self._handle, since_us)
        except self._nv.NVMLError as error:
            # Where there are no samples, pynvml may also raise an error with the code of success.
            if error.value not in (returns.NOT_FOUND, returns.SUCCESS):
                raise
            return ()
        return entries

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
        self, *, processes: bool, mig: bool
    ) -> tuple[tuple[int | None, int | None, int | None], tuple[GpuProcess, ...] | None]:
        """Return memory and processes of the same moment, as far as possible: NVML has no single call for both.

        If a process allocated between the two calls, other processes would seem to free or take memory.
        """
        memory = self._memory()
        if not processes:
            return memory, None
        for _ in range(_TRIES_FOR_ONE_MOMENT):
            before, listed = memory, self._processes(memory[0], mig=mig)
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

    def _processes(self, size: int | None, *, mig: bool) -> tuple[GpuProcess, ...] | None:
        """Return all processes with a context, by PID; None if NVML does not give one of the lists."""
        lists = [self._process_list(kind) for kind in ("Compute", "Graphics")]
        known = [entries for entries in lists if entries is not None and _is_plausible(entries, size)]
        return _joined(known, mig=mig) if len(known) == len(lists) else None

    def _process_list(self, kind: str) -> list[Any] | None:
        # Entries of the second version (drivers before 510) have the layout of the third. Some drivers of branch 535
        # fill the third with larger entries than NVML's header says.
        for version in ("_v2", "_v3") if self._has_larger_entries else ("_v3", "_v2"):
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


def _is_plausible(entries: Iterable[Any], size: int | None) -> bool:
    """Return whether the entries can be true. A list of another layout than expected has PIDs and bytes that cannot."""
    return all(
        0 < entry.pid <= _MAX_PID and (size is None or entry.usedGpuMemory is None or entry.usedGpuMemory <= size)
        for entry in entries
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _joined(lists: Iterable[list[Any]], *, mig: bool) -> tuple[GpuProcess, ...]:
    """Return the processes of NVML's lists, by PID.

    A process that computes and draws is in both lists, each time with all the memory that it holds: the larger number
    counts. A process that is in one list more than once holds memory of several MIG instances: their sum counts.
    Without MIG, two processes of different PID namespaces may have one PID: again the larger number counts.
    """
    held: dict[int, int | None] = {}
    for entries in lists:
        for pid in {entry.pid for entry in entries}:
            several = [entry.usedGpuMemory for entry in entries if entry.pid == pid]
            used = total(several) if mig or None in several else max(several)
            before = held.get(pid)
            held[pid] = before if used is None else used if before is None else max(before, used)
    return tuple(GpuProcess(pid, used) for pid, used in sorted(held.items()))


def _is_numa_node(pci_bus_id: str) -> bool:
    """Return whether the kernel manages the GPU's memory, as on GH200 (driver README, "NUMA status")."""
    try:
        status = (DRIVER_GPUS / pci_address(pci_bus_id) / "numa_status").read_text()
    except OSError as error:
        return error.errno == errno.EIO  # under MIG; other GPUs have no such file
    return "online" in status.lower()


def text(value: str | bytes) -> str:
    """Return a text of pynvml, which is str or bytes, depending on its release."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
