"""What a change to a model's file waits for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from gpusvc.config.files import HostConfig, ModelConfig
from gpusvc.config.model import read_model
from gpusvc.config.revision import LIVE, Revision, compare
from gpusvc.config.table import Table

PAGE = Path(__file__).parents[2] / "docs/man/gpusvc-model.5"


def model(**keys: object) -> ModelConfig:
    values = {"command": ["/bin/sh"], "user": "root", **keys}
    return read_model(Table(Path("m.toml"), values), "m", HostConfig())


def test_the_same_is_no_revision() -> None:
    assert not compare(model(), model())


def test_what_others_read_again_holds_at_once() -> None:
    new = model(idle_timeout="1min", aliases=["x"], keep=True, exclusive=["g"], pinned=True)
    assert compare(model(), new) == Revision(("aliases", "idle_timeout", "pinned", "exclusive", "keep"), ())


def test_what_the_engine_was_started_with_waits_for_its_next_start() -> None:
    new = replace(model(command=["/bin/cat"], port=1), stop_timeout_seconds=3)
    gpu = model(gpu={"count": 2, "vram": "1GiB"})
    assert compare(model(), new) == Revision((), ("command", "port", "stop_timeout"))
    assert compare(model(), gpu) == Revision((), ("gpu.count", "gpu.vram"))


def test_live_keys_are_those_that_the_page_names() -> None:
    paragraph = PAGE.read_text().partition("A change holds from the next start")[2].partition("gpusvc config NAME")[0]
    live = {field.name.removesuffix("_seconds") for field in fields(ModelConfig)} & LIVE
    # They are named there one by one: those of the gateway that serving stands for, and what is for people only.
    assert {key for key in live if key not in paragraph} <= {"serving", "description", "exclusive"}
