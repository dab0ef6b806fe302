"""The models as clients see them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpusvc.gateway.entry.catalog import FRESH_SECONDS, Catalog
from gpusvc.gateway.entry.routes import route
from gpusvc.gateway.http.replies import HttpError
from gpusvc.paths import Paths
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease, LeasedGpu


class Bench:
    """A catalog, the files that it shows, and its clock."""

    def __init__(self, directory: Path) -> None:
        self.paths = Paths(config=directory / "etc", runtime=directory / "run", state=directory / "lib")
        self.paths.models_directory.mkdir(parents=True)
        self.seconds = 0.0
        self.catalog = Catalog(self.paths, now=lambda: self.seconds)

    def add(self, name: str, text: str = "") -> None:
        """As of long ago, so that it is believed at once."""
        file = self.paths.model_file(name)
        new = file.with_name(f".new{file.name}")
        new.write_text(text)
        new.rename(file)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        self.later()

    def later(self) -> None:
        self.seconds += 2 * FRESH_SECONDS

    def refusal(self, question: Callable[[], object]) -> HttpError:
        with pytest.raises(HttpError) as caught:
            question()
        return caught.value

    def listed(self, allowed: Callable[[str], bool] = lambda _: True) -> list[dict[str, Any]]:
        found = json.loads(self.catalog.listing(allowed))["data"]
        assert isinstance(found, list)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    made.add("qwen", 'aliases = ["Qwen/Qwen3-8B", "gpt-4o"]\ndescription = "Qwen3 8B"\n')
    made.add("whisper")
    return made


def test_a_model_is_found_by_its_name_and_its_aliases(bench: Bench) -> None:
    for text in ("qwen", "Qwen/Qwen3-8B", "gpt-4o"):
        assert bench.catalog.resolve(text).name == "qwen"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("qwen:latest", "qwen"),
        ("openai/qwen", "qwen"),
        ("ollama/Qwen:latest", "qwen"),
        ("QWEN", "qwen"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("openai/gpt-4O", "gpt-4o"),
    ],
)
def test_other_spellings_find_the_one_model_that_they_can_mean(bench: Bench, text: str, told: str) -> None:
    found = bench.catalog.resolve(text)
    assert (found.name, found.served_name) == ("qwen", told)


def test_a_spelling_that_could_mean_two_models_finds_none(bench: Bench) -> None:
    bench.add("other", 'aliases = ["QWEN"]\n')
    assert bench.catalog.resolve("qwen").name == "qwen"
    assert bench.catalog.resolve("QWEN").name == "other"
    assert bench.refusal(lambda: bench.catalog.resolve("Qwen")).status == 404


def test_a_model_that_is_not_for_a_client_is_like_one_that_is_not_there(bench: Bench) -> None:
    def told(text: str) -> str:
        refusal = bench.refusal(lambda: bench.catalog.resolve(text, allowed=lambda name: name == "whisper"))
        assert refusal.status == 404
        return str(refusal).replace(text, "MODEL")

    assert told("qwen") == told("nope") == told("gpt-4o") == told("QWEN")


def test_an_unknown_model_is_told_with_the_nearest(bench: Bench) -> None:
    bench.add("qwen2")
    refusal = bench.refusal(lambda: bench.catalog.resolve("Qwen3"))
    assert (refusal.status, refusal.code, refusal.param) == (404, "model_not_found", "model")
    assert str(refusal) == "There is no model 'Qwen3'. Did you mean 'qwen' or 'qwen2'?"
    assert "GET /v1/models" in str(bench.refusal(lambda: bench.catalog.resolve("zzz" * 10_000)))


def test_nobody_is_told_of_models_that_are_not_for_him(bench: Bench) -> None:
    def allowed(name: str) -> bool:
        return name == "whisper"

    assert "qwen'" not in bench.refusal(lambda: bench.catalog.resolve("qwenn", allowed=allowed)).hint  # type: ignore[operator]
    assert bench.refusal(lambda: bench.catalog.card("qwen", allowed=allowed)).status == 404
    assert [entry["id"] for entry in bench.listed(allowed)] == ["whisper"]


def test_a_request_that_names_no_model_means_the_only_one(bench: Bench) -> None:
    refusal = bench.refusal(lambda: bench.catalog.resolve(None, guess=True))
    assert (refusal.status, refusal.code) == (400, "missing_model")
    bench.paths.model_file("whisper").unlink()
    bench.later()
    assert bench.catalog.resolve(None, guess=True).name == "qwen"
    assert bench.refusal(lambda: bench.catalog.resolve(None)).status == 400


def test_the_files_are_looked_at_again_but_not_at_once(bench: Bench) -> None:
    bench.catalog.resolve("qwen")
    bench.paths.model_file("new").write_text("")
    assert bench.refusal(lambda: bench.catalog.resolve("new")).status == 404
    bench.later()
    assert bench.catalog.resolve("new").name == "new"
    bench.paths.model_file("new").unlink()
    assert bench.catalog.resolve("new").name == "new"
    bench.later()
    assert bench.refusal(lambda: bench.catalog.resolve("new")).status == 404


def test_a_file_that_cannot_be_right_leaves_the_model_reachable(bench: Bench) -> None:
    bench.add("broken", "=")
    assert bench.catalog.resolve("broken").concurrency == 0
    assert bench.catalog.names() == ["broken", "qwen", "whisper"]


def test_a_name_goes_before_an_alias_and_an_alias_is_of_one(bench: Bench) -> None:
    bench.add("all", 'aliases = ["qwen", "gpt-4o"]')
    assert bench.catalog.resolve("qwen").name == "qwen"
    assert bench.catalog.resolve("gpt-4o").name == "all"
    ids = [entry["id"] for entry in bench.listed()]
    assert ids == ["all", "gpt-4o", "qwen", "Qwen/Qwen3-8B", "whisper"]


@pytest.mark.parametrize(
    ("target", "name", "path"),
    [
        (b"/upstream/qwen/", "qwen", b"/"),
        (b"/upstream/Qwen/Qwen3-8B/props?a", "qwen", b"/props?a"),
        (b"/upstream/Qwen%2FQwen3-8B/props", "qwen", b"/props"),
        (b"/upstream/whisper/Qwen3-8B/", "whisper", b"/Qwen3-8B/"),
    ],
)
def test_the_longest_name_in_a_path_counts(bench: Bench, target: bytes, name: str, path: bytes) -> None:
    serving, rest = bench.catalog.locate(route(b"GET", target))
    assert (serving.name, rest) == (name, path)


def test_an_alias_that_begins_like_a_name_is_found(bench: Bench) -> None:
    bench.add("Qwen")
    assert bench.catalog.locate(route(b"GET", b"/upstream/Qwen/Qwen3-8B/a"))[0].name == "qwen"
    assert bench.catalog.locate(route(b"GET", b"/upstream/Qwen/a"))[0].name == "Qwen"


def test_pages_are_redirected_to_their_slash(bench: Bench) -> None:
    refusal = bench.refusal(lambda: bench.catalog.locate(route(b"GET", b"/upstream/Qwen/Qwen3-8B?a=1")))
    assert (refusal.status, refusal.headers) == (308, ((b"location", b"/upstream/Qwen%2FQwen3-8B/?a=1"),))
    assert bench.refusal(lambda: bench.catalog.locate(route(b"GET", b"/upstream/qwenn"))).status == 404


def test_the_list_has_each_name_and_what_the_lease_says(bench: Bench) -> None:
    lease = Lease("qwen", 8000, (LeasedGpu(1, "GPU-1", None, None, 5), LeasedGpu(2, "GPU-2", None, None, 6)), 0.0)
    leases.write(bench.paths, lease)
    alias, *_, whisper = bench.listed()[1:]
    assert alias == {
        "id": "Qwen/Qwen3-8B",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "gpusvc",
        "type": "model",
        "display_name": "Qwen3 8B",
        "created_at": "2023-11-14T22:13:20Z",
        "status": {"value": "loading"},
        "gpusvc": {
            "name": "qwen",
            "aliases": ["Qwen/Qwen3-8B", "gpt-4o"],
            "state": "loading",
            "gpus": [1, 2],
            "used_bytes": 11,
            "concurrency": 0,
            "preload": False,
            "keep": False,
        },
    }
    assert (whisper["status"], whisper["gpusvc"]["state"]) == ({"value": "unloaded"}, "stopped")
    assert json.loads(bench.catalog.card("Qwen/Qwen3-8B")) == alias
    bench.paths.lease_file("qwen").write_text("{")
    assert json.loads(bench.catalog.card("qwen"))["gpusvc"]["state"] == "unknown"


def test_the_list_is_a_page_of_both_apis_even_if_it_is_empty(tmp_path: Path) -> None:
    page = json.loads(Bench(tmp_path).catalog.listing(lambda _: True))
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_a_model_that_the_key_is_not_for_takes_the_steps_of_one_that_does_not_exist(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    exists = os.path.lexists

    def looked(path: Path) -> bool:
        steps.append("lexists")
        return exists(path)

    monkeypatch.setattr("os.path.lexists", looked)
    for name in ("_refresh", "_similar", "_unknown"):
        step = getattr(Catalog, name)

        def noted(*arguments: Any, step: Callable[..., Any] = step, name: str = name) -> object:
            steps.append(name)
            return step(*arguments)

        monkeypatch.setattr(Catalog, name, noted)
    taken = []
    for text in ("whisper", "nothing"):
        bench.later()
        bench.catalog.names()  # so that nothing is due
        bench.seconds += FRESH_SECONDS / 2
        steps.clear()
        refusal = bench.refusal(lambda text=text: bench.catalog.resolve(text, allowed=lambda name: name == "qwen"))  # type: ignore[misc]
        assert refusal.status == 404
        taken.append(list(steps))
    assert taken[0] == taken[1] == ["lexists", "_similar", "_unknown"]
