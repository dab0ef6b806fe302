"""Presets, and the search for a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusvc.config.presets import PRESETS, Served, find_program, memory_arguments, misplaced_placeholder

GIB = 1 << 30


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def gguf(directory: Path, content: bytes = b"GGUF\x03\0\0\0") -> str:
    file = directory / "model.gguf"
    file.write_bytes(content)
    return str(file)


def test_llama_server_is_given_a_file() -> None:
    command = PRESETS["llama-server"].command(Served("/srv/m.gguf", ("qwen", "Qwen/Qwen3-8B"), 1))
    assert command == (
        *("llama-server", "-m", "/srv/m.gguf", "--alias", "qwen"),
        *("--host", "127.0.0.1", "--port", "{port}"),
    )


def test_llama_server_is_given_a_repository() -> None:
    command = PRESETS["llama-server"].command(Served("ggml-org/gemma-3:Q4_K_M", ("gemma",), 1))
    assert command[1:3] == ("-hf", "ggml-org/gemma-3:Q4_K_M")


def test_vllm_serves_all_names_on_all_gpus() -> None:
    command = PRESETS["vllm"].command(Served("Qwen/Qwen3-8B", ("qwen", "Qwen/Qwen3-8B"), 2))
    assert command == (
        *("vllm", "serve", "Qwen/Qwen3-8B", "--served-model-name", "qwen", "Qwen/Qwen3-8B"),
        *("--host", "127.0.0.1", "--port", "{port}", "--tensor-parallel-size", "2"),
    )


def test_sglang_serves_its_name_on_all_gpus() -> None:
    command = PRESETS["sglang"].command(Served("Qwen/Qwen3-8B", ("qwen", "other"), 4))
    assert command == (
        *("python3", "-m", "sglang.launch_server", "--model-path", "Qwen/Qwen3-8B", "--served-model-name", "qwen"),
        *("--host", "127.0.0.1", "--port", "{port}", "--tp-size", "4"),
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_one_gpu_needs_no_split(engine: str) -> None:
    command = PRESETS[engine].command(Served("Qwen/Qwen3-8B", ("qwen",), 1))
    assert not {"--tensor-parallel-size", "--tp-size"} & set(command)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_every_preset_is_told_the_port_and_has_a_health_path(preset: object) -> None:
    assert preset in PRESETS.values()
    for known in PRESETS.values():
        assert known.command(Served("owner/model", ("name",), 0)).count("{port}") == 1
        assert known.health == "/health"


def test_a_gguf_file_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    check = PRESETS["llama-server"].require_files
    check(gguf(tmp_path))
    with pytest.raises(ValueError, match="is not a GGUF file"):
        check(gguf(tmp_path, b"version https://git-lfs.github.com/spec/v1\n"))
    with pytest.raises(ValueError, match="is not a file"):
        check(str(tmp_path))
    with pytest.raises(ValueError, match="No such file"):
        check(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize("model", ["model.gguf", "models/model.gguf", "../model", "model", "", "a/b/c", "o/m:"])
def test_llama_server_takes_no_relative_path(model: str) -> None:
    with pytest.raises(ValueError, match="neither an absolute path nor a repository"):
        PRESETS["llama-server"].require_name(model)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_repository_or_a_directory_is_what_the_others_take(engine: str, tmp_path: Path) -> None:
    preset = PRESETS[engine]
    for model in ("Qwen/Qwen3-8B", "gpt2", str(tmp_path)):
        preset.require_name(model)
        preset.require_files(model)
    for model in ("./qwen", "~/qwen", "a/b/c", "", "Qwen/Qwen3 8B"):
        with pytest.raises(ValueError, match="neither an absolute path nor a repository"):
            preset.require_name(model)
    with pytest.raises(ValueError, match="No such file"):
        preset.require_files(str(tmp_path / "absent"))


def test_a_program_is_found_in_the_path_of_the_model(tmp_path: Path) -> None:
    program(tmp_path / "a" / "engine", mode=0o644)
    found = program(tmp_path / "b" / "engine")
    assert find_program("engine", {"PATH": f":relative:{tmp_path}/none:{tmp_path}/a:{tmp_path}/b"}) == str(found)


def test_a_program_is_found_on_the_system_without_a_path() -> None:
    assert find_program("sh", {}).endswith("/sh")


def test_a_program_that_nobody_can_run_is_none(tmp_path: Path) -> None:
    plain = program(tmp_path / "plain", mode=0o644)
    for wrong, reason in (
        (str(plain), "not executable"),
        (str(tmp_path), "not a file"),
        (str(tmp_path / "absent"), "No such file"),
        ("./engine", "relative"),
        ("bin/engine", "relative"),
    ):
        with pytest.raises(ValueError, match=reason):
            find_program(wrong, {})
    with pytest.raises(ValueError, match="There is no program 'plain' in"):
        find_program("plain", {"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    "argument", ["{port}", "--port={port}", '{"a": {"b": 1}}', "{message}", "$HOME", "exec serve --port $PORT", "{}"]
)
def test_braces_and_dollars_pass(argument: str) -> None:
    assert misplaced_placeholder(["engine", argument]) is None


@pytest.mark.parametrize("argument", ["{PORT}", "0.0.0.0:{Port}", "$PORT", "${PORT}", "{model}", "{name}"])
def test_a_misspelt_placeholder_is_noticed(argument: str) -> None:
    assert misplaced_placeholder(["engine", argument]) == argument


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("vllm", ("--gpu-memory-utilization", "0.500")),
        ("sglang", ("--mem-fraction-static", "0.450")),  # activations and CUDA graphs come on top
        ("llama-server", ()),
    ],
)
def test_a_preset_keeps_its_engine_within_the_declared_vram(engine: str, arguments: tuple[str, ...]) -> None:
    preset = PRESETS[engine]
    assert memory_arguments(preset, ("x",), 12 * GIB, [24 * GIB, 12 * GIB]) == arguments
    assert memory_arguments(preset, ("x",), None, [24 * GIB]) == ()
    assert memory_arguments(preset, ("x",), 12 * GIB, [None]) == ()
    assert memory_arguments(None, ("x",), 12 * GIB, [24 * GIB]) == ()


@pytest.mark.parametrize("given", [("--gpu-memory-utilization", "0.3"), ("--gpu-memory-utilization=0.3",)])
def test_a_preset_leaves_the_share_to_the_command_that_has_one(given: tuple[str, ...]) -> None:
    assert memory_arguments(PRESETS["vllm"], ("vllm", *given), 12 * GIB, [24 * GIB]) == ()


def test_no_engine_is_given_a_whole_gpu() -> None:
    assert memory_arguments(PRESETS["vllm"], (), 30 * GIB, [24 * GIB]) == ("--gpu-memory-utilization", "0.980")
