"""What must never be seen: snapshots and records in, sentences about what is wrong out. Nothing here looks at anything.

Each function is sound for a look that takes its time: what it finds was so at some moment, with no moment for it to be
right. What needs time to come about (``Lingering``, ``unlike_new``) is for the caller to give time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tests.campaign.snapshot import Held, Late, Process, Snapshot

# What the plan may be wrong by: sizes are whole MiB, and the driver keeps some.
SLACK_BYTES = 64 << 20

SERVICES = ("gpusvc-watchdog.service", "gpusvc-gateway.socket", "gpusvc-api.socket")


def scope_of(model: str) -> str:
    return f"model-{model}.scope"


def service_of(model: str) -> str:
    return f"model@{model}.service"


# Processes


def escaped(snapshot: Snapshot) -> Iterator[str]:
    """No process of a model is outside its scope."""
    for process in snapshot.processes:
        if process.model is not None and scope_of(process.model) not in process.cgroup.split("/"):
            yield f"{_name(process)} is in {process.cgroup}, not in {scope_of(process.model)}"


def outlived(snapshot: Snapshot) -> Iterator[str]:
    """No process of a model is alive after a stop that systemd calls a success."""
    for process in snapshot.processes:
        unit = (snapshot.units or {}).get(service_of(process.model)) if process.model is not None else None
        if unit is not None and unit.is_over and unit.active == "inactive":
            yield f"{_name(process)} is alive, and {service_of(process.model or '')} is {unit.active}"


# Leases and bytes


def without_lease(snapshot: Snapshot) -> Iterator[str]:
    """No byte is held, and no engine runs, without a lease."""
    models = {process.pid: process for process in snapshot.processes if process.model is not None}
    for process in models.values():
        if snapshot.unleased(process.model or ""):
            yield f"{_name(process)} runs, and there is no lease of it"
    for gpu, holders in snapshot.vram.items():
        for pid, held in holders.items():
            owner = models.get(pid)
            lease = snapshot.leases.get(owner.model or "") if owner is not None else None
            if lease is not None and gpu not in {given.index for given in lease.gpus}:
                yield f"{_name(models[pid])} holds {held} bytes of GPU {gpu}, which its lease does not name"


def overcommitted(snapshot: Snapshot) -> Iterator[str]:
    """No two leases together are over a GPU's size; who is on his way out for another counts once.

    A lease counts in full while its engine loads. One that is ready counts by what its processes hold, which may be
    less than it asked for, so that the rest may be given away; and from its end until that is proven by what it was
    seen to hold.
    """
    leaving = {name: lease.created for lease in snapshot.leases.values() if not lease.ready for name in lease.evicting}
    staying = [lease for lease in snapshot.leases.values() if lease.created >= leaving.get(lease.model, 0.0)]
    for gpu, capacity in snapshot.capacity.items():
        here = {lease.model: size for lease in staying if (size := _size(snapshot, lease, gpu))}
        if len(here) > 1 and sum(here.values()) > capacity + SLACK_BYTES:
            told = ", ".join(f"{model} {size >> 20} MiB" for model, size in sorted(here.items()))
            yield f"GPU {gpu} has {capacity >> 20} MiB, and leases promise {told}"


def _size(snapshot: Snapshot, lease: Held, gpu: int) -> int:
    given = next((given for given in lease.gpus if given.index == gpu), None)
    if given is None or given.reserved_bytes is None:
        return 0  # it was promised nothing, and takes what somebody leaves
    living = [process for process in snapshot.processes if process.model == lease.model]
    if lease.ready and living:
        holders = snapshot.vram.get(gpu, {})
        return sum(holders.get(process.pid, 0) for process in living)
    if lease.ready:  # and dead; what it had asked for may have been given away, even where nobody could see how much
        # Its lease may name more than it held: one of its processes died before, and that room was given away.
        used = given.used_bytes or 0
        return min(used, snapshot.held_before.get((lease.model, lease.created, gpu), used))
    return given.reserved_bytes


# Releases


def falsely_released(snapshot: Snapshot, owners: Mapping[int, str]) -> Iterator[str]:
    """No lease is gone while the driver still counts bytes for its dead.

    Args:
        snapshot: what is.
        owners: by inner PID, the model whose process that was.
    """
    for late in snapshot.late:
        model = owners.get(late.inner)
        if model is not None and snapshot.unleased(model):
            yield f"{model} counts as released, and the driver has {late.bytes} bytes of GPU {late.gpu} as its"


@dataclass(frozen=True, slots=True)
class Unprovable:
    """While a fault is on, the release of this run cannot be proven: its lease was seen after the fault began."""

    model: str
    created: float
    fault: str


def wrongly_proven(snapshot: Snapshot, unprovable: Iterable[Unprovable]) -> Iterator[str]:
    """No lease whose release cannot be proven is gone, or has given way to another."""
    for case in unprovable:
        now = snapshot.leases.get(case.model)
        if snapshot.unleased(case.model) or (now is not None and now.created != case.created):
            yield f"the lease of {case.model} is gone, and its release could not be proven: {case.fault}"


# Uses


@dataclass(frozen=True, slots=True)
class Used:
    """A model that was ready while somebody held its ``use``, which he still does."""

    model: str
    created: float


def evicted_in_use(snapshot: Snapshot, used: Iterable[Used]) -> Iterator[str]:
    """No model that somebody uses is gone. (Who was stopped or killed on purpose is not in ``used``.)"""
    for use in used:
        now = snapshot.leases.get(use.model)
        if snapshot.unleased(use.model) or (now is not None and now.created != use.created):
            yield f"{use.model} was in use, and is gone"


# Requests


class Cause(StrEnum):
    """What can make an error true; the campaign notes when it does such a thing, and to which model."""

    ENDS = "the model was stopped, killed, frozen or evicted on purpose"
    GATEWAY = "the gateway was stopped, killed, frozen, or out of something"
    START = "something that a start needs was broken or taken away"
    GONE = "its file was taken away"
    BUSY = "other models were in use or loading"
    HELD = "other models were pinned or stuck, a rule was in the way, or GPUs were not to be seen"
    WEDGED = "its engine was made to answer with 500"
    WATCHDOG = "the watchdog was stopped, killed, frozen, or could not see"
    PROOF = "its release could not be proven, or the proof was killed"


EVERYBODY = "*"


@dataclass(frozen=True, slots=True)
class Noted:
    """One cause: of which model (or EVERYBODY), and from when until when (None: still)."""

    cause: Cause
    model: str
    began: float
    ended: float | None
    what: str = ""

    def explains(self, cause: Cause, model: str, since: float, until: float) -> bool:
        return (
            self.cause is cause
            and self.model in {model, EVERYBODY}
            and self.began <= until
            and (self.ended is None or self.ended >= since)
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. ``status`` None: there was no answer, and ``problem`` says what there was."""

    number: int
    model: str
    question: str
    began: float
    ended: float
    status: int | None = None
    body: bytes = b""
    problem: str = ""
    is_patient: bool = True
    """False: its client went away after a moment, as it does. Then no answer is no fault."""


