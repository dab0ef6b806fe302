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
            *("-c", "32768", "--jinja", "--no-mmap", "--flash-attn", "on", "--no-warmup", "--metrics"),
            *("--chat-template-kwargs", '{"a": 1}', "--tensor-split", "2,1"),
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
        ("coder", "model"),
        ("coder", "mmap"),
        ("Small-GGUF:Q8_0", "mmap"),
        ("nothing", "model"),
    }
    assert "nothing" not in files(found)
    assert "secret" not in "".join(map(str, found.notes))


@pytest.mark.parametrize(
    ("keys", "gpu"),
    [
        ("device = none", {"count": 0}),
        ("main-gpu = 1\nsplit-mode = none", {"count": 1, "devices": [1]}),
        ("device = CUDA0,CUDA2\nmg = 1\nsm = none", {"count": 1, "devices": [2]}),
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
        ("flash-attn", "true", ["--flash-attn", "on"]),
        ("fa", "0", ["-fa", "off"]),
        ("fit", "false", ["-fit", "off"]),
        ("reasoning", "1", ["--reasoning", "on"]),
        ("rea", "auto", ["-rea", "auto"]),
        ("no-mmproj", "1", ["--no-mmproj"]),
        ("no-mmproj", "0", ["--mmproj-auto"]),
        ("kvu", "on", ["-kvu"]),
        ("no-kvu", "off", ["--kv-unified"]),
        ("cb", "off", ["--no-cont-batching"]),
        ("nocb", "1", ["-nocb"]),
        ("spec-default", "on", ["--spec-default"]),
        ("verbose", "disabled", []),
        ("cpu-strict", "1", ["--cpu-strict", "1"]),
        ("LLAMA_ARG_KV_UNIFIED", "0", ["--no-kv-unified"]),
        ("LLAMA_ARG_NO_KV_UNIFIED", "1", ["--no-kv-unified"]),
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


@pytest.mark.parametrize(
    ("all_of_them", "own", "args", "env"),
    [
        ("c = 1", "LLAMA_ARG_CTX_SIZE = 2", [], {"LLAMA_ARG_CTX_SIZE": "2"}),
        ("LLAMA_ARG_CTX_SIZE = 1", "ctx-size = 2", ["--ctx-size", "2"], {}),
        ("no-mmproj = 1", "mmproj-auto = 1", ["--mmproj-auto"], {}),
        ("", "c = 1\nctx-size = 2", ["--ctx-size", "2"], {}),
        ("", "ctx-size = 2\nc = 1", ["--ctx-size", "2"], {}),
        ("fa = on", "LLAMA_ARG_FLASH_ATTN = off\nc = 1", ["-c", "1"], {"LLAMA_ARG_FLASH_ATTN": "off"}),
    ],
)
def test_a_section_beats_what_holds_for_all_in_any_spelling(
    all_of_them: str, own: str, args: list[str], env: dict[str, str]
) -> None:
    made = files(convert(f"[*]\n{all_of_them}\n[m]\nm = /x.gguf\n{own}"))["m"]
    assert (made.get("args", []), made.get("env", {})) == (args, env)


def test_keys_of_the_router_are_no_options() -> None:
    found = convert("[m]\nm = /x.gguf\ndedup-cache-models = true\nno-models-autoload = 1\nmodels-max = 2")
    assert "args" not in files(found)["m"]
    assert [note.key for note in found.notes] == ["dedup-cache-models", "no-models-autoload", "models-max"]


RELATIVE = "[m]\nmodel = gguf/a.gguf\nmm = gguf/mm.gguf\nLLAMA_ARG_CHAT_TEMPLATE_FILE = t.jinja"


def test_relative_paths_become_absolute_where_their_files_are_found() -> None:
    found = llama_server.convert(RELATIVE, SOURCE, lambda path: path.parts[:3] == ("/", "etc", "llama"))
    made = files(found)["m"]
    assert made["model"] == "/etc/llama/gguf/a.gguf"
    assert made["args"] == ["-mm", "/etc/llama/gguf/mm.gguf"]
    assert made["env"] == {"LLAMA_ARG_CHAT_TEMPLATE_FILE": "/etc/llama/t.jinja"}
    assert [note.key for note in found.notes] == ["model", "mm", "LLAMA_ARG_CHAT_TEMPLATE_FILE"]


def test_relative_paths_that_nobody_can_place_are_named() -> None:
    found = llama_server.convert(RELATIVE, SOURCE, lambda _: False)
    assert files(found)["m"]["args"] == ["-mm", "gguf/mm.gguf"]
    assert [note.key for note in found.notes] == ["model", "mm", "LLAMA_ARG_CHAT_TEMPLATE_FILE"]
    assert "write an absolute path" in found.notes[1].reason


@pytest.mark.parametrize(
    ("key", "option"),
    [("model-url", "--model-url"), ("mu", "--model-url"), ("dr", "--docker-repo"), ("docker-repo", "--docker-repo")],
)
def test_a_model_from_elsewhere_is_fetched_by_the_engine(key: str, option: str) -> None:
    found = convert(f"[m]\n{key} = ai/there\nc = 1")
    assert files(found)["m"]["command"] == [
        *("llama-server", option, "ai/there", "--alias", "m", "--host", "127.0.0.1", "--port", "{port}", "-c", "1")
    ]
    assert len(found.notes) == 1


def test_sections_that_repeat_too_many_keys_are_refused() -> None:
    shared = "".join(f"k{number} = 1\n" for number in range(400))
    sections = "".join(f"[s{number}]\n" for number in range(400))
    with pytest.raises(ConfigError, match="more than"):
        convert(f"[*]\n{shared}{sections}")


def test_keys_before_a_header_are_those_of_the_default() -> None:
    assert ini.parse("a = 1\n[x]\nb = 2 # c\n[default]\n", "x") == {"default": {}, "x": {"b": "2"}}


@pytest.mark.parametrize("line", ["no sense", "[unclosed", "= 1", "1a = 2", "a 1 = 2"])
def test_a_line_that_is_nothing_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"Line 2 of x"):
        ini.parse(f"\n{line}", "x")
