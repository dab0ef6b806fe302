"""The present state of models and GPUs, shared by all requests within a second. A thread reads it, as it takes time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from gpusvc.api.backend.bus import Manager
from gpusvc.api.backend.shared import outcome
from gpusvc.config.files import model_names
from gpusvc.errors import GpusvcError, NvmlError, NvmlSilentError, NvmlUnavailableError
from gpusvc.gpu import reader_process
from gpusvc.gpu.driver import Driver
from gpusvc.gpu.reading import Gpu
from gpusvc.paths import Paths
from gpusvc.state import hung
from gpusvc.status import inventory
from gpusvc.status.gpus import GpuStatus
from gpusvc.status.models import ModelProcess, ModelStatus
from gpusvc.systemd.connection import Connection
from gpusvc.systemd.manager import Manager as SystemManager

_T = TypeVar("_T")

FRESH_SECONDS = 1.0

# How long a missing driver is not asked for again.
_ABSENT_SECONDS = 10.0

# How long a request waits for the driver, and for one GPU. After that the models are shown without VRAM.
_PATIENCE_SECONDS = 6.0
_STEP_SECONDS = 4.0


def _open_driver(paths: Paths) -> Driver:
    return Driver(
        patience_seconds=_PATIENCE_SECONDS,
        step_seconds=_STEP_SECONDS,
        begin=reader_process.execute,
        hung=hung.read(paths),
    )


class Snapshots:
    """Models and GPUs. The coroutines belong to one loop; everything that may block runs in one thread beside it."""

    def __init__(
        self,
        paths: Paths,
        *,
        connect: Callable[[], Manager] = SystemManager,
        open_driver: Callable[[Paths], Driver] = _open_driver,
    ) -> None:
        self._paths = paths
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")
        self._line = Connection(connect)  # belongs to the thread, as _driver does
        self._open_driver = open_driver
        self._driver: Driver | None = None
        self._absent: tuple[float, NvmlUnavailableError] | None = None
        self._readings = _Fresh(self._look)
        self._gpus = _Fresh(self._read_gpus)
        self._models = _Fresh(self._read_models)
        self.problem: GpusvcError | None = None

    async def models(self) -> list[ModelStatus]:
        """Return every model that has a file, runs, failed, or holds a lease, with its standing, sorted by name.

        Raises:
            GpusvcError: systemd does not answer, or the models' directory cannot be read.
        """
        return await self._models.get()

    async def model(self, name: str) -> tuple[ModelStatus, tuple[ModelProcess, ...]]:
        """Return one model with its standing, and its processes.

        Raises:
            SystemdError: systemd does not answer.
        """
        readings = await self._readings_or_none()
        return await self.beside(
            lambda: self._line.ask(lambda manager: inventory.model(self._paths, manager, name, lambda: readings))
        )

    async def gpus(self) -> list[GpuStatus]:
        """Return the GPUs with their holders; none on a machine without a driver, and then ``problem`` says why.

        Raises:
            NvmlError: the driver does not answer.
        """
        return await self._gpus.get()

    def forget(self) -> None:
        """Drop the last readings, because something changed."""
        for fresh in (self._readings, self._gpus, self._models):
            fresh.forget()

    async def beside(self, work: Callable[[], _T]) -> _T:
        """Run ``work``, which may block, in the thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            await self.beside(self._close)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> tuple[Gpu, ...]:
        return await self.beside(self._snapshot)

    async def _readings_or_none(self) -> Sequence[Gpu] | None:
        try:
            return await self._readings.get()
        except NvmlError:
            return None

    async def _read_gpus(self) -> list[GpuStatus]:
        try:
            readings = await self._readings.get()
        except NvmlUnavailableError as error:
            # A machine without GPUs is no error. A failing driver is.
            self.problem = error
            readings = ()
        except NvmlError as error:
            self.problem = error
            raise
        else:
            self.problem = None
        return await self.beside(functools.partial(inventory.gpus, self._paths, readings))

    async def _read_models(self) -> list[ModelStatus]:
        readings = await self._readings_or_none()

        def read() -> list[ModelStatus]:
            more = model_names(self._paths)
            return self._line.ask(
                lambda manager: inventory.models(self._paths, manager, lambda: readings, more=more, standing=True)
            )

        return await self.beside(read)

    # In the thread:

    def _snapshot(self) -> tuple[Gpu, ...]:
        import time  # noqa: PLC0415

        if self._absent is not None and time.monotonic() < self._absent[0]:
            raise self._absent[1]
        try:
            if self._driver is None:
                self._driver = self._open_driver(self._paths)
            return self._driver.snapshot(utilisation=True)
        except NvmlUnavailableError as error:
            self._absent = (time.monotonic() + _ABSENT_SECONDS, error)
            raise
        except NvmlSilentError:
            raise  # the next request waits for the same answer
        except NvmlError:
            self._close_driver()
            raise

    def _close_driver(self) -> None:
        if self._driver is not None:
            driver, self._driver = self._driver, None
            driver.close()

    def _close(self) -> None:
        self._close_driver()
        self._line.close()


class _Fresh(Generic[_T]):
    """A value that is read once for all requests within FRESH_SECONDS."""

    def __init__(self, get: Callable[[], Awaitable[_T]]) -> None:
        self._get = get
        self._task: asyncio.Task[_T] | None = None
        self._until = 0.0

    async def get(self) -> _T:
        loop = asyncio.get_running_loop()
        if self._task is None or (self._task.done() and loop.time() >= self._until):
            task = self._task = loop.create_task(self._run())
            task.add_done_callback(self._done)
        # A cancelled waiter must not cancel the others.
        return await outcome(self._task)

    def forget(self) -> None:
        self._task = None

    async def _run(self) -> _T:
        return await self._get()

    def _done(self, task: asyncio.Task[_T]) -> None:
        if task is self._task:
            self._until = asyncio.get_running_loop().time() + FRESH_SECONDS
        if not task.cancelled():
            task.exception()  # every waiter may be gone