# What a cause leaves behind goes on for a moment: a unit that is on its way down, a restart that waits.
AFTERMATH_SECONDS = 10.0

# How long before a request its model's start may have begun: what makes the start fail may be over by then.
_START_SECONDS = 15.0

_CAUSES: Mapping[int, tuple[Cause, ...]] = {
    404: (Cause.GONE,),
    409: (Cause.ENDS, Cause.START),
    500: (Cause.WEDGED,),
    502: (Cause.ENDS,),
    503: (Cause.ENDS, Cause.START, Cause.GATEWAY, Cause.GONE),
    504: (Cause.ENDS, Cause.START, Cause.GATEWAY, Cause.BUSY, Cause.HELD),
}

COOLDOWN = "because its last start failed"
"""Is in what a request is told during a cooldown, which repeats the reason of the start."""

# A request waits for those who use or load other models. What stays refuses it: pins, what is stuck, rules.
_NO_ROOM = re.compile(r"does not have that free now|may not start now|came into use|is in use|come first|comes first")
_RAN_OUT = re.compile(r"ran out of VRAM")


def _room_causes(message: str) -> tuple[Cause, ...]:
    if _RAN_OUT.search(message):
        return (Cause.BUSY, Cause.HELD)
    return (Cause.HELD,) if _NO_ROOM.search(message) else ()


