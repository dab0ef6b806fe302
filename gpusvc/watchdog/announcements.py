"""The watchdog's events, as it writes them to the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpusvc.journal import events

if TYPE_CHECKING:
    from gpusvc.watchdog.judge import Pressure, Verdict
    from gpusvc.watchdog.observer import Observation


def idle(seen: Observation, verdict: Verdict) -> None:
    """Write the event "idle": nobody has used a model for its idle_timeout."""
    events.emit(
        events.EventType.IDLE,
        verdict.reason,
        model=verdict.model,
        gpu=[gpu.index for gpu in seen.leases[verdict.model].gpus],
        bytes=seen.evidence[verdict.model].vram_bytes,
        reason=verdict.reason,
    )


def pressure(seen: Observation, pressure: Pressure) -> None:
    """Write the event "pressure": a GPU has had less free memory than its reserve for pressure_time."""
    gpu = next(gpu for gpu in seen.gpus if gpu.uuid == pressure.gpu_uuid)
    events.emit(
        events.EventType.PRESSURE,
        pressure.reason,
        model=pressure.victim,
        gpu=[gpu.index],
        bytes=None if gpu.free_bytes is None else gpu.reserve_bytes - gpu.free_bytes,
        reason=pressure.reason,
        level=4,
    )


def leak(sentence: str, model: str, what: str, *, gpu: list[int] | None = None, vram_bytes: int | None = None) -> None:
    """Write the event "leak": a model left a lease behind, or processes that hold VRAM."""
    events.emit(
        events.EventType.LEAK, sentence, model=model, gpu=gpu, bytes=vram_bytes, reason=f"{what} is left", level=4
    )
