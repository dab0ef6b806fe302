"""The VRAM that an imported model counts with before its first run, in the words of its file."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusvc.importing import vram
from gpusvc.importing.draft import Draft
from tests.engines import tinygguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tinygguf.write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def draft_of(model: Path | str, **keys: object) -> Draft:
    return Draft("a", "Imported.", {"engine": "llama-server", "model": str(model)} | keys)


def test_a_preset_and_a_command_say_the_same(model: Path) -> None:
    found = vram.sentence(draft_of(model, args=["-c", "512"]))
    assert found is not None
    assert "256.0 KiB of KV cache for 512 tokens" in found
    command = ["llama-server", "-m", str(model), "-c", "512"]
    assert vram.sentence(Draft("a", "", {"command": command})) == found
    assert vram.sentence(draft_of(model, env={"LLAMA_ARG_CTX_SIZE": "512"})) == found


@pytest.mark.parametrize(
    "keys",
    [{"model": "/nowhere.gguf"}, {"model": "o/r"}, {"engine": "else"}, {"gpu": {"vram": "1G"}}, {"gpu": {"count": 0}}],
)
def test_nothing_is_said_where_nothing_is_known_or_needed(model: Path, keys: dict[str, object]) -> None:
    draft = draft_of(model)
    draft.keys |= keys
    assert vram.sentence(draft) is None


def test_an_import_does_not_wait_for_the_files_of_all_models(model: Path) -> None:
    drafts = [draft_of(model) for _ in range(400)]
    seconds = itertools.count()
    vram.add_all(drafts, lambda: next(seconds) / 10)
    told = [draft.origin for draft in drafts if "of VRAM" in draft.origin]
    assert 5 < len(told) < 20
    assert told[0].startswith("Imported.\nBefore its first run it counts as")


WORDS = st.sampled_from(
    [
        *("-ot", "-ncmoe", "-cmoe", "-c", "-np", "-ngl", "--mmproj", "-md", "-fa", "MODEL", "9" * 40, "-1", "0", "off"),
        *("exps=CPU", "(.*)*x=CPU", ".*.*.*.*x=CPU", "=", "", "[=CPU", "\0", "/dev/zero", "env", "A=1"),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(WORDS, max_size=12), st.dictionaries(st.sampled_from(["LLAMA_ARG_N_CPU_MOE", "x"]), WORDS))
def test_any_command_has_a_sentence_or_none(model: Path, words: list[str], env: dict[str, str]) -> None:
    command = ["llama-server", *(str(model) if word == "MODEL" else word for word in words)]
    found = vram.sentence(Draft("a", "", {"command": command, "env": env}))
    assert found is None or found.endswith(".")
