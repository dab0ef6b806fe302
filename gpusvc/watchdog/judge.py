"""The verdicts: which models are idle, stuck or failing, and which one leaves a GPU under pressure.

Evidence in, verdicts out: this module reads no clock and no model. Its memory is a value, History, which goes in with
each tick and comes out renewed. A watchdog without it starts with an empty one, and needs a few ticks.

The times of a model (for how long it is idle or stuck) count only while the watchdog observes it. After a gap, because
the machine slept or NVML failed, they start again: no verdict rests on missing evidence. Wall-clock times are compared
only with their own earlier values, because clocks are set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gpusvc.config.host import BusyAction
from gpusvc.quantity import format_amount, format_duration, format_size
from gpusvc.state.counters import Answers

# Quiet ticks before a model is idle. One is not enough: utilisation is sampled, and a request has pauses.
_LOOKS = 3

# A tenth of a core is work; an idle server uses far less. progress.py has the same limit.
_CPU_SHARE = 0.1

# Server errors before a model is failing. One is not enough: a request may cause it.
_FAILURES = 2

_LONGEST_GAP_TICKS = 10
_LONGEST_GAP_SECONDS = 30.0


class Finding(StrEnum):
    """The kind of a verdict."""

    NONE = "none"
    IDLE = "idle"
    STUCK = "stuck"
    FAILING = "failing"


class Source(StrEnum):
    """What told whether a model's processes work."""

    NVML = "NVML"
    CPU = "CPU time"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one tick saw of a model that holds a lease."""

    name: str
    run: float
    """When its lease was made, which identifies its run."""
    ready: bool
    leaving: bool
    """Whether it is being evicted or stopped already."""
    missing: str | None
    """In a sentence, what could not be read, such as an error of NVML; None: all was read."""
    in_use: bool | None
    last_use: float | None
    """use.last_use(): its last entry or progress, in seconds since the epoch."""
    last_progress: float | None
    """use.last_progress(), in seconds since the epoch."""
    unused_seconds: float | None
    """Seconds since last_use, at most since its engine started. It counts only while History does not know the run."""
    gpu_active: bool | None
    """Whether the GPU worked for it since the last tick; None: NVML does not report this, or it has no GPU."""
    cpu_seconds: float | None
    """The CPU time that its control group has used so far."""
    gpu_uuids: tuple[str, ...]
    vram_bytes: int | None
    pinned: bool
    idle_timeout_seconds: float
    """0: never idle."""
    busy_timeout_seconds: float
    """0: never stuck."""
    busy_action: BusyAction
    attached_timeout_seconds: float = 0.0
    """The idle timeout while clients keep quiet WebSockets open; 0: never idle."""
    failing_time_seconds: float = 0.0
    """0: never failing."""
    answers: Answers | None = None
    """What the gateway counted of the engine's responses; None: nothing."""


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """What one tick saw of a GPU. ``free_bytes`` None: NVML did not report it."""

    uuid: str
    index: int
    free_bytes: int | None
    reserve_bytes: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a model: its kind, the reason in a sentence, for how long, and the source of the evidence."""

    model: str
    kind: Finding
    reason: str
    seconds: float = 0.0
    source: Source | None = None
    action: BusyAction | None = None
    """What to do with a stuck or failing model."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """A GPU has had less free memory than its reserve for too long. ``victim`` None: no model can be evicted now."""

    gpu_uuid: str
    victim: str | None
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Track:
    """What judge() remembers of a model. Seconds are by the clock of the ticks."""

    run: float
    seen_seconds: float
    """When all of its evidence was last there."""
    quiet_seconds: float
    """Since when nobody uses it."""
    quiet_looks: int
    still_seconds: float
    """Since when it is in use without progress."""
    last_use: float | None
    last_progress: float | None
    cpu_seconds: float | None
    answers: Answers | None = None
    failures: int = 0
    """The engine's server errors since its last success."""
    failing_seconds: float = 0.0
    """When the first of them was seen."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Since when a GPU has less free memory than its reserve, and when that was last seen."""

    since_seconds: float
    seen_seconds: float


