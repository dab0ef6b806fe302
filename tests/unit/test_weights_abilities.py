"""What a model can do, by its files and its engine's command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpusvc.weights import abilities
from gpusvc.weights.description import FileKind
from tests.engines import tinygguf
from tests.unit.test_weights_description import write_gguf

TEMPLATE = "{% if tools %}{{ tools }}{% endif %}{% if enable_thinking %}<think>{% endif %}"


def of(*command: str) -> abilities.Abilities:
    found = abilities.of_command(command, {})
    assert found is not None
    return found


def test_a_gguf_says_its_architecture_size_and_context(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tinygguf.write(file)
    found = of("llama-server", "-m", str(file))
    assert (found.kind, found.architecture, found.context, found.can) == (
        FileKind.GGUF,
        "llama",
        4096,
        ("completion",),
    )
    assert found.size_bytes == file.stat().st_size
    assert of("llama-server", "-m", str(file), "-c", "512").context == 512


def test_its_template_says_what_it_knows_behind_the_vocabulary(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "m.gguf",
        general__architecture="qwen3",
        general__size_label="8B",
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__fim_pre_token_id=5,
        tokenizer__chat_template=TEMPLATE,
    )
    found = of("llama-server", "--model", str(file), "--mmproj", "/srv/p.gguf")
    assert found.parameters == "8B"
    assert found.can == ("completion", "vision", "tools", "thinking", "insert")


def test_a_long_vocabulary_is_read_through(tmp_path: Path) -> None:
    file = write_gguf(
        tmp_path / "m.gguf",
        general__architecture="qwen3",
        tokenizer__ggml__tokens="x" * 9_000_000,
        tokenizer__chat_template=TEMPLATE,
    )
    assert of("llama-server", "-m", str(file)).can == ("completion", "tools", "thinking")


def test_a_model_for_embeddings_does_nothing_else(tmp_path: Path) -> None:
    pooled = write_gguf(tmp_path / "a.gguf", general__architecture="bert", bert__pooling_type=2)
    plain = write_gguf(tmp_path / "b.gguf", general__architecture="llama", tokenizer__chat_template=TEMPLATE)
    assert of("llama-server", "-m", str(pooled)).can == ("embedding",)
    assert of("llama-server", "-m", str(plain), "--embeddings").can == ("embedding",)


def directory(path: Path, config: dict[str, object], template: str = "") -> str:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(path)


def test_vllm_needs_a_parser_for_tools_and_thinking(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {"model_type": "qwen3", "max_position_embeddings": 40960}, TEMPLATE)
    assert of("vllm", "serve", path).can == ("completion",)
    found = of("vllm", "serve", path, "--tool-call-parser", "hermes", "--reasoning-parser=qwen3")
    assert (found.architecture, found.context, found.can) == ("qwen3", 40960, ("completion", "tools", "thinking"))
    assert of("vllm", "serve", path, "--runner", "pooling").can == ("embedding",)


def test_a_directory_with_vision_sees(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {"model_type": "gemma3", "vision_config": {}})
    assert of("python3", "-m", "sglang.launch_server", "--model-path", path).can == ("completion", "vision")


@pytest.mark.parametrize("command", [("vllm", "serve", "org/model"), ("x",), ("llama-server", "-m", "/nowhere.gguf")])
def test_what_has_no_files_here_is_unknown(command: tuple[str, ...]) -> None:
    assert abilities.of_command(command, {}) is None


@pytest.mark.parametrize("length", [0, 5, 30, 60, 90])
def test_a_file_that_is_cut_off_does_no_harm(tmp_path: Path, length: int) -> None:
    file = write_gguf(tmp_path / "m.gguf", general__architecture="llama", tokenizer__chat_template=TEMPLATE)
    file.write_bytes(file.read_bytes()[:length])
    abilities.of_command(("llama-server", "-m", str(file)), {})
