"""What a change to a model's file waits for."""

from __future__ import annotations

from pathlib import Path

from gpusvc.config.files import HostConfig, ModelConfig
from gpusvc.config.model import read_model
from gpusvc.config.revision import Revision, compare
from gpusvc.config.section import Section
from gpusvc.config.table import Table

PAGE = Path(__file__).parents[2] / "docs/man/gpusvc-model.5"


def model(**keys: object) -> ModelConfig:
    values = {"command": ["/bin/sh"], "user": "root", **keys}
    return read_model(Table(Path("m.toml"), values), "m", HostConfig())


def test_the_same_is_no_revision() -> None:
    assert not compare(model(), model())


def test_what_others_read_again_holds_at_once() -> None:
    new = model(idle_timeout="1min", aliases=["x"], keep=True, exclusive=["g"], pinned=True)
    assert compare(model(), new) == Revision(("aliases", "keep", "idle_timeout", "pinned", "exclusive"), ())


def test_what_the_engine_was_started_with_waits_for_its_next_start() -> None:
    new = model(command=["/bin/cat"], port=1).replace(stop_timeout_seconds=3)
    gpu = model(gpu={"count": 2, "vram": "1GiB"})
    assert compare(model(), new) == Revision((), ("command", "port", "stop_timeout"))
    assert compare(model(), gpu) == Revision((), ("gpu.count", "gpu.vram"))


def live_keys(kind: type[Section]) -> set[str]:
    found = {key.name or "" for key in kind.keys if key.is_live}
    return found.union(*(live_keys(key.section) for key in kind.keys if key.section is not None))


def test_live_keys_are_those_that_the_page_names() -> None:
    paragraph = PAGE.read_text().partition("A change holds from the next start")[2].partition("gpusvc config NAME")[0]
    assert {key for key in live_keys(ModelConfig) if key.partition(".")[0] not in paragraph} <= {
        "description",
        "exclusive",
        "preload",
    }
