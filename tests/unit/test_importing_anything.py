"""Whatever a foreign file holds, an import ends with model files that are TOML, or with one sentence."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc import names
from gpusvc.errors import ConfigError
from gpusvc.importing import llama_server, llama_swap, localai, ollama, yamlfile
from gpusvc.importing.draft import Import

WORDS = st.sampled_from(
    [
        "a",
        "b/c",
        "",
        "x ${PORT}",
        "${a}",
        "${env.A}",
        "1",
        "on",
        "-1",
        "1,0",
        "none",
        "http://h:99999/",
        "'",
        "§ \x7f\n",
        "A & a",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-5, 70000) | st.floats() | st.integers(10**400, 10**401) | WORDS


def documents(*keys: str) -> st.SearchStrategy[object]:
    """Anything that YAML may hold, of these keys for the most part."""
    known = st.sampled_from(keys) | WORDS
    return st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(known, inner, max_size=8), max_leaves=30
    )


SWAP = documents(
    *("models", "macros", "groups", "matrix", "routing", "router", "settings", "hooks", "on_startup", "preload", "cmd"),
    *("vars", "sets", "evict_costs", "members", "swap", "persistent", "env", "ttl", "proxy", "aliases", "filters"),
    *("setParams", "setParamsByID", "stripParams", "checkEndpoint", "concurrencyLimit", "name", "description"),
)
LOCALAI = documents(
    *("name", "backend", "parameters", "model", "options", "context_size", "tensor_split", "lora_adapters"),
    *("lora_scales", "flash_attention", "concurrency_groups", "temperature", "max_tokens", "gpu_layers", "mmproj"),
)
OLLAMA = documents("num_ctx", "num_gpu", "num_predict", "temperature", "stop", "seed", "numa", "num_keep")


def is_sound(found: Import) -> None:
    assert all(names.is_name(draft.name) for draft in found.drafts)
    for draft in found.drafts:
        tomllib.loads(draft.text())
    assert all(str(note) for note in found.notes)


@given(SWAP, SWAP)
def test_llama_swaps(whole: object, models: object) -> None:
    for document in (whole, {**(whole if isinstance(whole, dict) else {}), "models": {"a": models, "b/c": whole}}):
        with contextlib.suppress(ConfigError):
            is_sound(llama_swap.convert(document, "x", {"A": "1"}))


@given(LOCALAI)
def test_localais(document: object) -> None:
    model = {**(document if isinstance(document, dict) else {}), "name": "a"}
    for each in (document, [document, model]):
        with contextlib.suppress(ConfigError):
            is_sound(localai.convert([(Path("/x/y.yaml"), each)], lambda path: "a" in path.name))


PIECES = [
    *("models:\n", "  a:\n", "    cmd: ", "x ${PORT}", "&b ", "*b", "<<: ", "[", "]", "{", "}", ", ", "\n", "- ", "? "),
    *(
        "!t ",
        "'",
        '"',
        "| \n",
        "\t",
        "name: m\n",
        "9" * 20,
        "${a}",
        "macros: {a: '${a}${b}'}\n",
        "\0",
        "---\n",
        "\ud7ff",
    ),
]
YAML = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@given(YAML | st.text())
def test_texts(text: str) -> None:
    with contextlib.suppress(ConfigError):
        for document in yamlfile.parse(text, "x"):
            with contextlib.suppress(ConfigError):
                is_sound(llama_swap.convert(document, "x", {}))
            with contextlib.suppress(ConfigError):
                is_sound(localai.convert([(Path("/x/y.yaml"), document)]))
    with contextlib.suppress(ConfigError):
        is_sound(llama_server.convert(text, Path("/x/y.ini")))


def test_macros_and_sections_have_bounds_for_all_models_together() -> None:
    models = {f"m{number}": {"cmd": "x ${big}"} for number in range(100)}
    with pytest.raises(ConfigError, match="MiB of text"):
        llama_swap.convert({"macros": {"big": "x" * 1_000_000}, "models": models}, "x", {})
    with pytest.raises(ConfigError, match="more than"):
        llama_swap.convert({"models": {str(number): {"cmd": "x"} for number in range(6000)}}, "x", {})


@given(OLLAMA)
def test_ollamas(parameters: object) -> None:
    held = parameters if isinstance(parameters, dict) else {}
    is_sound(ollama.convert([ollama.Stored("a:latest", Path("/x"), parameters=held)], Path("/store")))


@given(
    st.lists(
        st.tuples(st.sampled_from(["[", "]", "=", "\n", ";", "m = /x", "[a]", "[*]", "device = CUDA0", "ts = 1,,"]))
    )
)
def test_presets(pieces: list[tuple[str]]) -> None:
    with contextlib.suppress(ConfigError):
        is_sound(llama_server.convert("".join(piece for (piece,) in pieces), Path("/x/y.ini")))
