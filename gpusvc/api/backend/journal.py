"""Events and logs from the journal, each read by a journalctl(1) of its own, without blocking the loop.

One follower of all events serves all clients: it counts the events and hands them to the subscribers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from gpusvc.errors import GpusvcError
from gpusvc.journal import eventlog, journalctl
from gpusvc.journal import units as unitlog
from gpusvc.journal.eventlog import Event
from gpusvc.journal.events import EventType
from gpusvc.log import log

# Events that may wait for one reader. A slower reader is dropped.
QUEUE_LENGTH = 256

# A journalctl that ended is started again after this time, as when journald was restarted.
_PAUSE_SECONDS = 5.0

# A line of the journal is rarely longer. A longer one is left out, and the next one read.
_LONGEST_LINE_BYTES = 1 << 20

# An engine may write lines of any length. A message is cut here, so that few lines cannot fill the memory.
_LONGEST_MESSAGE_CHARACTERS = 16 * 1024

_ANSWER_SECONDS = 10.0

# How a reason's sentence begins, and its word for counters.
_REASONS = (
    ("room for ", "room"),
    ("an operator ", "operator"),
)


@dataclass(slots=True)
class Loads:
    """How long the loads of one model took, from the engine's start until it was ready."""

    count: int = 0
    total_seconds: float = 0.0
    last_seconds: float = 0.0


class Subscription:
    """The events since the subscription began, for one reader."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(QUEUE_LENGTH + 1)
        self._is_dropped = False

    async def next(self) -> Event | None:
        """Return the next event, or None if the reader was too slow and lost events."""
        if self._is_dropped and self._queue.empty():
            return None
        return await self._queue.get()

    def put(self, event: Event) -> None:
        if self._is_dropped:
            return
        if self._queue.qsize() >= QUEUE_LENGTH:
            self._is_dropped = True
            self._queue.put_nowait(None)
        else:
            self._queue.put_nowait(event)


class Events:
    """The events of all models. Use it only in the loop's thread.

    ``seen`` counts them by (kind, reason, model) since run() began, and ``loads`` the loads by model. The reason of an
    eviction is ``idle``, ``pressure``, ``room``, ``operator`` or empty; any other reason is an error's word, or empty.
    """

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str, str]] = Counter()
        self.loads: dict[str, Loads] = {}
        self._cursor: str | None = None
        self._starts: dict[str, float] = {}
        self._why_it_goes: dict[str, str] = {}
        self._subscriptions: set[Subscription] = set()

    async def run(self) -> None:
        """Follow the journal until cancelled."""
        while True:
            where = ["--lines=0"] if self._cursor is None else [f"--after-cursor={self._cursor}"]
            try:
                async with _journalctl(eventlog.command("--follow", *where)) as lines:
                    async for line in lines:
                        event = eventlog.parse(line)
                        if event is not None:
                            self._take(event)
            except (GpusvcError, ValueError) as error:
                log(4, f"Events are not seen for a while: {error}")
            await asyncio.sleep(_PAUSE_SECONDS)

    @contextmanager
    def subscribed(self) -> Iterator[Subscription]:
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def last(self, lines: int, *, model: str | None = None, after: str | None = None) -> list[Event]:
        """Return the last events, oldest first. ``after`` is a cursor: only events after it.

        Raises:
            GpusvcError: the journal cannot be read.
        """
        where = [] if after is None else [f"--after-cursor={after}"]
        found = await read(eventlog.command("--quiet", f"--lines={lines}", *where, model=model))
        return [event for event in map(eventlog.parse, found) if event is not None]

    def _take(self, event: Event) -> None:
        self._cursor = event.cursor
        self._count(event)
        for subscription in self._subscriptions:
            subscription.put(event)

    def _count(self, event: Event) -> None:
        name = event.model or ""
        self.seen[event.kind, self._reason(event), name] += 1
        if event.kind == EventType.START:
            self._starts[name] = event.seconds
        elif event.kind == EventType.READY and name in self._starts:
            loads = self.loads.setdefault(name, Loads())
            loads.last_seconds = max(0.0, event.seconds - self._starts.pop(name))
            loads.total_seconds += loads.last_seconds
            loads.count += 1
        elif event.kind in {EventType.FAIL, EventType.RELEASE}:
            self._starts.pop(name, None)

    def _reason(self, event: Event) -> str:
        """Return the reason as one of a few words. The sentence for people has names and numbers in it."""
        name = event.model or ""
        if event.kind in {EventType.IDLE, EventType.PRESSURE}:
            # The watchdog emits this event first, then evicts.
            self._why_it_goes[name] = event.kind
            return ""
        if event.kind != EventType.EVICT:
            reason = event.reason or ""
            return reason if reason.isidentifier() else ""
        before = self._why_it_goes.pop(name, "")
        said = event.reason or ""
        return next((word for start, word in _REASONS if said.startswith(start)), before)


async def read(command: list[str]) -> list[bytes]:
    """Run a journalctl that ends by itself, and return its lines.

    Raises:
        GpusvcError: the journal cannot be read.
    """
    try:
        async with asyncio.timeout(_ANSWER_SECONDS), _journalctl(command) as lines:
            return [line async for line in lines]
    except TimeoutError:
        raise journalctl.too_late(_ANSWER_SECONDS) from None


@asynccontextmanager
async def log_of(name: str, lines: int, *, follow: bool) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The log of the model's unit with the engine's lines, oldest first: entries as told() returns them.

    Raises:
        GpusvcError: the journal cannot be read.
    """
    fields = "MESSAGE,PRIORITY,SYSLOG_IDENTIFIER"
    shown = ["--output=json", "--all", f"--output-fields={fields}", "--no-pager", "--quiet"]
    command = unitlog.command(name, *shown, f"--lines={lines}")
    async with _journalctl([*command, "--follow"] if follow else command) as printed:
        yield _entries(printed)


