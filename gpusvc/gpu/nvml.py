"""NVML: the GPUs, their free VRAM, and the processes that hold VRAM. The only importer of pynvml.

It reports readings and does not judge them: a value that NVML does not report is None, and a GPU that could not be read
has a ``problem``. One ``Nvml`` is one client of the driver. Keep it open as long as readings are needed, since without
persistence mode the first client waits for each GPU to wake up, and never carry it over a fork.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from gpusvc.errors import NvmlError, NvmlUnavailableError
from gpusvc.gpu.reading import Gpu, GpuProcess, ProcessSample, total
from gpusvc.record import replace

# nvmlReturn_t. Spelled out, since not every release of pynvml names all of them.
_SUCCESS = 0
_UNINITIALIZED = 1
_INVALID_ARGUMENT = 2
_NOT_SUPPORTED = 3
_NO_PERMISSION = 4
_NOT_FOUND = 6
_INSUFFICIENT_SIZE = 7
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_GPU_IS_LOST = 15
_RESET_REQUIRED = 16
_LIB_RM_VERSION_MISMATCH = 18
_ARGUMENT_VERSION_MISMATCH = 25
_UNKNOWN = 999

# The handles are invalid. A new client may succeed.
_STALE = frozenset({_UNINITIALIZED, _GPU_IS_LOST, _RESET_REQUIRED})
# This driver or this GPU does not support the call.
_ABSENT = frozenset({_NOT_SUPPORTED, _FUNCTION_NOT_FOUND})
_NO_MEMORY_V2 = _ABSENT | {_INVALID_ARGUMENT, _ARGUMENT_VERSION_MISMATCH}

# How often memory and processes are read again while the memory in use changes.
_TRIES_FOR_ONE_MOMENT = 5

_MAX_TRIES = 5

_T = TypeVar("_T")

_UNAVAILABLE = {
    _LIBRARY_NOT_FOUND: (
        "There is no NVIDIA driver library (libnvidia-ml.so.1) on this machine.",
        "Install the NVIDIA driver; a model that needs no GPU says count = 0 under [gpu].",
    ),
    _DRIVER_NOT_LOADED: (
        "The NVIDIA driver is not loaded.",
        "Try 'modprobe nvidia'; 'journalctl -k -g NVRM' tells why it does not load.",
    ),
    _LIB_RM_VERSION_MISMATCH: (
        "The NVIDIA library and the loaded kernel module are of different versions.",
        "The driver was upgraded: reboot, or unload the old module.",
    ),
    _NO_PERMISSION: (
        "NVML may not be used by this user.",
        "Look at the mode of /dev/nvidiactl, and at the DeviceAllow= of the calling unit.",
    ),
    # NVML returns this where /dev/nvidiactl cannot be opened.
    _UNKNOWN: (
        "NVML cannot be initialised, most likely since /dev/nvidiactl may not be opened.",
        "Look at the mode of /dev/nvidiactl, and at the DeviceAllow= of the calling unit; 'nvidia-smi' says more.",
    ),
    _FUNCTION_NOT_FOUND: (
        "The NVIDIA driver library is too old for NVML's Python module.",
        "Install a driver of branch 510 or newer.",
    ),
}

_PROBLEMS = {
    _GPU_IS_LOST: "The GPU is lost: it fell off the bus, or was reset and is not back.",
    _RESET_REQUIRED: "The GPU must be reset before it can be used again.",
    _NO_PERMISSION: "The GPU's device node may not be opened.",
}


class Nvml:
    """A client of the driver, from ``nvmlInit`` to ``nvmlShutdown``.

    Raises:
        NvmlUnavailableError: there is no library, no driver, or no permission; the hint says what to do about it.
        NvmlError: NVML failed in another way. Every method may raise both.
    """

    def __init__(self) -> None:
        self._nv = _pynvml()
        # For symbols that the driver lacks, newer releases raise this, which is not a subclass of NVMLError.
        self._mismatch = getattr(self._nv, "NVMLLibraryMismatchError", self._nv.NVMLError)
        self._initialised = False
        self._count = 0
        self._names: dict[int, Gpu] = {}  # by index: the identity of each GPU of this enumeration
        self._all_names: dict[str, Gpu] = {}  # by UUID: the identity of each GPU that was ever seen
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the client. Safe to call twice."""
        if self._initialised:
            self._initialised = False
            with suppress(self._nv.NVMLError):  # the driver may have been unloaded
                self._nv.nvmlShutdown()

    def driver_version(self) -> str:
        return self._despite_reset(lambda _: _text(self._nv.nvmlSystemGetDriverVersion()))

    def snapshot(self, *, processes: bool = True, utilisation: bool = False, renew: bool = True) -> tuple[Gpu, ...]:
        """Return every GPU, in NVML's order. If one is lost, read again with a new client, unless ``renew`` is False.

        ``processes`` costs milliseconds on a real driver and takes its lock; memory alone costs microseconds.
        A GPU that was seen before and that NVML no longer counts comes last, with its ``problem``.
        """

        def read(last: bool) -> tuple[Gpu, ...]:
            return self._read_all(processes=processes, utilisation=utilisation, last=last)

        return self._despite_reset(read, renew=renew)

    def process_utilisation(self, gpu_uuid: str, since_us: int) -> tuple[tuple[ProcessSample, ...] | None, int]:
        """Return the share of the GPU's time of each process since ``since_us``, and the timestamp for the next call.

        No samples: nothing ran. None: this GPU does not report it (MIG, old GPUs). With ``since_us`` 0 the samples are
        an average over a long time; only their timestamp is of use.
        """
        return self._despite_reset(lambda _: self._process_utilisation(gpu_uuid, since_us))

    # ---- the client ----

    def _open(self) -> None:
        """Initialise NVML if it is not. Each reading calls this, since the last initialisation may have failed."""
        if self._initialised:
            return
        try:
            self._nv.nvmlInit()
        except self._nv.NVMLError as error:
            if error.value in _UNAVAILABLE:
                message, hint = _UNAVAILABLE[error.value]
                raise NvmlUnavailableError(message, hint=hint) from None
            raise _failed(error) from None
        self._initialised = True

    def _despite_reset(self, read: Callable[[bool], _T], *, renew: bool = True) -> _T:
        """Return what ``read`` returns. If handles are stale, open a new client and call it once more, with True."""
        self._open()
        try:
            return read(not renew)
        except self._nv.NVMLError as error:
            if error.value not in _STALE or not renew:
                raise _failed(error) from None
        self.close()
        self._open()
        try:
            return read(True)
        except self._nv.NVMLError as error:
            raise _failed(error) from None

    def _optional(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Return what ``call`` returns; None where this driver or this GPU does not support it."""
        try:
            return call(*arguments)
        except self._nv.NVMLError as error:
            if error.value in _ABSENT:
                return None
            raise
        except self._mismatch:
            return None

    # ---- reading ----

    def _read_all(self, *, processes: bool, utilisation: bool, last: bool) -> tuple[Gpu, ...]:
        count = self._nv.nvmlDeviceGetCount()
        if count != self._count:
            self._count = count
            self._names = {}
        gpus = []
        for index in range(count):
            try:
                gpu = self._read(index, processes=processes, utilisation=utilisation)
            except self._nv.NVMLError as error:
                if error.value in _STALE and not last:
                    raise
                named = self._names.get(index, Gpu(index=index, uuid="", name="", minor=None, pci_bus_id=""))
                gpu = replace(named, problem=_PROBLEMS.get(error.value, f"NVML cannot read the GPU: {error}."))
            gpus.append(gpu)
        counted = {gpu.uuid for gpu in gpus}
        gone = [named for uuid, named in self._all_names.items() if uuid not in counted]
        return (*gpus, *(replace(named, problem=_PROBLEMS[_GPU_IS_LOST]) for named in gone))

    def _read(self, index: int, *, processes: bool, utilisation: bool) -> Gpu:
        nv = self._nv
        # A new handle for each reading: it costs little, and a kept one would be invalid after a reset.
        handle = nv.nvmlDeviceGetHandleByIndex(index)
        pci = self._optional(nv.nvmlDeviceGetPciInfo, handle)
        named = Gpu(
            index=index,
            uuid=_text(nv.nvmlDeviceGetUUID(handle)),
            name=_text(nv.nvmlDeviceGetName(handle)),
            minor=self._optional(nv.nvmlDeviceGetMinorNumber, handle),
            pci_bus_id="" if pci is None else _text(pci.busId),
        )
        self._names[index] = self._all_names[named.uuid] = named
        (size, used, free), listed = self._memory_and_processes(handle, processes=processes)
        if _is_numa_node(named.pci_bus_id):
            used = None  # it may include the kernel's page cache
        mode = self._optional(nv.nvmlDeviceGetMigMode, handle)
        return replace(
            named,
            total_bytes=size,
            used_bytes=used,
            free_bytes=free,
            processes=listed,
            utilisation_percent=self._utilisation(handle) if utilisation else None,
            mig=mode is not None and bool(mode[0]),
        )

    def _memory_and_processes(
        self, handle: object, *, processes: bool
    ) -> tuple[tuple[int | None, int | None, int | None], tuple[GpuProcess, ...] | None]:
        """Return memory and processes of the same moment, as far as possible: NVML has no single call for both.

        If a process allocated between the two calls, other processes would seem to free or take memory.
        """
        memory = self._memory(handle)
        if not processes:
            return memory, None
        for _ in range(_TRIES_FOR_ONE_MOMENT):
            before, listed = memory, self._processes(handle)
            memory = self._memory(handle)
            if memory == before:
                break
        return memory, listed

    def _memory(self, handle: object) -> tuple[int | None, int | None, int | None]:
        """Return total, used and free bytes.

        The second version of the call reports the driver's own memory apart from the used bytes. The first version
        counts it as used or not, depending on the driver. This is not corrected: used bytes are only compared with
        earlier ones of the same driver, and free bytes mean the same in both versions.
        """
        version = getattr(self._nv, "nvmlMemory_v2", None)
        memory = None
        try:
            if version is not None:
                memory = self._nv.nvmlDeviceGetMemoryInfo(handle, version)
        except self._nv.NVMLError as error:
            if error.value not in _NO_MEMORY_V2:
                raise
        if memory is None:
            memory = self._optional(self._nv.nvmlDeviceGetMemoryInfo, handle)
        if memory is None or not memory.total:
            return None, None, None
        return memory.total, memory.used, memory.free

    def _utilisation(self, handle: object) -> int | None:
        try:
            rates = self._optional(self._nv.nvmlDeviceGetUtilizationRates, handle)
        except self._nv.NVMLError as error:
            if error.value in _STALE:
                raise
            return None
        return None if rates is None else int(rates.gpu)

    def _processes(self, handle: object) -> tuple[GpuProcess, ...] | None:
        """Return all processes with a context, by PID; None if NVML does not give one of the lists."""
        lists = [self._process_list(handle, kind) for kind in ("Compute", "Graphics")]
        known = [entries for entries in lists if entries is not None]
        return _joined(known) if len(known) == len(lists) else None

    def _process_list(self, handle: object, kind: str) -> list[Any] | None:
        # Entries of the second version (drivers before 510) have the layout of the third.
        for version in ("_v3", "_v2"):
            call = getattr(self._nv, f"nvmlDeviceGet{kind}RunningProcesses{version}", None)
            if call is None:
                continue
            try:
                entries: list[Any] | None = self._optional(self._despite_growth, call, handle)
            except self._nv.NVMLError as error:
                if error.value in _STALE:
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
                if error.value != _INSUFFICIENT_SIZE:
                    raise
        return call(*arguments)

    def _process_utilisation(self, gpu_uuid: str, since_us: int) -> tuple[tuple[ProcessSample, ...] | None, int]:
        nv = self._nv
        handle = nv.nvmlDeviceGetHandleByUUID(gpu_uuid)
        try:
            entries = self._optional(self._despite_growth, nv.nvmlDeviceGetProcessUtilization, handle, since_us)
        except nv.NVMLError as error:
            # Where there are no samples, pynvml may also raise an error with the code of success.
            if error.value not in (_NOT_FOUND, _SUCCESS):
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


def _pynvml() -> ModuleType:
    """Return the module. It is imported on first use only, as that costs 20 ms and 5 MB."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return importlib.import_module("gpusvc._vendor.pynvml")  # part of the distribution package


def _is_numa_node(pci_bus_id: str) -> bool:
    """Return whether the kernel manages the GPU's memory, as on GH200 (driver README, "NUMA status")."""
    domain, _, rest = pci_bus_id.lower().partition(":")
    try:
        status = Path(f"/proc/driver/nvidia/gpus/{domain[-4:]}:{rest}/numa_status").read_text()
    except OSError:
        return False
    return "online" in status.lower()


def _failed(error: Exception) -> NvmlError:
    return NvmlError(f"NVML failed: {error}.")


def _text(value: str | bytes) -> str:
    """Return a text of pynvml, which is str or bytes, depending on its release."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
