"""The gateway's counters of each model's requests: one file for each worker, written in place, readable by all users.

A worker maps its file and adds to doubles in it, without locks, system calls or messages, so that counting costs a
request about a microsecond. Readers add up the files of all workers. The counters survive a restart of the gateway, but
not a reboot.

A file is a sequence of chunks of records, one record for each model: a magic number, the model's name, and its cells. A
worker holds its file locked shared (flock(2)) as long as it lives; the gauges (in flight, waiting) of a file that no
process locks are those of an ended worker, and do not count.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpusvc import files as statefile
from gpusvc.errors import GpusvcError
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.state import locks

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histograms' buckets, in seconds: from a cached answer to one that waits for a large model."""

CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
"""Classes of statuses, by their first digit; "none": the client disconnected before the response began."""

# It changes with the layout. Files of another layout are neither read nor continued.
_MAGIC = 0x67707573_76630001
_HEAD = struct.Struct("=Q248s")  # and the name, padded with zeros
_RECORD_BYTES = 1024
_CHUNK_BYTES = 64 * _RECORD_BYTES  # a multiple of every kernel's page size, so that each chunk can be mapped

_BUCKETS = len(BOUNDS) + 1
_IN_FLIGHT = 0
_WAITING = 1
_REQUESTS = 2
_FIRST_BYTE = _REQUESTS + len(CLASSES)  # the sum, then the buckets
_DURATION = _FIRST_BYTE + 1 + _BUCKETS
_PROMPT_TOKENS = _DURATION + 1 + _BUCKETS
_COMPLETION_TOKENS = _PROMPT_TOKENS + 1
_RECEIVED = _COMPLETION_TOKENS + 1
_SENT = _RECEIVED + 1
# Cells that version 0.1.0 does not have. Its records have zeros there, so new cells are only ever added at the end.
_SUCCEEDED = _SENT + 1
_FAILED = _SUCCEEDED + 1
_SUCCEEDING = _FAILED + 1
_ATTACHED = _SUCCEEDING + 1
_CELLS = struct.Struct(f"={_ATTACHED + 1}d")
_ANSWERS = struct.Struct(f"={_ATTACHED + 1 - _SUCCEEDED}d")
_GAUGES = (_IN_FLIGHT, _WAITING, _SUCCEEDING, _ATTACHED)

_LAST_CLASS = len(CLASSES) - 1
_STATUS_END = 100 * len(CLASSES)  # engines may send statuses that HTTP does not define

# How long a worker waits at its start for the lock of its file.
_LOCK_SECONDS = 0.5

_READ_AND_WRITE = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

# Enough for sixty thousand models.
_MAX_FILE_BYTES = 64 * 1024 * 1024

_FIRST_BYTE_BUCKETS = _FIRST_BYTE + 1
_DURATION_BUCKETS = _DURATION + 1