def untrue(answer: Answer, notes: Sequence[Noted]) -> Iterator[str]:
    """Every request gets an answer that is right, or an error that is true."""
    where = f"request {answer.number} to {answer.model}"
    since = answer.began - AFTERMATH_SECONDS

    def has(*causes: Cause, earlier_seconds: float = 0.0) -> bool:
        begin = since - earlier_seconds
        return any(note.explains(cause, answer.model, begin, answer.ended) for note in notes for cause in causes)

    if answer.status is None:
        if answer.is_patient and not has(Cause.GATEWAY):
            yield f"{where} was not answered after {answer.ended - answer.began:.1f} s: {answer.problem}"
        return
    try:
        said = json.loads(answer.body)
        if answer.status == 200:
            right = said["choices"][0]["message"]["content"] == f"You said: {answer.question}"
            if not right or said["model"] != answer.model:
                yield f"{where} got another's answer: {answer.body[:300]!r}"
            return
        message = str(said["error"]["message"])
    except (ValueError, KeyError, TypeError, IndexError):
        if answer.status != 200 or not has(Cause.GATEWAY, Cause.ENDS):
            yield f"{where} got {answer.status} with something that is no answer: {answer.body[:300]!r}"
        return
    if answer.status not in _CAUSES:
        yield f"{where} got {answer.status}, which nothing explains: {message}"
    elif COOLDOWN in message:
        return  # it repeats what was judged when it was said first
    elif not has(
        *_CAUSES[answer.status],
        *_room_causes(message),
        earlier_seconds=_START_SECONDS if "did not start" in message else 0.0,
    ):
        yield f"{where} got {answer.status}, and nothing that was done makes that true: {message}"


@dataclass(frozen=True, slots=True)
class Insisted:
    """A client with a short patience that asked again and again. ``tries`` is how often; None: it was served."""

    model: str
    began: float
    ended: float
    tries: int | None
    last: str = ""
    """What it was told last."""


def starved(insisted: Insisted, notes: Sequence[Noted]) -> Iterator[str]:
    """A client that asks again and again is served in the end, if nothing was in the way."""
    since = insisted.began - AFTERMATH_SECONDS
    if (
        insisted.tries is None
        or COOLDOWN in insisted.last
        or any(note.explains(cause, insisted.model, since, insisted.ended) for note in notes for cause in Cause)
    ):
        return
    yield f"{insisted.model} was asked {insisted.tries} times in {insisted.ended - insisted.began:.0f} s for nothing"


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of a request that looks at a model without loading it."""

    model: str
    path: str
    began: float
    ended: float
    status: int | None
    code: str = ""
    problem: str = ""


def untrue_state(probed: Probed, notes: Sequence[Noted]) -> Iterator[str]:
    """A probe is answered by the engine, or told at once that the model is not loaded."""
    if probed.status in {200, 404} or (probed.status, probed.code) == (503, "model_not_loaded"):
        return
    since = probed.began - AFTERMATH_SECONDS
    causes = (Cause.ENDS, Cause.GATEWAY, Cause.GONE, Cause.START, Cause.PROOF)
    if not any(note.explains(cause, probed.model, since, probed.ended) for note in notes for cause in causes):
        got = probed.problem or f"{probed.status} {probed.code}"
        yield f"the probe {probed.path} of {probed.model} got {got} after {probed.ended - probed.began:.1f} s"


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict of the watchdog in the journal: stuck or failing, and when, by the clock of the notes."""

    model: str
    kind: str
    when: float
    message: str = ""


# How long what made a model stuck may be over when it is judged: its busy_timeout, and a few ticks.
_JUDGED_SECONDS = 20.0


