"""First guesses at a model's VRAM from its files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusvc.quantity import GIB, MIB
from gpusvc.weights.estimate import estimate
from gpusvc.weights.gguf import read_metadata
from gpusvc.weights.parts import Estimate
from tests.engines import tinygguf

WORK = 512 * MIB


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value: int | str | list[int]) -> bytes:
    """One of GGUF's metadata: 4 is an unsigned number of 32 bits, 8 a string, 9 an array."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return text(key) + struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    return text(key) + struct.pack("<II", 4, value)


EIGHT_B: dict[str, int | str | list[int]] = {
    "general.architecture": "qwen3",
    "general.tags": [1, 2, 3],
    "qwen3.block_count": 36,
    "qwen3.context_length": 40960,
    "qwen3.embedding_length": 4096,
    "qwen3.attention.head_count": 32,
    "qwen3.attention.head_count_kv": 8,
    "qwen3.attention.key_length": 128,
    "qwen3.attention.value_length": 128,
    "tokenizer.ggml.model": "gpt2",
}
PER_TOKEN = 36 * 8 * (128 + 128) * 2


def write_gguf(path: Path, metadata: dict[str, int | str | list[int]] | None = None, size: int = 5 * GIB) -> Path:
    """A sparse file of that size with such a head."""
    known = EIGHT_B if metadata is None else metadata
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(known)) + b"".join(entry(*item) for item in known.items())
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "qwen.gguf")


def bytes_of(*command: str | Path, **env: str) -> int | None:
    found = estimate([str(word) for word in command], env)
    return None if found is None else found.bytes


# --- GGUF


def test_weights_cache_and_room_to_work_are_added_up(gguf: Path) -> None:
    found = estimate(["llama-server", "-m", str(gguf), "-c", "8192"], {})
    assert found == Estimate(5 * GIB, 8192 * PER_TOKEN, 0, 128 * MIB, 8192)
    assert found.bytes == 5 * GIB + 8192 * PER_TOKEN + WORK
    assert found.reason == (
        "5.0 GiB of weights, 1.1 GiB of KV cache for 8192 tokens, 128.0 MiB of compute buffers, and 384.0 MiB for the "
        "driver."
    )


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ([], 4096),
        (["-c", "0"], 40960),
        (["--ctx-size", "16384"], 16384),
        (["--ctx-size=16384"], 16384),
        (["-c", "1000", "-c", "512"], 512),
        (["-c", "200"], 256),  # padded
        (["-c", "many"], 4096),
        (["-c"], 4096),
    ],
)
def test_the_context_is_what_the_command_asks_for_or_else_short(gguf: Path, arguments: list[str], tokens: int) -> None:
    assert bytes_of("llama-server", "-m", gguf, *arguments) == 5 * GIB + tokens * PER_TOKEN + WORK


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        (["-ctk", "q8_0", "-ctv", "q8_0"], 17 / 32),
        (["--cache-type-k", "f32"], 1.5),
        (["--cache-type-k", "unheard-of"], 1.0),
        (["--no-kv-offload"], 0.0),
    ],
)
def test_the_cache_is_as_large_as_its_numbers(gguf: Path, arguments: list[str], share: float) -> None:
    without = 5 * GIB + WORK
    assert bytes_of("llama-server", "-m", gguf, "-c", "8192", *arguments) == without + 8192 * PER_TOKEN * share


@pytest.mark.parametrize(("layers", "share"), [("99", 1.0), ("37", 1.0), ("0", 0.0), ("auto", 1.0), ("-1", 1.0)])
def test_layers_that_stay_in_ram_take_no_vram(gguf: Path, layers: str, share: float) -> None:
    all_of_it = 5 * GIB + 4096 * PER_TOKEN
    assert bytes_of("llama-server", "-m", gguf, "-ngl", layers) == round(all_of_it * share) + WORK


def test_half_the_layers_take_half_the_vram(gguf: Path) -> None:
    # The output counts as a layer, and has no cache.
    half = round(5 * GIB * 18 / 37) + 4096 * PER_TOKEN * 17 // 36
    assert bytes_of("llama-server", "-m", gguf, "-ngl", "18") == half + WORK


@pytest.mark.parametrize("option", [["--n-cpu-moe", "20"], ["-ot", "exps=CPU"]])
def test_there_is_no_guess_where_single_tensors_stay_in_ram_and_none_are_listed(gguf: Path, option: list[str]) -> None:
    assert bytes_of("llama-server", "-m", gguf, *option) is None


def test_the_environment_counts_where_llama_server_reads_it(gguf: Path) -> None:
    asked = bytes_of("llama-server", LLAMA_ARG_MODEL=str(gguf), LLAMA_ARG_CTX_SIZE="8192")
    assert asked == bytes_of("llama-server", "-m", gguf, "-c", "8192")


def test_files_beside_the_model_are_added(gguf: Path, tmp_path: Path) -> None:
    projector = write_gguf(tmp_path / "mmproj.gguf", {"general.architecture": "clip"}, GIB)
    alone, both = bytes_of("llama-server", "-m", gguf), bytes_of("llama-server", "--mmproj", projector, "-m", gguf)
    assert both == pytest.approx((alone or 0) + GIB, abs=1)


def test_all_parts_of_a_split_file_count(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "big-00001-of-00003.gguf", size=GIB)
    for number in (2, 3):
        write_gguf(tmp_path / f"big-0000{number}-of-00003.gguf", size=2 * GIB)
    assert bytes_of("llama-server", "-m", first) == 5 * GIB + 4096 * PER_TOKEN + WORK


