"""Preset files of llama-server's router as model files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from gpusvc.errors import ConfigError
from gpusvc.importing import ini, llama_options, llama_server
from gpusvc.importing.draft import Import

SOURCE = Path("/etc/llama/presets.ini")


def convert(text: str) -> Import:
    return llama_server.convert(dedent(text), SOURCE)


def files(found: Import) -> dict[str, dict[str, Any]]:
    return {draft.name: tomllib.loads(draft.text()) for draft in found.drafts}


PRESETS = """
; for all
version = 1
[*]
c = 8192
jinja = true
mmap = off
flash-attn = on

[lab/Small-GGUF:Q8_0]   # known by its name
n-gpu-layers = 40 ; most

[coder]
model = gguf/coder.gguf
hf-repo =
c = 32768
alias = code, lab/coder
load-on-startup = true
stop-timeout = 20
sleep-idle-seconds = 300
LLAMA_ARG_UBATCH = 512
no-warmup = 1
cpu-moe = false
metrics = on
chat-template-kwargs = {"a": 1}
host = 0.0.0.0
api-key = secret
device = CUDA1,CUDA2
tensor-split = 2,1

[nothing]
c = 1
"""


def test_a_section_becomes_a_model_with_what_holds_for_all() -> None:
    assert files(convert(PRESETS))["coder"] == {
        "engine": "llama-server",
        "model": "/etc/llama/gguf/coder.gguf",
        "args": [
            *("--tensor-split", "2,1", "-c", "32768", "--jinja", "--no-mmap", "--flash-attn", "on", "--no-warmup"),
            *("--metrics", "--chat-template-kwargs", '{"a": 1}'),
        ],
        "aliases": ["code", "lab/coder"],
        "stop_timeout": "20s",
        "idle_timeout": "300s",
        "preload": True,
        "env": {"LLAMA_ARG_UBATCH": "512"},
        "gpu": {"count": 2, "devices": [1, 2]},
    }


def test_a_section_named_as_a_repository_is_one() -> None:
    small = files(convert(PRESETS))["Small-GGUF:Q8_0"]
    assert (small["model"], small["aliases"]) == ("lab/Small-GGUF:Q8_0", ["lab/Small-GGUF:Q8_0"])
    assert small["args"][-2:] == ["--n-gpu-layers", "40"]


def test_what_is_left_out_is_named() -> None:
    found = convert(PRESETS)
    assert {(note.model, note.key) for note in found.notes} == {
        ("coder", "host"),
        ("coder", "api-key"),
        ("coder", "device"),
        ("coder", "sleep-idle-seconds"),
        ("nothing", "model"),
    }
    assert "nothing" not in files(found)
    assert "secret" not in "".join(map(str, found.notes))


@pytest.mark.parametrize(
    ("keys", "gpu"),
    [
        ("device = none", {"count": 0}),
        ("main-gpu = 1\nsplit-mode = none", {"count": 1, "devices": [1]}),
        ("LLAMA_ARG_TENSOR_SPLIT = 1,1,0", {"count": 2}),
        ("dev = Vulkan0", None),
    ],
)
def test_which_gpus_becomes_a_table(keys: str, gpu: dict[str, Any] | None) -> None:
    assert files(convert(f"[m]\nm = /x.gguf\n{keys}"))["m"].get("gpu") == gpu


@pytest.mark.parametrize(
    ("name", "value", "arguments"),
    [
        ("ngl", "99", ["-ngl", "99"]),
        ("c", "1", ["-c", "1"]),
        ("fa", "on", ["-fa", "on"]),
        ("jinja", "off", ["--no-jinja"]),
        ("no-jinja", "true", ["--no-jinja"]),
        ("no-jinja", "false", ["--jinja"]),
        ("embeddings", "1", ["--embeddings"]),
        ("embeddings", "0", []),
        ("seed", "1", ["--seed", "1"]),
        ("some-new-flag", "true", ["--some-new-flag"]),
        ("some-new-value", "on", ["--some-new-value", "on"]),
    ],
)
def test_an_option_is_spelt_as_the_engine_has_it(name: str, value: str, arguments: list[str]) -> None:
    assert llama_options.spell(name, value) == arguments


def test_keys_before_a_header_are_those_of_the_default() -> None:
    assert ini.parse("a = 1\n[x]\nb = 2 # c\n[default]\n", "x") == {"default": {}, "x": {"b": "2"}}


@pytest.mark.parametrize("line", ["no sense", "[unclosed", "= 1", "1a = 2", "a 1 = 2"])
def test_a_line_that_is_nothing_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"Line 2 of x"):
        ini.parse(f"\n{line}", "x")