@dataclass(frozen=True, slots=True)
class History:
    """What judge() remembers from tick to tick."""

    models: Mapping[str, Track] = field(default_factory=dict)
    shortages: Mapping[str, Shortage] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of one tick: a verdict on each model, and the GPUs under pressure."""

    history: History
    verdicts: tuple[Verdict, ...]
    pressures: tuple[Pressure, ...]


def judge(
    history: History,
    now_seconds: float,
    models: Sequence[Evidence],
    gpus: Iterable[GpuEvidence] = (),
    *,
    interval_seconds: float,
    pressure_seconds: float,
) -> Judgement:
    """Return the judgement of one tick.

    Args:
        history: of the last Judgement.
        now_seconds: by CLOCK_BOOTTIME, or another clock that nobody sets.
        models: the evidence on each model that holds a lease.
        gpus: the evidence on the GPUs.
        interval_seconds: the planned time between ticks.
        pressure_seconds: for how long a GPU may have less free memory than its reserve.
    """
    gap_seconds = max(_LONGEST_GAP_TICKS * interval_seconds, _LONGEST_GAP_SECONDS)
    tracks: dict[str, Track] = {}
    verdicts: list[Verdict] = []
    for evidence in models:
        track, verdict = _judge_model(history.models.get(evidence.name), evidence, now_seconds, gap_seconds)
        verdicts.append(verdict)
        if track is not None:
            tracks[evidence.name] = track

    gpus = sorted(gpus, key=lambda gpu: gpu.index)
    shortages = dict(_shortages(history.shortages, gpus, now_seconds, gap_seconds))
    idle = {verdict.model for verdict in verdicts if verdict.kind is Finding.IDLE}
    going = [evidence for evidence in models if evidence.leaving or evidence.name in idle]
    pressures: list[Pressure] = []
    for gpu in gpus:
        short = shortages.get(gpu.uuid)
        if short is None or short.seen_seconds != now_seconds or now_seconds - short.since_seconds < pressure_seconds:
            continue
        # One victim at a time: what it gives back may be enough.
        waits = any(gpu.uuid in evidence.gpu_uuids for evidence in going)
        victim = None if waits else _victim(gpu, models, tracks, now_seconds)
        going += [victim] if victim is not None else []
        pressures.append(_pressure(gpu, victim, now_seconds - short.since_seconds, waits=waits))
    return Judgement(History(tracks, shortages), tuple(verdicts), tuple(pressures))


def _judge_model(
    track: Track | None, evidence: Evidence, now_seconds: float, gap_seconds: float
) -> tuple[Track | None, Verdict]:
    name = evidence.name
    if track is not None and track.run != evidence.run:
        track = None
    if not evidence.ready:
        return None, Verdict(name, Finding.NONE, f"{name} is loading.")
    missing = _missing(evidence)
    if missing is not None:
        return track, Verdict(name, Finding.NONE, f"There is no verdict on {name}: {missing}")
    if track is None:
        track = _begin(evidence, now_seconds, evidence.unused_seconds or 0.0)
    elif not 0 <= now_seconds - track.seen_seconds <= gap_seconds:
        track = _begin(evidence, now_seconds, 0.0)
    track, source = _look(track, evidence, now_seconds)
    verdict = _verdict(track, evidence, now_seconds, source)
    if verdict.kind is Finding.STUCK:
        # The next verdict comes after busy_timeout again, if the action did not help.
        track = replace(track, still_seconds=now_seconds)
    elif verdict.kind is Finding.FAILING:
        # Only new failures can lead to this verdict again.
        track = replace(track, failures=0)
    return track, verdict


def _missing(evidence: Evidence) -> str | None:
    if evidence.missing is not None:
        return evidence.missing
    if evidence.in_use is None or evidence.last_use is None:
        return "its locks cannot be tried."
    return "the CPU time of its processes is unknown." if evidence.cpu_seconds is None else None


def _begin(evidence: Evidence, now_seconds: float, unused_seconds: float) -> Track:
    return Track(
        run=evidence.run,
        seen_seconds=now_seconds,
        quiet_seconds=now_seconds - max(0.0, unused_seconds),
        quiet_looks=0,
        still_seconds=now_seconds,
        last_use=evidence.last_use,
        last_progress=evidence.last_progress,
        cpu_seconds=evidence.cpu_seconds,
        answers=evidence.answers,
    )


def _look(before: Track, evidence: Evidence, now_seconds: float) -> tuple[Track, Source]:
    """Return the Track with this tick added, and the source that told whether the processes work."""
    elapsed = now_seconds - before.seen_seconds
    cpu_used = (evidence.cpu_seconds or 0.0) - (before.cpu_seconds or 0.0)
    cpu_active = elapsed > 0 and cpu_used >= _CPU_SHARE * elapsed
    # An idle server may use some CPU time, so that NVML alone counts if it reports the GPU's work.
    working, source = (cpu_active, Source.CPU) if evidence.gpu_active is None else (evidence.gpu_active, Source.NVML)
    progressed = evidence.last_progress != before.last_progress
    used = evidence.in_use or working or progressed or evidence.last_use != before.last_use
    moving = not evidence.in_use or evidence.gpu_active or cpu_active or progressed
    track = replace(
        before,
        seen_seconds=now_seconds,
        quiet_seconds=now_seconds if used else before.quiet_seconds,
        quiet_looks=0 if used else before.quiet_looks + 1,
        still_seconds=now_seconds if moving else before.still_seconds,
        last_use=evidence.last_use,
        last_progress=evidence.last_progress,
        cpu_seconds=evidence.cpu_seconds,
    )
    return _count_failures(track, evidence.answers, now_seconds), source


def _count_failures(track: Track, now: Answers | None, now_seconds: float) -> Track:
    """Return the Track with the failures that came since its last look; a success ends the row of failures."""
    before = track.answers
    if now is None or before is None or now.succeeded != before.succeeded or now.succeeding:
        return replace(track, answers=now, failures=0)
    more = now.failed - before.failed
    if more <= 0:
        return replace(track, answers=now, failures=track.failures if more == 0 else 0)
    began = track.failing_seconds if track.failures else now_seconds
    return replace(track, answers=now, failures=track.failures + more, failing_seconds=began)


def _verdict(track: Track, evidence: Evidence, now_seconds: float, source: Source) -> Verdict:
    name = evidence.name
    if evidence.leaving:
        return Verdict(name, Finding.NONE, f"{name} is being stopped.", source=source)
    failing, limit = now_seconds - track.failing_seconds, evidence.failing_time_seconds
    if limit and track.failures >= _FAILURES and failing >= limit:
        reason = f"{name} answered {track.failures} requests in a row with a server error, in {_span(failing)}."
        return Verdict(name, Finding.FAILING, reason, failing, source, evidence.busy_action)
    if evidence.in_use:
        still, limit = now_seconds - track.still_seconds, evidence.busy_timeout_seconds
        if limit and still >= limit:
            reason = f"{name} is in use, and for {_span(still)} made no progress: no output, no work of its processes."
            return Verdict(name, Finding.STUCK, reason, still, source, evidence.busy_action)
        return Verdict(name, Finding.NONE, f"{name} is in use.", still, source)
    is_attached = evidence.answers is not None and evidence.answers.attached > 0
    key = "attached_timeout" if is_attached else "idle_timeout"
    limit = evidence.attached_timeout_seconds if is_attached else evidence.idle_timeout_seconds
    quiet = now_seconds - track.quiet_seconds
    if evidence.pinned or not limit:
        why = "is pinned" if evidence.pinned else f"has no {key}"
        return Verdict(name, Finding.NONE, f"{name} was not used for {_span(quiet)}, and {why}.", quiet, source)
    if quiet >= limit and track.quiet_looks >= _LOOKS:
        reason = f"{name} was not used for {_span(quiet)}, and its processes did no work, by their {_NOUN[source]}."
        return Verdict(name, Finding.IDLE, reason, quiet, source)
    reason = f"{name} was not used for {_span(quiet)}; it may stay for {_span(limit)}."
    return Verdict(name, Finding.NONE, reason, quiet, source)


_NOUN = {Source.NVML: "use of the GPU", Source.CPU: "CPU time"}


def _span(seconds: float) -> str:
    return format_duration(round(seconds) if seconds >= 1 else seconds)


def _shortages(
    before: Mapping[str, Shortage], gpus: Iterable[GpuEvidence], now_seconds: float, gap_seconds: float
) -> Iterable[tuple[str, Shortage]]:
    for gpu in gpus:
        known = before.get(gpu.uuid)
        if known is not None and not 0 <= now_seconds - known.seen_seconds <= gap_seconds:
            known = None
        if gpu.free_bytes is None:
            if known is not None:
                yield gpu.uuid, known
        elif gpu.free_bytes < gpu.reserve_bytes:
            yield gpu.uuid, Shortage(now_seconds if known is None else known.since_seconds, now_seconds)


def _victim(
    gpu: GpuEvidence, models: Iterable[Evidence], tracks: Mapping[str, Track], now_seconds: float
) -> Evidence | None:
    """Return the model on ``gpu`` with the oldest last use, of those that are not in use and not pinned."""

    def may_go(evidence: Evidence) -> bool:
        track = tracks.get(evidence.name)
        return (
            gpu.uuid in evidence.gpu_uuids
            and evidence.vram_bytes != 0
            and not evidence.pinned
            and track is not None
            and track.seen_seconds == now_seconds
            and track.quiet_looks >= _LOOKS
        )

    return min(filter(may_go, models), key=lambda evidence: (evidence.last_use or 0.0, evidence.name), default=None)


def _pressure(gpu: GpuEvidence, victim: Evidence | None, seconds: float, *, waits: bool) -> Pressure:
    free = format_amount(gpu.free_bytes)
    what = f"GPU {gpu.index} has {free} free, and for {_span(seconds)} less than its reserve of"
    if victim is not None:
        then = f"of its idle models {victim.name} was used least recently."
    else:
        then = "a model on it is being stopped." if waits else "there is no idle model on it that can be evicted."
    name = None if victim is None else victim.name
    return Pressure(gpu.uuid, name, f"{what} {format_size(gpu.reserve_bytes)}; {then}", seconds)