def test_there_is_no_guess_while_a_part_is_missing(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "big-00001-of-00003.gguf", size=GIB)
    assert bytes_of("llama-server", "-m", first) is None


def test_layers_without_attention_have_no_cache(tmp_path: Path) -> None:
    hybrid = write_gguf(tmp_path / "h.gguf", EIGHT_B | {"qwen3.attention.head_count_kv": [0, 0, 0, 8] * 9})
    assert bytes_of("llama-server", "-m", hybrid) == 5 * GIB + 4096 * PER_TOKEN // 4 + WORK


@pytest.mark.parametrize("gone", ["general.architecture", "qwen3.block_count", "qwen3.context_length"])
def test_a_header_that_does_not_tell_leaves_weights_and_a_tenth(tmp_path: Path, gone: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", {key: value for key, value in EIGHT_B.items() if key != gone})
    assert bytes_of("llama-server", "-m", file) == round(5 * GIB * 1.1) + WORK


def test_a_real_header_is_read_up_to_its_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tinygguf.write(file)
    known = read_metadata(file)
    assert known["general.architecture"] == "llama"
    assert known["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert list(known)[-1] == "llama.vocab_size"
    found = estimate(["llama-server", "-m", str(file)], {})
    assert found is not None
    assert found.cache_bytes == 4096 * 2 * 2 * 64 * 2
    embeddings = 4 * 64 * len(tinygguf._vocabulary())
    assert found.weights_bytes == pytest.approx(file.stat().st_size - embeddings, abs=20_000)  # without the header
    assert found.compute_bytes == 512 * 4 * (3 * 128 + 4 * 64) + 512 * 4096 * 2


# --- Safetensors


def write_safetensors(path: Path, size: int = 2 * GIB) -> Path:
    head = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        stream.truncate(size)
    return path


CONFIG = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 40960,
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for number in range(1, 4):
        write_safetensors(tmp_path / f"model-0000{number}-of-00003.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("config", [CONFIG, {"text_config": CONFIG}, CONFIG | {"head_dim": 128}])
def test_a_directory_of_safetensors_is_weights_a_tenth_and_its_cache(
    repository: Path, config: dict[str, object]
) -> None:
    (repository / "config.json").write_text(json.dumps(config))
    found = bytes_of("vllm", "serve", repository, "--max-model-len", "8192")
    assert found == round(6 * GIB * 1.1) + 8192 * PER_TOKEN + WORK


@pytest.mark.parametrize("config", ["", "[]", "[" * 100_000, '{"num_hidden_layers": "36"}', '{"text_config": 5}'])
def test_a_directory_whose_config_makes_no_sense_still_has_weights(repository: Path, config: str) -> None:
    (repository / "config.json").write_text(config)
    assert bytes_of("vllm", "serve", repository) == round(6 * GIB * 1.1) + WORK


def test_weights_that_are_there_twice_count_once(repository: Path) -> None:
    before = bytes_of("vllm", "serve", repository)
    write_safetensors(repository / "consolidated.safetensors", 6 * GIB)
    assert bytes_of("vllm", "serve", repository) == before


def test_a_single_file_counts_where_it_is_named(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "sd.safetensors")
    found = bytes_of("python3", "-m", "server", f"--checkpoint={file}")
    assert found == round(2 * GIB * 1.1) + WORK


# --- What is no model


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 9),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 9),
    ],
)
@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_a_file_that_is_none_gives_no_guess(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"m.{suffix}"
    file.write_bytes(content)
    assert bytes_of("llama-server", "-m", file) is None


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["llama-server"],
        ["llama-server", "-m"],
        ["llama-server", "-m", "/nonexistent/x.gguf"],
        ["llama-server", "-hf", "Qwen/Qwen3-8B"],
        ["vllm", "serve", "/"],
        ["x", "/\0", "/" + "x" * 5000],
    ],
)
def test_a_command_that_names_no_model_gives_no_guess(command: list[str]) -> None:
    assert estimate(command, {}) is None


def test_a_context_beyond_all_measure_gives_no_guess(gguf: Path) -> None:
    assert bytes_of("llama-server", "-m", gguf, "-c", "9" * 400) is None
    assert bytes_of("llama-server", "-m", gguf, "-c", "9" * 5000) is None


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, len(EIGHT_B)) + b"".join(entry(*item) for item in EIGHT_B.items())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(HEAD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(HEAD)),
    st.binary(max_size=64),
)
def test_a_damaged_header_gives_a_guess_in_bounds_or_none(
    tmp_path: Path, damage: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    head = bytearray(HEAD)
    for at, byte in damage:
        head[at] = byte
    file = tmp_path / "damaged.gguf"
    file.write_bytes(bytes(head[:cut]) + tail)
    found = bytes_of("llama-server", "-m", file, "-c", "0")
    assert found is None or 0 < found < 1 << 46


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), st.one_of(st.integers(), st.floats(), st.text(), st.none())))
def test_a_strange_config_gives_a_guess_in_bounds_or_none(repository: Path, config: dict[str, object]) -> None:
    (repository / "config.json").write_text(json.dumps(CONFIG | config))
    found = bytes_of("vllm", "serve", repository)
    assert found is None or 0 < found < 1 << 46
