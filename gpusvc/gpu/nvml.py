"""NVML: the GPUs, their free VRAM, and the processes that hold VRAM. The only importer of pynvml.

It reports readings and does not judge them: a value that NVML does not report is None, and a GPU that could not be read
has a ``problem``. One ``Nvml`` is one client of the driver. Every call may hang for ever, so only a reader process
(``gpu/reader.py``) has one; everybody else asks a ``Driver`` (``gpu/driver.py``). Never carry it over a fork.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from types import ModuleType, TracebackType
from typing import Self, TypeVar

from gpusvc.errors import NvmlError, NvmlUnavailableError
from gpusvc.gpu import returns
from gpusvc.gpu.device import Device, text
from gpusvc.gpu.reading import Gpu, ProcessSample
from gpusvc.record import replace

_T = TypeVar("_T")


class Nvml:
    """A client of the driver, from ``nvmlInit`` to ``nvmlShutdown``.

    Raises:
        NvmlUnavailableError: there is no library, no driver, or no permission; the hint says what to do about it.
        NvmlError: NVML failed in another way. Every method may raise both.
    """

    def __init__(self, on_step: Callable[[int], None] = lambda _: None) -> None:
        """``on_step`` is called with the index of a GPU before NVML is asked for it."""
        self._on_step = on_step
        self._nv = _pynvml()
        self._initialised = False
        self._version = ""
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
        return self._despite_reset(lambda _: text(self._nv.nvmlSystemGetDriverVersion()))

    def snapshot(
        self,
        *,
        processes: bool = True,
        utilisation: bool = False,
        renew: bool = True,
        only: Collection[int] | None = None,
        skip: Collection[int] = (),
    ) -> tuple[Gpu, ...]:
        """Return every GPU, in NVML's order. If one is lost, read again with a new client, unless ``renew`` is False.

        ``processes`` costs milliseconds on a real driver and takes its lock; memory alone costs microseconds.
        A GPU that was seen before and that NVML no longer counts comes last, with its ``problem``.

        Args:
            processes: whether to read the lists of processes.
            utilisation: whether to read how busy each GPU is.
            renew: whether to open a new client where the handles of this one are stale.
            only: the indices of the GPUs that are read and returned; None: all.
            skip: the indices of GPUs about which the driver is not asked. They are returned without readings.
        """

        def read(last: bool) -> tuple[Gpu, ...]:
            return self._read_all(processes=processes, utilisation=utilisation, last=last, only=only, skip=skip)

        return self._despite_reset(read, renew=renew)

    def measure(
        self, since_us: Mapping[str, int], *, renew: bool = True, skip: Collection[int] = ()
    ) -> tuple[tuple[Gpu, ...], dict[str, tuple[tuple[ProcessSample, ...] | None, int] | str]]:
        """Return a snapshot, and for each GPU of ``since_us`` what process_utilisation() returns, or why it failed.

        A GPU that does not report the work of single processes has its own ``utilisation_percent``.

        Args:
            since_us: by the GPU's UUID, the timestamp of the last call.
            renew: as for snapshot().
            skip: as for snapshot().
        """
        gpus = list(self.snapshot(renew=renew, skip=skip))
        works: dict[str, tuple[tuple[ProcessSample, ...] | None, int] | str] = {}
        for place, gpu in enumerate(gpus):
            if gpu.problem is None and gpu.uuid in since_us and gpu.index not in skip:
                self._on_step(gpu.index)
                try:
                    works[gpu.uuid] = self.process_utilisation(gpu.uuid, since_us[gpu.uuid], index=gpu.index)
                except NvmlError as error:
                    works[gpu.uuid] = error.message
                if works[gpu.uuid][0] is None:
                    gpus[place] = replace(gpu, utilisation_percent=self._despite_reset(partial(self._busy, gpu.index)))
        return tuple(gpus), works

    def process_utilisation(
        self, gpu_uuid: str, since_us: int, *, index: int | None = None
    ) -> tuple[tuple[ProcessSample, ...] | None, int]:
        """Return the share of the GPU's time of each process since ``since_us``, and the timestamp for the next call.

        No samples: nothing ran. None: this GPU does not report it (MIG, old GPUs). With ``since_us`` 0 the samples are
        an average over a long time; only their timestamp is of use. With ``index``, NVML need not look at other GPUs to
        find this one.
        """

        def read(_: bool) -> tuple[tuple[ProcessSample, ...] | None, int]:
            nv = self._nv
            of = nv.nvmlDeviceGetHandleByUUID(gpu_uuid) if index is None else nv.nvmlDeviceGetHandleByIndex(index)
            return Device(nv, of).process_utilisation(since_us)

        return self._despite_reset(read)

    def _busy(self, index: int, _: bool) -> int | None:
        return Device(self._nv, self._nv.nvmlDeviceGetHandleByIndex(index)).utilisation()

    # ---- the client ----

    def _open(self) -> None:
        """Initialise NVML if it is not. Each reading calls this, since the last initialisation may have failed."""
        if self._initialised:
            return
        try:
            self._nv.nvmlInit()
        except self._nv.NVMLError as error:
            if error.value in returns.UNAVAILABLE:
                message, hint = returns.UNAVAILABLE[error.value]
                raise NvmlUnavailableError(message, hint=hint) from None
            raise _failed(error) from None
        self._initialised = True
        with suppress(self._nv.NVMLError):
            self._version = text(self._nv.nvmlSystemGetDriverVersion())

    def _despite_reset(self, read: Callable[[bool], _T], *, renew: bool = True) -> _T:
        """Return what ``read`` returns. If handles are stale, open a new client and call it once more, with True."""
        self._open()
        try:
            return read(not renew)
        except self._nv.NVMLError as error:
            if error.value not in returns.STALE or not renew:
                raise _failed(error) from None
        self.close()
        self._open()
        try:
            return read(True)
        except self._nv.NVMLError as error:
            raise _failed(error) from None

    # ---- reading ----

    def _read_all(
        self,
        *,
        processes: bool,
        utilisation: bool,
        last: bool,
        only: Collection[int] | None,
        skip: Collection[int],
    ) -> tuple[Gpu, ...]:
        count = self._nv.nvmlDeviceGetCount()
        if count != self._count:
            self._count = count
            self._names = {}
        gpus = []
        for index in range(count):
            if only is not None and index not in only:
                continue
            named = self._names.get(index, Gpu(index=index, uuid="", name="", minor=None, pci_bus_id=""))
            if index in skip:
                gpus.append(named)
                continue
            self._on_step(index)
            try:
                device = Device(self._nv, self._nv.nvmlDeviceGetHandleByIndex(index), self._version)
                named = device.named(index)
                self._names[index] = self._all_names[named.uuid] = named
                gpu = device.read(named, processes=processes, utilisation=utilisation)
            except self._nv.NVMLError as error:
                if error.value in returns.STALE and not last:
                    raise
                gpu = replace(named, problem=returns.PROBLEMS.get(error.value, f"NVML cannot read the GPU: {error}."))
            gpus.append(gpu)
        if only is not None:
            return tuple(gpus)
        counted = {gpu.uuid for gpu in gpus}
        gone = [named for uuid, named in self._all_names.items() if uuid not in counted]
        return (*gpus, *(replace(named, problem=returns.PROBLEMS[returns.GPU_IS_LOST]) for named in gone))


def _pynvml() -> ModuleType:
    """Return the module. It is imported on first use only, as that costs 20 ms and 5 MB."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return importlib.import_module("gpusvc._vendor.pynvml")  # part of the distribution package


def _failed(error: Exception) -> NvmlError:
    return NvmlError(f"NVML failed: {error}.")
