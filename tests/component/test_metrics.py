"""/metrics as Prometheus reads it: the application over a scripted machine, and prometheus_client's own parsers."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gpusvc import __version__
from gpusvc.api.backend.journal import Loads
from gpusvc.quantity import GIB
from gpusvc.state import counters
from gpusvc.state.counters import Counters
from gpusvc.state.line import Blocker, Notice
from gpusvc.status.models import ModelState
from tests.component.scene import Scene, furnish, refusal, serving

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

HOSTILE = 'qu"en\\\n'


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    made = Scene(tmp_path, programs)
    furnish(made)
    return made


class Told:
    """What a scrape told: ``value("gpusvc_…", model="qwen")``, None where it has no such sample."""

    def __init__(self, text: str, content_type: str) -> None:
        self.text = text
        self.content_type = content_type
        read: Callable[[str], Iterable[Metric]] = parse_openmetrics if "openmetrics" in content_type else parse
        families = list(read(text))
        self.types = {family.name: family.type for family in families}
        self.help = {family.name: family.documentation for family in families}
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, labels: Mapping[str, str] | None = None, /, **more: str) -> float | None:
        return self.samples.get((name, *sorted({**(labels or {}), **more}.items())))

    def has(self, name: str) -> bool:
        return any(key[0] == name for key in self.samples)


def scrape(scene: Scene, accept: str = "") -> Told:
    async def ask() -> Told:
        async with (
            serving(scene),
            aiohttp.ClientSession(headers={"Accept": accept}) as client,
            client.get(f"{scene.url}metrics") as answer,
        ):
            assert answer.status == 200
            return Told(await answer.text(), answer.headers["Content-Type"])

    return asyncio.run(ask())


def test_models_are_told_with_state_vram_and_use(scene: Scene) -> None:
    told = scrape(scene)
    assert {str(state): told.value("gpusvc_model_state", model="qwen", state=str(state)) for state in ModelState} == {
        "stopped": 0, "starting": 0, "ready": 1, "stopping": 0, "stuck": 0, "failed": 0,
    }  # fmt: skip
    assert told.value("gpusvc_model_vram_bytes", model="qwen") == 9 * GIB
    assert told.value("gpusvc_model_vram_bytes", model="flux") == 0
    assert told.value("gpusvc_model_in_use", model="coder") == 1
    assert told.value("gpusvc_model_pinned", model="coder") == 0
    assert told.value("gpusvc_build_info", version=__version__) == 1


def test_gpus_are_told_with_memory_use_and_what_is_foreign(scene: Scene) -> None:
    told = scrape(scene)
    gpu = {"gpu": "1", "uuid": "GPU-1"}
    assert told.value("gpusvc_gpu_info", gpu, name="NVIDIA RTX 6000 Ada Generation") == 1
    assert told.value("gpusvc_gpu_up", gpu) == 1
    assert told.value("gpusvc_gpu_memory_total_bytes", gpu) == 48 * GIB
    assert told.value("gpusvc_gpu_memory_used_bytes", gpu) == 24.5 * GIB
    assert told.value("gpusvc_gpu_memory_free_bytes", gpu) == 23.5 * GIB
    assert told.value("gpusvc_gpu_memory_foreign_bytes", gpu) == 3 * GIB
    assert told.value("gpusvc_gpu_utilisation_ratio", gpu) == 0.37


def test_the_line_is_told_with_places_and_what_is_waited_for(scene: Scene) -> None:
    notices = [Notice(scene.paths, f"{born}-{name}", name, born, 0) for born, name in enumerate(("coder", "gemma"))]
    since = notices[0].tell([Blocker("qwen", "in use")], []).since
    notices[1].tell([], [])
    told = scrape(scene)
    for notice in notices:
        notice.close()
    assert told.value("gpusvc_line_starts") == 2
    assert [told.value("gpusvc_line_position", model=name) for name in ("coder", "gemma", "qwen")] == [1, 2, None]
    assert told.value("gpusvc_line_since_timestamp_seconds", model="coder") == pytest.approx(since)
    assert told.value("gpusvc_line_blocked", model="coder", by="qwen", state="in use") == 1
    assert not any(key[0] == "gpusvc_line_blocked" and ("model", "gemma") in key for key in told.samples)
    assert scrape(scene).value("gpusvc_line_starts") == 0


def test_requests_are_told_as_the_workers_counted_them(scene: Scene) -> None:
    workers = [Counters(counters.file_of(counters.directory(scene.paths), number)) for number in range(2)]
    for worker in workers:
        qwen = worker.of("qwen")
        qwen.began()
        qwen.first_byte(0.3)
        qwen.ended(200, 1.5)
        qwen.began()
        qwen.waiting(+1)
        qwen.tokens(12, 34)
        qwen.received(100)
        qwen.sent(2000)
    told = scrape(scene)
    for worker in workers:
        worker.close()
    assert told.value("gpusvc_model_requests_total", model="qwen", status="2xx") == 2
    assert told.value("gpusvc_model_requests_total", model="qwen", status="5xx") == 0
    assert told.value("gpusvc_model_requests_in_flight", model="qwen") == 2
    assert told.value("gpusvc_model_requests_waiting", model="qwen") == 2
    assert told.value("gpusvc_model_prompt_tokens_total", model="qwen") == 24
    assert told.value("gpusvc_model_completion_tokens_total", model="qwen") == 68
    assert told.value("gpusvc_model_received_bytes_total", model="qwen") == 200
    assert told.value("gpusvc_model_sent_bytes_total", model="qwen") == 4000


def test_histograms_are_cumulative(scene: Scene) -> None:
    worker = Counters(counters.file_of(counters.directory(scene.paths), 0))
    for seconds in (0.004, 0.3, 0.3, 1000.0):
        worker.of("qwen").first_byte(seconds)
    told = scrape(scene)
    worker.close()
    name = "gpusvc_model_time_to_first_byte_seconds"
    found = {edge: told.value(f"{name}_bucket", model="qwen", le=edge) for edge in ("0.005", "0.25", "0.5", "+Inf")}
    assert found == {"0.005": 1, "0.25": 1, "0.5": 3, "+Inf": 4}
    assert told.value(f"{name}_count", model="qwen") == 4
    assert told.value(f"{name}_sum", model="qwen") == pytest.approx(1000.604)


def test_what_happened_is_told_by_its_reason(scene: Scene) -> None:
    scene.events.seen = Counter(
        {("start", "", "qwen"): 3, ("evict", "idle", "qwen"): 2, ("evict", "", "qwen"): 1, ("fail", "", "qwen"): 1}
    )
    scene.events.loads["qwen"] = Loads(count=2, total_seconds=9.5, last_seconds=4.25)
    told = scrape(scene)
    assert told.value("gpusvc_model_starts_total", model="qwen") == 3
    assert told.value("gpusvc_model_evictions_total", model="qwen", reason="idle") == 2
    assert told.value("gpusvc_model_evictions_total", model="qwen", reason="other") == 1
    assert told.value("gpusvc_model_events_total", model="qwen", event="fail") == 1
    assert told.value("gpusvc_model_load_seconds_count", model="qwen") == 2
    assert told.value("gpusvc_model_load_seconds_sum", model="qwen") == 9.5
    assert told.value("gpusvc_model_last_load_seconds", model="qwen") == 4.25


def test_what_is_not_known_is_not_told(scene: Scene) -> None:
    scene.foreign_bytes = None
    scene.change("qwen", vram_bytes=None)
    told = scrape(scene)
    assert told.value("gpusvc_model_vram_bytes", model="qwen") is None
    assert told.value("gpusvc_gpu_memory_foreign_bytes", gpu="1", uuid="GPU-1") is None
    assert told.value("gpusvc_gpu_memory_foreign_bytes", gpu="0", uuid="GPU-0") == 0


def test_a_source_that_does_not_answer_is_told_and_the_others_go_on(scene: Scene) -> None:
    scene.snapshots.problem = refusal()
    worker = Counters(counters.file_of(counters.directory(scene.paths), 0))
    worker.of("qwen").received(1)
    told = scrape(scene)
    worker.close()
    sources = {source: told.value("gpusvc_source_up", source=source) for source in ("systemd", "nvml", "gateway")}
    assert sources == {"systemd": 0, "nvml": 0, "gateway": 1}
    assert not told.has("gpusvc_model_state")
    assert not told.has("gpusvc_gpu_up")
    assert told.value("gpusvc_model_received_bytes_total", model="qwen") == 1


def test_counters_that_cannot_be_read_are_not_told_as_none(scene: Scene) -> None:
    (counters.directory(scene.paths) / "counters-0").symlink_to("/dev/null")
    told = scrape(scene)
    assert told.value("gpusvc_source_up", source="gateway") == 0
    assert told.value("gpusvc_model_state", model="qwen", state="ready") == 1


def test_names_are_escaped(scene: Scene) -> None:
    worker = Counters(counters.file_of(counters.directory(scene.paths), 0))
    worker.of(HOSTILE).received(7)
    told = scrape(scene)
    worker.close()
    assert told.value("gpusvc_model_received_bytes_total", model=HOSTILE) == 7


def test_who_asks_for_openmetrics_gets_that(scene: Scene) -> None:
    plain, open_ = scrape(scene), scrape(scene, OPENMETRICS)
    assert plain.content_type.startswith("text/plain")
    assert open_.content_type.startswith("application/openmetrics-text")
    assert open_.text.endswith("# EOF\n")
    assert open_.value("gpusvc_model_vram_bytes", model="qwen") == plain.value("gpusvc_model_vram_bytes", model="qwen")


def test_names_are_as_prometheus_wants_them(scene: Scene) -> None:
    worker = Counters(counters.file_of(counters.directory(scene.paths), 0))
    worker.of("qwen").first_byte(1.0)
    told = scrape(scene)
    worker.close()
    for name, kind in told.types.items():
        assert re.fullmatch(r"gpusvc_[a-z_]+", name), name
        assert told.help[name].endswith("."), name
        if kind in {"histogram", "summary"}:
            assert name.endswith("_seconds"), name
        assert not name.endswith(("_ms", "_percent", "_mib", "_count")), name


def test_to_look_is_nobodys_use(scene: Scene) -> None:
    files = [scene.paths.lease_directory("qwen") / name for name in ("use", "door")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1, 1))
    scrape(scene)
    assert [file.stat().st_mtime for file in files] == [1, 1]