def misjudged(judged: Judged, notes: Sequence[Noted]) -> Iterator[str]:
    """No model is judged stuck or failing that was not made so."""
    causes = (Cause.WEDGED,) if judged.kind == "failing" else (Cause.ENDS, Cause.GATEWAY, Cause.START, Cause.WEDGED)
    since = judged.when - _JUDGED_SECONDS - AFTERMATH_SECONDS
    if not any(note.explains(cause, judged.model, since, judged.when) for note in notes for cause in causes):
        yield f"{judged.model} was judged {judged.kind}, and nothing was done to it: {judged.message}"


# In the end


@dataclass(slots=True)
class Lingering:
    """What may be for a moment only: says what is still there, the same, after ``seconds``."""

    seconds: float
    _since: dict[str, float] = field(default_factory=dict)

    def look(self, now: float, sentences: Iterable[str]) -> list[str]:
        self._since = {sentence: self._since.get(sentence, now) for sentence in sentences}
        return [sentence for sentence, since in self._since.items() if now - since >= self.seconds]


def failed_alive(snapshot: Snapshot) -> Iterator[str]:
    """Processes of a model whose service failed: PID 1 is at them, but not for long."""
    for process in snapshot.processes:
        unit = (snapshot.units or {}).get(service_of(process.model)) if process.model is not None else None
        if unit is not None and unit.is_over:
            yield f"{_name(process)} is alive, and {service_of(process.model or '')} is {unit.active}"


def stuck(snapshot: Snapshot) -> Iterator[str]:
    """The models that are over and have a lease all the same: their release is not proven."""
    for name in sorted({*snapshot.leases, *snapshot.broken}):
        unit = (snapshot.units or {}).get(service_of(name))
        if snapshot.units is not None and (unit is None or unit.is_over):
            yield name


def unlike_new(snapshot: Snapshot, services: Mapping[str, str]) -> Iterator[str]:
    """What distinguishes a machine from one on which nothing ever happened but starts and stops.

    Args:
        snapshot: what is, a while after the last fault and with nobody asking for anything.
        services: ActiveStates of gpusvc's own units.
    """
    if snapshot.units is None:
        yield "systemd does not answer"
    for name in stuck(snapshot):
        yield f"{name} is stuck"
    for name in sorted(snapshot.changing):
        yield f"the lease of {name} is changing"
    for name, unit in sorted((snapshot.units or {}).items()):
        if unit.job or unit.active not in {"active", "inactive", "failed"}:
            yield f"{name} is {unit.active} ({unit.sub})"
    living = {process.model for process in snapshot.processes if process.model is not None}
    for name, lease in sorted(snapshot.leases.items()):
        if not lease.ready or name not in living:
            yield f"{name} has a lease, and {'no process' if lease.ready else 'is not ready'}"
    for late in snapshot.late:
        yield f"the driver counts {late.bytes} bytes of GPU {late.gpu} for PID {late.inner}, which is dead"
    for name in sorted(snapshot.closed_doors):
        yield f"the door of {name} is closed"
    if snapshot.tickets:
        yield f"{snapshot.tickets} starts wait for room"
    for needed in SERVICES:
        if services.get(needed) != "active":
            yield f"{needed} is {services.get(needed, 'unknown')}"
    for process in snapshot.processes:
        for part in process.cgroup.split("/"):
            if part.startswith("model@") and part.endswith(".service"):
                service = (snapshot.units or {}).get(part)
                if service is None or service.is_over:
                    yield f"{_name(process)} is left in {part}"


def _name(process: Process) -> str:
    return f"PID {process.inner} ({process.command[:60]})"


INSTANT = (escaped, outlived, without_lease, overcommitted)
"""Those that one snapshot is enough for."""

__all__ = [
    "AFTERMATH_SECONDS", "COOLDOWN", "EVERYBODY", "INSTANT", "SERVICES", "Answer", "Cause", "Insisted", "Judged",
    "Late", "Lingering", "Noted", "Probed", "Unprovable", "Used", "escaped", "evicted_in_use", "failed_alive",
    "falsely_released", "misjudged", "outlived", "overcommitted", "starved", "stuck", "unlike_new", "untrue",
    "untrue_state", "without_lease", "wrongly_proven",
]  # fmt: skip
