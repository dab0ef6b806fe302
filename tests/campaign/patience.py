"""What the campaign remembers of wedged engines and of quiet connections, from one look to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.campaign import invariants
from tests.campaign.invariants import Cause, Noted
from tests.campaign.snapshot import Held, Process, Snapshot
from tests.campaign.users import Connection

WEDGED_SECONDS = 20.0
"""Within this time the watchdog notices a wedged engine: failing_time is 2 s, and a client asks all the time."""

# While one of these is on, the watchdog or the requests that it needs to see may be in trouble.
_BLIND = (Cause.WATCHDOG, Cause.GATEWAY, Cause.PROOF, Cause.START, Cause.GONE)


@dataclass(slots=True)
class Wedge:
    """One run of an engine that was wedged, and since when the watchdog could have noticed."""

    model: str
    created: float
    since: float


class Wedges:
    """All engines that are wedged."""

    def __init__(self) -> None:
        self._wedges: dict[str, Wedge] = {}

    def begin(self, lease: Held) -> None:
        self._wedges[lease.model] = Wedge(lease.model, lease.created, time.monotonic())

    def clear(self) -> None:
        self._wedges.clear()

    def over(self, snapshot: Snapshot) -> list[str]:
        """Forget the engines that are gone, and return the names of their models."""
        gone = [name for name, wedge in self._wedges.items() if not _runs(snapshot, wedge)]
        for name in gone:
            del self._wedges[name]
        return gone

    def unnoticed(self, snapshot: Snapshot, notes: Sequence[Noted], *, is_faulty: bool) -> Iterator[str]:
        """No wedged engine goes on for long, unless a fault keeps the watchdog from seeing it."""
        now = snapshot.ended
        for wedge in self._wedges.values():
            if is_faulty or any(note.explains(cause, wedge.model, now, now) for note in notes for cause in _BLIND):
                wedge.since = now
            elif now - wedge.since > WEDGED_SECONDS:
                yield f"{wedge.model} has answered with 500 for {now - wedge.since:.0f} s, and still runs"


def _runs(snapshot: Snapshot, wedge: Wedge) -> bool:
    if wedge.model in snapshot.changing:
        return True
    lease = snapshot.leases.get(wedge.model)
    if lease is None or lease.created != wedge.created:
        return False
    return any(process.model == wedge.model and process.inner == lease.pid for process in snapshot.processes)


def check_connections(
    connections: Iterable[Connection],
    snapshot: Snapshot,
    notes: Sequence[Noted],
    is_settled: Callable[[Held], bool],
) -> Iterator[str]:
    """No connection of a client is cut off while its engine goes on, and each carries what is said on it."""
    for connection in connections:
        lease = snapshot.leases.get(connection.model)
        if connection.is_open and connection.run is None and lease is not None and is_settled(lease):
            connection.run = lease.created
        if connection.problem is None or connection.run is None or lease is None or lease.created != connection.run:
            continue
        since = snapshot.began - invariants.AFTERMATH_SECONDS
        causes = (Cause.ENDS, Cause.GATEWAY, Cause.WEDGED, Cause.START, Cause.PROOF)
        explained = any(
            note.explains(cause, connection.model, since, snapshot.ended) for note in notes for cause in causes
        )
        if is_settled(lease) and not explained:
            yield f"a connection to {connection.model}, which goes on, {connection.problem}"


def loaded_by_probes(snapshot: Snapshot, name: str) -> Iterator[str]:
    """No model that is only asked how it is has a process, a lease or a service that runs."""
    unit = (snapshot.units or {}).get(invariants.service_of(name))
    if name in snapshot.leases or name in snapshot.changing or (unit is not None and not unit.is_over):
        yield f"{name} was only asked how it is, and was started"
    yield from (f"{name} was only asked how it is, and has PID {process.inner}" for process in _of(snapshot, name))


def _of(snapshot: Snapshot, name: str) -> Iterator[Process]:
    return (process for process in snapshot.processes if process.model == name)
