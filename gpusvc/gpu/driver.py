"""The GPUs as the driver shows them, with a deadline for each answer: what every part of gpusvc asks.

NVML itself is called in a reader process (``gpu/reader.py``). If a call of it does not return in time, its GPU hangs.
Then the reader is killed, the GPU is not asked again as long as that reader does not die, and a new reader reads the
other GPUs. A GPU that hangs has a ``problem`` and no readings, so that nothing follows from it: it is not free, and
nothing on it is released.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from gpusvc.backoff import Backoff
from gpusvc.errors import NvmlError, NvmlSilentError, NvmlUnavailableError
from gpusvc.gpu import reader_process
from gpusvc.gpu.reader import LIBRARY, flat, gpu_of
from gpusvc.gpu.reader_process import ReaderProcess
from gpusvc.gpu.reading import Gpu, Hung, ProcessSample
from gpusvc.record import replace

if TYPE_CHECKING:
    from types import TracebackType

# Without persistence mode, GPUs that nobody uses take seconds to wake up: as NVML is opened, or for the first reading.
_OPENING_SECONDS = 60.0
_FIRST_STEP_SECONDS = 20.0
_STEP_SECONDS = 10.0

# A GPU that hung before must answer sooner.
_PROBE_SECONDS = 2.0

# How long a GPU is left alone whose reader could be killed.
_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 600.0

_TOLD_SECONDS = 1.0
_USUAL_SECONDS = 0.05

if TYPE_CHECKING:
    Work = tuple[tuple[ProcessSample, ...] | None, int] | str


class _Hang:
    """A GPU, or the whole library, for which NVML did not return."""

    def __init__(self, since_seconds: float) -> None:
        self.since_seconds = since_seconds
        self.reader: ReaderProcess | None = None
        self.retry = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)

    def is_left_alone(self, now_seconds: float) -> bool:
        """Whether it is not asked now: its reader cannot even be killed, or it hung a moment ago."""
        if self.reader is not None and not self.reader.has_ended():
            return True
        return not self.retry.is_due(now_seconds)


class Driver:
    """One caller's view of the driver. The reader starts with the first use, or with start().

    Raises (each method that asks):
        NvmlSilentError: there was no answer in time. The same call may be made again: it waits for the same answer.
        NvmlUnavailableError: there is no library, no driver, or no permission; the hint says what to do about it.
        NvmlError: NVML failed in another way.
    """

    def __init__(
        self,
        *,
        patience_seconds: float = 12.0,
        step_seconds: float | None = 7.0,
        on_wait: Callable[[str], None] = lambda _: None,
        begin: Callable[[], ReaderProcess] = reader_process.fork,
        hung: Iterable[Hung] = (),
    ) -> None:
        """
        Args:
            patience_seconds: how long a call waits for its answer, unless it says otherwise.
            step_seconds: how long the driver may take for one GPU, so that there is time for the other GPUs; None: as
                long as a GPU may take to wake up. That is for callers who ask again and again.
            on_wait: called about once a second, with a sentence, while a call waits.
            begin: starts a reader: ``reader_process.fork`` in a process with one thread, else ``.execute``.
            hung: what another caller found to hang. It is left alone for a while.
        """
        self._patience_seconds = patience_seconds
        self._longest_step_seconds = step_seconds
        self._on_wait = on_wait
        self._begin = begin
        self._reader: ReaderProcess | None = None
        self._asked: tuple[str, float] | None = None  # the method that the reader is at, and since when
        self._step_since = 0.0
        self._known: set[int] = set()  # the GPUs, and LIBRARY, that this reader has passed
        self._hung: dict[int, _Hang] = {}
        self._names: dict[int, Gpu] = {}
        for each in hung:
            self._hung[each.index] = _Hang(each.since_seconds)
            self._hung[each.index].retry.postpone(time.monotonic())
            if each.uuid:
                self._names[each.index] = Gpu(each.index, each.uuid, each.name, each.minor, each.pci_bus_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> Self:
        """Start the reader, which then opens NVML while the caller does something else."""
        self._running()
        return self

    def close(self) -> None:
        """End the reader. Safe to call twice; the next use starts a new one."""
        if self._reader is not None:
            self._reader.end()
        self._forget()

    def driver_version(self, *, patience_seconds: float | None = None) -> str:
        return str(self._ask("driver_version", {}, patience_seconds))

    def snapshot(
        self,
        *,
        processes: bool = True,
        utilisation: bool = False,
        only: Collection[int] | None = None,
        patience_seconds: float | None = None,
        fresh: bool = True,
    ) -> tuple[Gpu, ...]:
        """Return every GPU, in NVML's order. A GPU that hangs has a ``problem``.

        Args:
            processes: whether to read the lists of processes.
            utilisation: whether to read how busy each GPU is.
            only: the indices of the GPUs that are read and returned; None: all. The driver is not asked about others.
            patience_seconds: how long to wait for the answer.
            fresh: whether the reading must have begun after this call. Otherwise it may be that of an earlier call,
                which was given up.
        """
        arguments = {
            "processes": processes,
            "utilisation": utilisation,
            "only": None if only is None else tuple(sorted(only)),
        }
        return self._gpus(self._ask("snapshot", arguments, patience_seconds, fresh=fresh))

    def measure(
        self, since_us: Mapping[str, int], *, renew: bool = True, patience_seconds: float | None = None
    ) -> tuple[tuple[Gpu, ...], dict[str, Work]]:
        """Return Nvml.measure(), maybe that of an earlier call which was given up."""
        arguments = {"since_us": dict(since_us), "renew": renew}
        gpus, works = self._ask("measure", arguments, patience_seconds, fresh=False)
        return self._gpus(gpus), {uuid: _work(values) for uuid, values in works.items()}

    def hung(self) -> tuple[Hung, ...]:
        """Return what hangs, as far as this caller found it, or was told."""
        nameless = Gpu(index=0, uuid="", name="", minor=None, pci_bus_id="")
        found = []
        for index, hang in self._hung.items():
            gpu = self._names.get(index, nameless)
            found.append(Hung(index, hang.since_seconds, gpu.uuid, gpu.name, gpu.minor, gpu.pci_bus_id))
        return tuple(found)

    def stuck_readers(self) -> list[int]:
        """Return the PIDs of readers that SIGKILL has not ended. They stay in the control group of this process."""
        readers = (hang.reader for hang in self._hung.values())
        return [reader.pid for reader in readers if reader is not None and not reader.has_ended()]

    # ---- the answer ----

    def _ask(
        self, method: str, arguments: dict[str, Any], patience_seconds: float | None, *, fresh: bool = True
    ) -> Any:
        patience = self._patience_seconds if patience_seconds is None else patience_seconds
        began = time.monotonic()
        while True:
            if self._asked is None:
                self._asked = self._send(method, arguments)
            asked, since = self._asked
            answer = self._wait(began + patience)
            if answer is None:
                continue
            self._asked = None
            if asked == method and (since >= began or not fresh):
                return self._value(answer)

    def _send(self, method: str, arguments: dict[str, Any]) -> tuple[str, float]:
        """Send a request, without the GPUs that hang. A reader that has just died is replaced."""
        now = time.monotonic()
        skip = {index for index, hung in self._hung.items() if hung.is_left_alone(now)}
        if LIBRARY in skip:
            raise self._silent(now - self._hung[LIBRARY].since_seconds)
        if method != "driver_version":
            arguments = {**arguments, "skip": tuple(skip)}
        reader = self._running()
        try:
            reader.send((method, flat(arguments)))
        except BrokenPipeError:
            self._forget()
            raise NvmlError("The process that reads NVML was killed.") from None
        self._step_since = now
        return method, now

    def _wait(self, until: float) -> tuple[Any, ...] | None:
        """Return the answer of the reader; None: it hung, and is gone.

        Raises:
            NvmlSilentError: the time is over.
        """
        reader, asked = self._reader, self._asked
        assert reader is not None  # noqa: S101  it was asked
        assert asked is not None  # noqa: S101
        pause = _USUAL_SECONDS  # most answers come sooner, and then nobody looks at the steps
        while True:
            try:
                answer = reader.receive(max(0.0, pause), or_step=pause != _USUAL_SECONDS)
            except EOFError:
                self._forget()
                raise NvmlError("The process that reads NVML was killed.") from None
            if answer is not None:
                self._pass(reader)
                return tuple(answer)
            now = time.monotonic()
            step_seconds = self._step_seconds(reader)
            if reader.has_moved():
                self._step_since = now
            elif now - self._step_since >= step_seconds:
                self._give_up(reader, now)
                if now < until:
                    return None
                raise self._silent(now - asked[1])
            if now >= until:
                raise self._silent(now - asked[1])
            if now - asked[1] >= _TOLD_SECONDS / 2:
                self._on_wait(self._silent(now - asked[1]).message)
            pause = min(until - now, self._step_since + step_seconds - now, _TOLD_SECONDS)

    def _step_seconds(self, reader: ReaderProcess) -> float:
        limit = _OPENING_SECONDS if reader.step in {None, LIBRARY} else _FIRST_STEP_SECONDS
        if reader.step in self._hung:
            limit = _PROBE_SECONDS
        elif reader.step in self._known:
            limit = _STEP_SECONDS
        return limit if self._longest_step_seconds is None else min(limit, self._longest_step_seconds)

    def _pass(self, reader: ReaderProcess) -> None:
        """The reader has answered: the GPUs that it was at do not hang."""
        reader.has_moved()
        for step in reader.steps:
            self._known.add(step)
            self._hung.pop(step, None)
        self._hung.pop(LIBRARY, None)
        reader.steps.clear()

    def _give_up(self, reader: ReaderProcess, now: float) -> None:
        """Kill the reader, and note at which GPU it hangs."""
        step = LIBRARY if reader.step is None else reader.step
        hung = self._hung.setdefault(step, _Hang(self._step_since))
        hung.reader = reader
        hung.retry.postpone(now)
        reader.end()
        self._forget()

    def _value(self, answer: tuple[Any, ...]) -> Any:
        kind, *values = answer
        if kind == "value":
            return values[0]
        message, hint = values
        raise (NvmlUnavailableError if kind == "unavailable" else NvmlError)(message, hint=hint)

    def _gpus(self, values: tuple[Any, ...]) -> tuple[Gpu, ...]:
        gpus = []
        for gpu in map(gpu_of, values):
            hung = self._hung.get(gpu.index)
            if gpu.uuid:
                self._names[gpu.index] = replace(
                    gpu, total_bytes=None, used_bytes=None, free_bytes=None, processes=None, utilisation_percent=None
                )
            if hung is not None and gpu.problem is None and gpu.total_bytes is None and gpu.processes is None:
                seconds = time.monotonic() - hung.since_seconds
                problem = f"The GPU hangs: the driver has not answered for {seconds:.0f} s."
                gpu = replace(self._names.get(gpu.index, gpu), problem=problem)  # noqa: PLW2901
            gpus.append(gpu)
        return tuple(gpus)

    # ---- the reader ----

    def _running(self) -> ReaderProcess:
        if self._reader is None:
            self._reader = self._begin()
            self._step_since = time.monotonic()
        return self._reader

    def _forget(self) -> None:
        self._reader, self._asked = None, None
        self._known.clear()

    def _silent(self, seconds: float) -> NvmlSilentError:
        return NvmlSilentError(
            f"NVIDIA's driver has not answered for {seconds:.0f} s.",
            hint="A GPU may hang: `journalctl -k -g NVRM` may tell which. If it stays so, reset it or reboot.",
        )


def _work(values: Any) -> Work:
    if isinstance(values, str):
        return values
    samples, since_us = values
    return None if samples is None else tuple(ProcessSample(*sample) for sample in samples), since_us
