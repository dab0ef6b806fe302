"""``/metrics`` for Prometheus: the gateway's counters, the present state, and counts of events.

A scrape changes nothing: it reads counters and the shared snapshot, and does not count as use of a model. An unknown
value has no sample instead of zero; ``gpusvc_source_up`` says which source is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from gpusvc import __version__
from gpusvc.errors import GpusvcError
from gpusvc.gpu.reading import total
from gpusvc.journal.events import EventType
from gpusvc.state import counters, line
from gpusvc.state.counters import BOUNDS, Histogram, Totals
from gpusvc.state.line import Waiting
from gpusvc.status.gpus import GpuStatus
from gpusvc.status.models import ModelState, ModelStatus

if TYPE_CHECKING:
    from gpusvc.api.backend.backend import Backend
    from gpusvc.api.backend.journal import Loads

_EDGES = (*map(str, BOUNDS), "+Inf")

_GPU = ("gpu", "uuid")
"""The labels of a GPU: its index, which people know it by, and what it keeps when another one is taken out."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Everything that one scrape shows. None: the source does not answer."""

    models: Sequence[ModelStatus] | None
    gpus: Sequence[GpuStatus] | None
    totals: Mapping[str, Totals] | None
    seen: Counter[tuple[str, str, str]]
    loads: Mapping[str, Loads]
    line: Sequence[Waiting] = ()


def routes(backend: Backend) -> list[web.RouteDef]:
    async def metrics(request: web.Request) -> web.Response:
        """Metrics for Prometheus."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Told(families(await scrape(backend))))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return [web.get("/metrics", metrics)]


async def scrape(backend: Backend) -> Scrape:
    """Read everything that a scrape shows."""
    models: Sequence[ModelStatus] | None = None
    gpus: Sequence[GpuStatus] | None = None
    totals: Mapping[str, Totals] | None = None
    with suppress(GpusvcError):
        models = await backend.snapshots.models()
    with suppress(GpusvcError):
        gpus = await backend.snapshots.gpus()
    with suppress(GpusvcError):
        totals = counters.read(counters.directory(backend.paths))
    waiting = await backend.snapshots.beside(lambda: line.read(backend.paths))
    return Scrape(models, gpus, totals, backend.events.seen, backend.events.loads, waiting)


class _Told(Collector):
    """Hands ready families to the encoder, which wants to collect them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


# -- pure -------------------------------------------------------------------------------------------------------------


def families(scrape: Scrape) -> Iterator[Metric]:
    """Return the families of one scrape, also those without samples."""
    yield InfoMetricFamily("gpusvc_build", "The gpusvc that answers.", {"version": __version__})
    yield _gauge(
        "gpusvc_source_up",
        "Whether a source of these metrics answered: systemd (models), nvml (GPUs), gateway (requests).",
        ["source"],
        [
            (["systemd"], scrape.models is not None),
            (["nvml"], scrape.gpus is not None),
            (["gateway"], scrape.totals is not None),
        ],
    )
    yield from _of_models(scrape.models or ())
    yield from _of_line(scrape.line)
    yield from _of_events(scrape.seen, scrape.loads)
    yield from _of_requests(scrape.totals or {})
    yield from _of_gpus(scrape.gpus or ())