async def last_words(name: str, lines: int, since: float) -> list[str]:
    """Return the last lines of engine and launcher since ``since`` (epoch seconds), oldest first; none on an error."""
    try:
        return unitlog.messages(await read(["journalctl", *unitlog.own_lines(name), *unitlog.newest(lines, since)]))
    except GpusvcError:
        return []


async def _entries(lines: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield told(json.loads(line))


def told(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of journalctl's JSON in the API's form; raise KeyError, TypeError or ValueError if it is bad."""
    message = journalctl.text(entry.get("MESSAGE"))
    return {
        "time": int(entry["__REALTIME_TIMESTAMP"]) / 1_000_000,
        "cursor": str(entry["__CURSOR"]),
        "level": int(entry.get("PRIORITY", 6)),
        "from": entry.get("SYSLOG_IDENTIFIER"),
        "message": _cut(message or ""),
    }


def _cut(message: str) -> str:
    rest = len(message) - _LONGEST_MESSAGE_CHARACTERS
    return message if rest <= 0 else f"{message[:_LONGEST_MESSAGE_CHARACTERS]}… ({rest} more characters)"


@asynccontextmanager
async def _journalctl(command: list[str]) -> AsyncIterator[AsyncIterator[bytes]]:
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE_BYTES,
        )
    # Up to Python 3.11 each child needs a thread; RuntimeError: the machine has none left.
    except (OSError, RuntimeError) as error:
        raise journalctl.cannot_run(error) from None
    try:
        yield _lines_of(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await asyncio.shield(child.wait())


async def _lines_of(child: asyncio.subprocess.Process) -> AsyncIterator[bytes]:
    assert child.stdout is not None  # noqa: S101
    assert child.stderr is not None  # noqa: S101
    complaints: deque[bytes] = deque(maxlen=3)
    # Read stderr beside stdout, so that a full pipe does not block the child.
    listener = asyncio.ensure_future(_keep(child.stderr, complaints))
    try:
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:  # longer than the limit: asyncio has dropped its buffer
                continue
            if not line:
                break
            yield line.rstrip(b"\n")
        await listener
    finally:
        listener.cancel()
    status = await child.wait()
    if status:
        raise journalctl.unreadable(status, b" ".join(complaints).decode(errors="replace"), is_root=False)


async def _keep(stream: asyncio.StreamReader, lines: deque[bytes]) -> None:
    async for line in stream:
        lines.append(line.strip())