class ModelCounters:
    """One worker's counters of one model. Each call costs about 0.2 µs."""

    __slots__ = ("_cells",)

    def __init__(self, cells: memoryview[float]) -> None:
        self._cells = cells

    def began(self) -> None:
        """Count a request as in flight. It is from the end of its head to the end of the response."""
        self._cells[_IN_FLIGHT] += 1.0

    def waiting(self, change: int) -> None:
        """Add ``change`` to the number of requests that wait for the model to be ready or to have a free slot."""
        self._cells[_WAITING] += change

    def first_byte(self, seconds: float) -> None:
        """Count the first byte of the engine's response, ``seconds`` after the request began."""
        cells = self._cells
        cells[_FIRST_BYTE] += seconds
        cells[_FIRST_BYTE_BUCKETS + bisect_left(BOUNDS, seconds)] += 1.0

    def ended(self, status: int, seconds: float) -> None:
        """Count a request as ended.

        Args:
            status: of the response; 0: the client disconnected before it began.
            seconds: since the request began.
        """
        cells = self._cells
        cells[_IN_FLIGHT] -= 1.0
        cells[_REQUESTS + (status // 100 if status < _STATUS_END else _LAST_CLASS)] += 1.0
        cells[_DURATION] += seconds
        cells[_DURATION_BUCKETS + bisect_left(BOUNDS, seconds)] += 1.0

    def response_began(self, status: int) -> None:
        """Count the beginning of the engine's response. A 4xx is neither a success nor a failure."""
        if status < 400:
            self._cells[_SUCCEEDED] += 1.0
            self._cells[_SUCCEEDING] += 1.0
        elif status >= 500:
            self._cells[_FAILED] += 1.0

    def response_ended(self, status: int) -> None:
        """Count the end of a response for which response_began() was called."""
        if status < 400:
            self._cells[_SUCCEEDING] -= 1.0

    def attached(self, change: int) -> None:
        """Add ``change`` to the number of upgraded connections (WebSocket) without recent traffic."""
        self._cells[_ATTACHED] += change

    def tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens that the engine's response reports."""
        self._cells[_PROMPT_TOKENS] += prompt
        self._cells[_COMPLETION_TOKENS] += completion

    def received(self, size: int) -> None:
        """Count ``size`` bytes of request bodies from clients."""
        self._cells[_RECEIVED] += size

    def sent(self, size: int) -> None:
        """Count ``size`` bytes of responses to clients."""
        self._cells[_SENT] += size


class Counters:
    """One worker's file, which only this process writes.

    If the file cannot be made, the counters stay in this process's memory and no reader sees them. Requests go on.
    """

    def __init__(self, file: Path) -> None:
        self._models: dict[str, ModelCounters] = {}
        self._chunks: list[mmap.mmap] = []
        self._fd: int | None = None
        self._is_full = False
        try:
            self._open(file)
        except OSError as error:
            log(4, f"This worker's counters are not shown: {file} cannot be used ({os.strerror(error.errno or 0)}).")

    def of(self, model: str) -> ModelCounters:
        """Return the counters of ``model``, a model's name, or "" for requests without a model."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = self._add(model)
        return found

    def close(self) -> None:
        """Unlock and close the file. The mapping stays, so later counts are written too."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            fcntl.flock(fd, fcntl.LOCK_UN)  # each mapping has a duplicate of the file, and so of the lock
            os.close(fd)

    def _open(self, file: Path) -> None:
        """Continue the counters in ``file``. Replace a file of another layout by a new one.

        It is not truncated: a process that has it mapped would be killed by SIGBUS.
        """
        self._fd = os.open(file, _READ_AND_WRITE)
        records = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if len(records) % _CHUNK_BYTES or (records and _HEAD.unpack_from(records)[0] not in (0, _MAGIC)):
            log(5, f"The counters in {file} are of another version of gpusvc and start at zero.")
            self.close()
            file.unlink()
            self._fd = os.open(file, _READ_AND_WRITE | os.O_EXCL)
            records = b""
        os.fchmod(self._fd, 0o640)  # also a file of an older version
        # A reader holds the lock for microseconds. But each member of the group may read the file, and so lock it for
        # ever: then the worker goes on without the lock.
        if not locks.lock_within(self._fd, locks.SHARED, _LOCK_SECONDS):
            log(4, f"{file} stays locked{locks.phrase(locks.holders(file))}: this worker's gauges may read 0.")
        for _ in range(len(records) // _CHUNK_BYTES):
            self._map()
        for index, (name, _) in enumerate(_records(records)):
            cells = self._cells(index)
            for gauge in _GAUGES:
                cells[gauge] = 0.0
            self._models[name] = ModelCounters(cells)

    def _add(self, model: str) -> ModelCounters:
        index = len(self._models)
        if index * _RECORD_BYTES == len(self._chunks) * _CHUNK_BYTES:
            self._map()
        chunk, offset = self._place(index)
        # The magic number comes last: to readers it means that the record is complete.
        for magic in (0, _MAGIC):
            _HEAD.pack_into(chunk, offset, magic, model.encode())
        return ModelCounters(self._cells(index))

    def _map(self) -> None:
        """Map one more chunk. It is allocated first: if tmpfs is full, a write to a new page raises SIGBUS."""
        offset = len(self._chunks) * _CHUNK_BYTES
        if self._fd is not None and not self._is_full:
            try:
                os.posix_fallocate(self._fd, offset, _CHUNK_BYTES)
                self._chunks.append(mmap.mmap(self._fd, _CHUNK_BYTES, offset=offset))
            except OSError as error:
                log(4, f"The counters of further models are not shown ({os.strerror(error.errno or 0)}).")
                self._is_full = True
            else:
                return
        self._chunks.append(mmap.mmap(-1, _CHUNK_BYTES))

    def _place(self, index: int) -> tuple[mmap.mmap, int]:
        chunk, offset = divmod(index * _RECORD_BYTES, _CHUNK_BYTES)
        return self._chunks[chunk], offset

    def _cells(self, index: int) -> memoryview[float]:
        chunk, offset = self._place(index)
        return memoryview(chunk)[offset + _HEAD.size : offset + _HEAD.size + _CELLS.size].cast("d")


@dataclass(frozen=True, slots=True)
class Histogram:
    """The numbers of values up to each of BOUNDS and above the one before, last of those above all; and their sum."""

    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class Totals:
    """One model's counters of all workers since boot. ``in_flight`` and ``waiting`` are current numbers."""

    in_flight: int
    waiting: int
    requests: dict[str, int]
    """Ended requests, by CLASSES of their status."""
    first_byte_seconds: Histogram
    """From the beginning of a request to the first byte of the engine's response."""
    seconds: Histogram
    """From the beginning of a request to the end of its response."""
    prompt_tokens: int
    completion_tokens: int
    received_bytes: int
    sent_bytes: int

    @classmethod
    def from_cells(cls, cells: Sequence[float]) -> Self:
        return cls(
            in_flight=int(cells[_IN_FLIGHT]),
            waiting=int(cells[_WAITING]),
            requests=dict(zip(CLASSES, map(int, cells[_REQUESTS:_FIRST_BYTE]), strict=True)),
            first_byte_seconds=_histogram(cells[_FIRST_BYTE:_DURATION]),
            seconds=_histogram(cells[_DURATION:_PROMPT_TOKENS]),
            prompt_tokens=int(cells[_PROMPT_TOKENS]),
            completion_tokens=int(cells[_COMPLETION_TOKENS]),
            received_bytes=int(cells[_RECEIVED]),
            sent_bytes=int(cells[_SENT]),
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """The responses of one model's engine since boot, as far as the watchdog needs them."""

    succeeded: int
    """The responses with a status below 400 that began."""
    failed: int
    """The responses with a status of 500 or above that began."""
    succeeding: int
    """The responses with a status below 400 that are not over."""
    attached: int
    """The upgraded connections that have no recent traffic."""


NO_ANSWERS = Answers(0, 0, 0, 0)


def answers(directory: Path) -> dict[str, Answers]:
    """Return the answers that all workers counted, by model. Files that cannot be read are left out."""
    sums: dict[str, list[int]] = {}
    offset = _HEAD.size + 8 * _SUCCEEDED
    for file in directory.glob("counters-*"):
        try:
            records, alive = _look(file)
        except (OSError, ValueError):
            continue
        for begin in range(0, len(records) - _RECORD_BYTES + 1, _RECORD_BYTES):
            magic, name = _HEAD.unpack_from(records, begin)
            cells = _ANSWERS.unpack_from(records, begin + offset)
            if magic != _MAGIC or not all(map(math.isfinite, cells)):
                continue
            found = sums.setdefault(name.rstrip(b"\0").decode(errors="replace"), [0] * len(cells))
            # Gauges of an ended worker do not count.
            for index, cell in enumerate(cells if alive else (*cells[:2], 0, 0)):
                found[index] += int(cell)
    return {name: Answers(*cells) for name, cells in sums.items()}


def directory(paths: Paths) -> Path:
    """Return the directory of the gateway workers' counters."""
    return paths.runtime / "gateway"


def file_of(directory: Path, worker: int) -> Path:
    """Return the counters file of the worker of this number."""
    return directory / f"counters-{worker}"


def read(directory: Path) -> dict[str, Totals]:
    """Return the totals of all files in ``directory``, by model.

    Raises:
        GpusvcError: a file cannot be read, so that the totals are unknown.
    """
    sums: dict[str, list[float]] = {}
    for file in sorted(directory.glob("counters-*")):
        try:
            records, alive = _look(file)
        except FileNotFoundError:
            continue  # it is being replaced, as after an upgrade
        except OSError as error:
            raise GpusvcError(f"The counters {file} cannot be read: {os.strerror(error.errno or 0)}.") from None
        except ValueError as error:
            raise GpusvcError(f"The counters {file} cannot be read: {error}.") from None
        for name, cells in _records(records):
            values = list(cells)
            if not alive:
                for gauge in _GAUGES:
                    values[gauge] = 0.0
            before = sums.get(name)
            sums[name] = values if before is None else [a + b for a, b in zip(before, values, strict=True)]
    return {name: Totals.from_cells(cells) for name, cells in sums.items()}


def _look(file: Path) -> tuple[bytes, bool]:
    """Return the contents of ``file``, and whether a worker holds it locked."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        statefile.require_regular(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = True
        else:
            alive = False
        return os.pread(fd, min(os.fstat(fd).st_size, _MAX_FILE_BYTES), 0), alive
    finally:
        os.close(fd)


def _records(records: bytes) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield name and cells of each complete record."""
    for offset in range(0, len(records) - _RECORD_BYTES + 1, _RECORD_BYTES):
        magic, name = _HEAD.unpack_from(records, offset)
        if magic == _MAGIC:
            cells = _CELLS.unpack_from(records, offset + _HEAD.size)
            # Counting never results in NaN or infinity: such a record is corrupt.
            if all(map(math.isfinite, cells)):
                yield name.rstrip(b"\0").decode(errors="replace"), cells


def _histogram(cells: Sequence[float]) -> Histogram:
    return Histogram(counts=tuple(map(int, cells[1:])), sum=cells[0])