def _of_models(models: Sequence[ModelStatus]) -> Iterator[Metric]:
    yield _gauge(
        "gpusvc_model_state",
        "1 for the state that a model is in, 0 for the others.",
        ["model", "state"],
        [([model.name, str(state)], model.state is state) for model in models for state in ModelState],
    )
    yield _gauge(
        "gpusvc_model_vram_bytes",
        "VRAM that NVML attributes to a model's processes, on all its GPUs together.",
        ["model"],
        [([model.name], model.vram_bytes) for model in models],
    )
    yield _gauge(
        "gpusvc_model_reserved_bytes",
        "VRAM that is kept for a model that has its GPUs, as it said that it needs so much.",
        ["model"],
        [([model.name], model.reserved_bytes) for model in models],
    )
    standings = [(model.name, model.standing) for model in models if model.standing is not None]
    yield _gauge(
        "gpusvc_model_in_use",
        "1 if somebody holds a model's use lock.",
        ["model"],
        [([name], standing.in_use) for name, standing in standings],
    )
    yield _gauge(
        "gpusvc_model_pinned",
        "1 if a model is pinned, so that it is never evicted.",
        ["model"],
        [([name], standing.pinned) for name, standing in standings],
    )
    yield _gauge(
        "gpusvc_model_last_use_timestamp_seconds",
        "When a model was last used, or started, in seconds since the epoch.",
        ["model"],
        [([name], standing.last_use) for name, standing in standings],
    )


def _of_line(waiting: Sequence[Waiting]) -> Iterator[Metric]:
    yield _gauge("gpusvc_line_starts", "Starts that wait in line for room.", [], [([], len(waiting))])
    yield _gauge(
        "gpusvc_line_position",
        "The place in the line of a model that waits for room; 1 is next.",
        ["model"],
        [([each.model], each.position) for each in waiting],
    )
    yield _gauge(
        "gpusvc_line_since_timestamp_seconds",
        "When a model joined the line, in seconds since the epoch.",
        ["model"],
        [([each.model], each.since) for each in waiting],
    )
    yield _gauge(
        "gpusvc_line_blocked",
        "1 for each model that a start waits for, and what that model is doing. Starts before it in line are not here.",
        ["model", "by", "state"],
        [([each.model, blocker.model, blocker.state], True) for each in waiting for blocker in each.blockers],
    )


def _of_events(seen: Counter[tuple[str, str, str]], loads: Mapping[str, Loads]) -> Iterator[Metric]:
    starts, evictions, others = Counter[str](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for (kind, reason, model), number in seen.items():
        match kind:
            case EventType.START:
                starts[model] += number
            case EventType.EVICT:
                evictions[model, reason or "other"] += number
            case _:
                others[model, kind] += number
    yield _counter(
        "gpusvc_model_starts",
        "Starts of a model that got its GPUs.",
        ["model"],
        [([model], number) for model, number in sorted(starts.items())],
    )
    yield _counter(
        "gpusvc_model_evictions",
        "Evictions of a model: it was idle, a GPU ran short (pressure), another needed the room, an operator said so.",
        ["model", "reason"],
        [([*key], number) for key, number in sorted(evictions.items())],
    )
    yield _counter(
        "gpusvc_model_events",
        "What else happened to a model, by the name of the event as in gpusvc-hooks(7).",
        ["model", "event"],
        [([*key], number) for key, number in sorted(others.items())],
    )
    took = SummaryMetricFamily(
        "gpusvc_model_load_seconds", "From the start of a model's engine until it was ready.", labels=["model"]
    )
    for model, load in sorted(loads.items()):
        took.add_metric([model], count_value=load.count, sum_value=load.total_seconds)
    yield took
    yield _gauge(
        "gpusvc_model_last_load_seconds",
        "How long the last load of a model took.",
        ["model"],
        [([model], load.last_seconds) for model, load in sorted(loads.items()) if load.count],
    )


def _of_requests(totals: Mapping[str, Totals]) -> Iterator[Metric]:
    each = sorted(totals.items())
    yield _counter(
        "gpusvc_model_requests",
        "Requests through the gateway that are over, by the first digit of their status;"
        ' "none": the client was gone before there was one. An empty model: for no model in particular.',
        ["model", "status"],
        [([name, status], number) for name, of in each for status, number in of.requests.items()],
    )
    yield _gauge(
        "gpusvc_model_requests_in_flight",
        "Requests that are not over, those that wait among them.",
        ["model"],
        [([name], of.in_flight) for name, of in each],
    )
    yield _gauge(
        "gpusvc_model_requests_waiting",
        "Requests that wait for a model to be ready, or to have room for them.",
        ["model"],
        [([name], of.waiting) for name, of in each],
    )
    yield _histogram(
        "gpusvc_model_time_to_first_byte_seconds",
        "From a request's begin until the engine's answer began; the wait for a load is in it.",
        [(name, of.first_byte_seconds) for name, of in each],
    )
    yield _histogram(
        "gpusvc_model_request_duration_seconds",
        "From a request's begin to the end of its answer.",
        [(name, of.seconds) for name, of in each],
    )
    yield _counter(
        "gpusvc_model_prompt_tokens",
        "Tokens read, as far as engines report them.",
        ["model"],
        [([name], of.prompt_tokens) for name, of in each],
    )
    yield _counter(
        "gpusvc_model_completion_tokens",
        "Tokens written, as far as engines report them.",
        ["model"],
        [([name], of.completion_tokens) for name, of in each],
    )
    yield _counter(
        "gpusvc_model_received_bytes",
        "Bytes of request bodies that came from clients.",
        ["model"],
        [([name], of.received_bytes) for name, of in each],
    )
    yield _counter(
        "gpusvc_model_sent_bytes",
        "Bytes of answers that went to clients.",
        ["model"],
        [([name], of.sent_bytes) for name, of in each],
    )


def _of_gpus(gpus: Sequence[GpuStatus]) -> Iterator[Metric]:
    each = [([str(status.gpu.index), status.gpu.uuid], status) for status in gpus]
    yield _gauge(
        "gpusvc_gpu_info",
        "1, and what a GPU is called.",
        [*_GPU, "name"],
        [([*labels, status.gpu.name], True) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_up",
        "Whether NVML can read a GPU.",
        _GPU,
        [(labels, status.gpu.problem is None) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_memory_total_bytes",
        "Memory of a GPU.",
        _GPU,
        [(labels, status.gpu.total_bytes) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_memory_used_bytes",
        "Memory of a GPU that is in use by anybody.",
        _GPU,
        [(labels, status.gpu.used_bytes) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_memory_free_bytes",
        "Memory of a GPU that is free.",
        _GPU,
        [(labels, status.gpu.free_bytes) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_memory_reserved_bytes",
        "Memory of a GPU that models which have it said that they need.",
        _GPU,
        [(labels, status.reserved_bytes) for labels, status in each if status.gpu.problem is None],
    )
    yield _gauge(
        "gpusvc_gpu_memory_foreign_bytes",
        "Memory of a GPU that NVML attributes to processes of no model.",
        _GPU,
        [(labels, foreign_bytes(status)) for labels, status in each],
    )
    yield _gauge(
        "gpusvc_gpu_utilisation_ratio",
        "Share of the time of late in which a GPU worked, from 0 to 1.",
        _GPU,
        [
            (labels, None if status.gpu.utilisation_percent is None else status.gpu.utilisation_percent / 100)
            for labels, status in each
        ],
    )


def foreign_bytes(status: GpuStatus) -> int | None:
    """Return the bytes that foreign processes hold on a GPU, or None if NVML does not say."""
    if status.gpu.processes is None:
        return None
    return total(holder.vram_bytes for holder in status.holders if holder.model is None)


def _gauge(
    name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], float | None]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in samples:
        if number is not None:
            family.add_metric(values, float(number))
    return family


def _counter(
    name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[Sequence[str], int]]
) -> CounterMetricFamily:
    """Return a counter. ``name`` is without the suffix _total."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _histogram(name: str, text: str, samples: Iterable[tuple[str, Histogram]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=["model"])
    for model, histogram in samples:
        within = 0
        buckets: list[tuple[str, float]] = []
        for edge, number in zip(_EDGES, histogram.counts, strict=True):
            within += number
            buckets.append((edge, within))
        family.add_metric([model], buckets, histogram.sum)
    return family
