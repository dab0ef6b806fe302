"""Tensors that stay in RAM, and the compute buffer that the others need.

The right values are sums over the tensors that the models are written with, by the rules of llama.cpp's sources, which
``offload.py`` and ``compute.py`` name. ``tests/machine/test_llama_memory.py`` compares both with a real llama-server.
"""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusvc.quantity import MIB
from gpusvc.weights import gguf
from gpusvc.weights.estimate import estimate
from gpusvc.weights.parts import Estimate
from tests.engines import largegguf
from tests.engines.largegguf import Model
from tests.engines.tinygguf import ValueType

MIXTURE = largegguf.mixture()
DENSE = largegguf.dense()
TIED = largegguf.dense(tied=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, model in (("mixture", MIXTURE), ("dense", DENSE), ("tied", TIED)):
        largegguf.write(path / f"{name}.gguf", model)
    return path


def found_for(file: Path, options: str = "", **env: str) -> Estimate | None:
    return estimate(["llama-server", "-m", str(file), *options.split()], env)


def weights_of(model: Model, in_ram: Iterable[str] = ()) -> int:
    """Return the bytes in VRAM if the tensors with these patterns stay in RAM, as the embeddings of the input do."""
    patterns = [re.compile(pattern) for pattern in ("^token_embd", *in_ram)]
    return sum(
        largegguf.bytes_of(*tensor)
        for name, tensor in model.tensors.items()
        if not any(pattern.search(name) for pattern in patterns)
    )


EXPERTS = r"ffn_(up|down|gate)_exps"


@pytest.mark.parametrize(
    ("options", "in_ram"),
    [
        ("", []),
        ("-cmoe", [EXPERTS]),
        ("--cpu-moe", [EXPERTS]),
        ("-ncmoe 2", [rf"blk\.[01]\.{EXPERTS}"]),
        ("--n-cpu-moe 99", [EXPERTS]),
        ("--n-cpu-moe=0", []),
        ("-ncmoe 20000", [EXPERTS]),
        ("-ncffn 3", []),  # of dense layers only
        ("-ot exps=CPU", [EXPERTS]),
        (r"-ot blk\.(1|2)\..*_exps\.=CPU", [rf"blk\.[12]\.{EXPERTS}"]),
        (r"--override-tensor=\.ffn_.*_exps\.=CPU", [EXPERTS]),
        (r"-ot blk\.0\.ffn_up=CPU,blk\.3\.=CPU", [r"blk\.0\.ffn_up", r"blk\.3\."]),
        (r"-ot blk\.0\.=CUDA0 -cmoe", [rf"blk\.[1-5]\.{EXPERTS}"]),  # the first that fits counts
        (r"-cmoe -ot blk\.0\.=CUDA0", [EXPERTS]),
        ("-ngl 3", [r"blk\.[0-3]\."]),
        ("-ngl 3 -ncmoe 5", [r"blk\.[0-3]\.", rf"blk\.4\.{EXPERTS}"]),
        ("-ngl 0", ["."]),
        (r"-ngl 0 -ot _exps=CUDA0", ["^output", r"attn_", r"ffn_norm", r"gate_inp"]),
    ],
)
def test_the_weights_are_the_tensors_in_vram(directory: Path, options: str, in_ram: list[str]) -> None:
    found = found_for(directory / "mixture.gguf", options)
    assert found is not None
    assert found.weights_bytes == weights_of(MIXTURE, in_ram)


@pytest.mark.parametrize(("options", "in_ram"), [("-ncffn 2", [r"blk\.[01]\.ffn_(up|down|gate)\."]), ("-cmoe", [])])
def test_feed_forward_tensors_of_dense_layers_stay_in_ram(directory: Path, options: str, in_ram: list[str]) -> None:
    found = found_for(directory / "dense.gguf", options)
    assert found is not None
    assert found.weights_bytes == weights_of(DENSE, in_ram)


def test_embeddings_that_are_the_output_too_are_loaded_twice(directory: Path) -> None:
    found, without = found_for(directory / "tied.gguf"), found_for(directory / "tied.gguf", "-ngl 0")
    assert found is not None
    assert without is not None
    embeddings = largegguf.bytes_of(*TIED.tensors["token_embd.weight"])
    assert found.weights_bytes == weights_of(TIED) + embeddings
    assert without.weights_bytes == 0


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ({"LLAMA_ARG_CPU_MOE": "1"}, "-cmoe"),
        ({"LLAMA_ARG_CPU_MOE": "0"}, ""),
        ({"LLAMA_ARG_N_CPU_MOE": "2"}, "-ncmoe 2"),
        ({"LLAMA_ARG_N_CPU_MOE": "0"}, ""),
        ({"LLAMA_ARG_N_CPU_FFN": "2"}, "-ncffn 2"),
        ({"LLAMA_ARG_OVERRIDE_TENSOR": "exps=CPU"}, "-ot exps=CPU"),
    ],
)
@pytest.mark.parametrize("name", ["mixture", "dense"])
def test_a_variable_counts_as_its_option(directory: Path, name: str, env: dict[str, str], options: str) -> None:
    file = directory / f"{name}.gguf"
    assert found_for(file, **env) == found_for(file, options)


def test_a_command_may_set_its_variables_itself(directory: Path) -> None:
    file = str(directory / "mixture.gguf")
    command = ["env", "LLAMA_ARG_N_CPU_MOE=2", "llama-server", "-m", file]
    assert estimate(command, {}) == found_for(Path(file), "-ncmoe 2")


@pytest.mark.parametrize(
    "override",
    ["exps", "(=CPU", "[=CPU", "a{9999999999}=CPU", "(a|b)*c=CPU", "(.*)*x=CPU", "a*b*c*d*e*=CPU", "a" * 600 + "=CPU"],
)
def test_a_pattern_that_is_not_valid_or_too_complex_gives_no_estimate(directory: Path, override: str) -> None:
    assert found_for(directory / "mixture.gguf", f"-ot {override}") is None


@pytest.mark.parametrize("options", ["-ncmoe many", "-ncmoe -1", "-ot"])
def test_an_option_that_makes_no_sense_gives_no_estimate(directory: Path, options: str) -> None:
    assert found_for(directory / "mixture.gguf", options) is None


# --- The compute buffer. T is the batch of 512 tokens, in floats.

T = 512 * 4
MASK = 8192 * 512 * 2


@pytest.mark.parametrize(
    ("name", "options", "right"),
    [
        # A dense layer: gate, up and their product, beside four vectors as wide as the model.
        ("dense", "", T * (3 * 14336 + 4 * 4096) + MASK),
        ("dense", "-ub 1024", 2 * T * (3 * 14336 + 4 * 4096) + 2 * MASK),
        ("dense", "-ub 4096 -b 256", T // 2 * (3 * 14336 + 4 * 4096) + MASK // 2),
        ("dense", "-np 4", T * (3 * 14336 + 4 * 4096) + MASK // 4),  # each slot sees its own part
        ("dense", "-np 4 -kvu", T * (3 * 14336 + 4 * 4096) + MASK),
        # Weights that stay in RAM are copied: the largest of the feed-forward network, and of attention.
        ("dense", "-ncffn 2", T * (2 * 14336 + 4 * 4096) + 4096 * 14336 * 144 // 256 + MASK),
        ("dense", "-ngl 0", T * (2 * 14336 + 4 * 4096) + 4096 * (14336 + 4096) * 144 // 256 + MASK),
        # Without flash attention all scores are there at once, and the mask has floats.
        ("dense", "-fa off", 512 * 8192 * 32 * 4 + T * (2 + 3) * 4096 + 2 * MASK),
        # The experts of all tokens, and their outputs, which don't fit where their inputs were.
        ("mixture", "", T * (3 * 8 * 768 + 8 * 2048 + 4 * 2048) + MASK),
        ("mixture", "-cmoe", T * (8 * 768 + 8 * 2048 + 4 * 2048) + 2048 * 768 * 64 * 144 // 256 + MASK),
        ("mixture", "-cmoe --no-op-offload", T * (2 * 2048 + 3 * 4096) + MASK),
    ],
)
def test_the_compute_buffer_is_what_the_largest_layer_needs(
    directory: Path, name: str, options: str, right: int
) -> None:
    found = found_for(directory / f"{name}.gguf", f"-c 8192 {options}")
    assert found is not None
    assert found.compute_bytes == right


def test_a_cache_in_ram_is_copied_for_one_layer(directory: Path) -> None:
    found = found_for(directory / "dense.gguf", "-c 65536 -nkvo")
    assert found is not None
    assert found.cache_bytes == 0
    assert found.compute_bytes == T * (2 + 3) * 4096 + 65536 * 2 * 8 * 128 * 2 + 65536 * 512 * 2


# --- The header


def test_a_header_is_read_through_its_vocabulary(directory: Path) -> None:
    header = gguf.read_header(directory / "mixture.gguf")
    assert header.metadata["qwen3moe.expert_count"] == 64
    assert not any(key.startswith("tokenizer.") for key in header.metadata)
    assert {tensor.name for tensor in header.tensors} == MIXTURE.tensors.keys()
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.5.ffn_down_exps.weight")
    assert tensor.shape == (768, 2048, 64)
    assert tensor.bytes == 768 * 2048 * 64 * 144 // 256


def test_a_vocabulary_of_megabytes_is_skipped(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": (ValueType.STRING, "llama"),
        "tokenizer.ggml.merges": (
            ValueType.ARRAY,
            (ValueType.STRING, ["x" * 90] * 40_000),
        ),
        "general.file_type": (ValueType.UINT32, 15),
    }
    file = tmp_path / "long.gguf"
    largegguf.write_header(file, metadata, DENSE.tensors)
    assert file.stat().st_blocks * 512 > 3 * MIB
    header = gguf.read_header(file)
    assert len(header.tensors) == len(DENSE.tensors)
    assert header.metadata["general.file_type"] == 15


def test_all_parts_of_a_split_model_list_their_tensors(tmp_path: Path) -> None:
    names = list(MIXTURE.tensors)
    for number, part in enumerate((names[:20], names[20:]), start=1):
        tensors = {name: MIXTURE.tensors[name] for name in part}
        largegguf.write(tmp_path / f"m-0000{number}-of-00002.gguf", MIXTURE._replace(tensors=tensors))
    found = found_for(tmp_path / "m-00001-of-00002.gguf", "-ncmoe 4")
    assert found is not None
    assert found.weights_bytes == weights_of(MIXTURE, [rf"blk\.[0-3]\.{EXPERTS}"])


def test_a_list_of_tensors_that_was_not_downloaded_is_none(directory: Path, tmp_path: Path) -> None:
    whole = directory / "mixture.gguf"
    with whole.open("rb") as stream:
        head = stream.read(1 << 21)
    file = tmp_path / "outline.gguf"
    file.write_bytes(head[: head.find(b"token_embd.weight") - 8])
    os.truncate(file, whole.stat().st_size)
    assert gguf.read_header(file).tensors == ()
    assert found_for(file, "-ncmoe 2") is None
    assert found_for(file) is not None


def _head(tensors: int, entries: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + body


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


_TENSOR = struct.pack("<QIIQ", 0, 0, 0, 0)
_NAME = _entry("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


@pytest.mark.parametrize(
    "content",
    [
        _head(400_000, 1, _NAME + _TENSOR * 400_000),
        _head(0, 400_000, _entry("k", 0, b"0") * 400_000),
        _head(0, 2, _NAME + _entry("n", 9, struct.pack("<IQ", 0, 8_000_000) + bytes(8_000_000))),
        _head(0, 2, _NAME + _entry("n", 9, struct.pack("<IQ", 8, 1_000_000) + bytes(8_000_000))),
        _head(0, 2, _NAME + _entry("n", 9, struct.pack("<IQ", 10, 1 << 63))),
        _head(0, 2, _NAME + _entry("tokenizer.t", 9, struct.pack("<IQ", 8, 1 << 63) + b"\xff" * 16)),
        _head(1 << 63, 1 << 63, b""),
    ],
    ids=["tensors", "entries", "numbers", "strings", "length", "string", "counts"],
)
def test_a_header_that_counts_too_much_takes_little_memory(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    del content
    tracemalloc.start()
    try:
        found_for(file, "-ncmoe 2")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * MIB


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 1 << 21),
    st.sampled_from(["-ncmoe 2", r"-ot .*_exps\.=CPU", ""]),
)
def test_a_damaged_list_of_tensors_gives_an_estimate_in_bounds_or_none(
    directory: Path, tmp_path: Path, damage: list[tuple[int, int]], cut: int, options: str
) -> None:
    with (directory / "mixture.gguf").open("rb") as stream:
        head = bytearray(stream.read(1 << 21))
    # The beginning, and the list of tensors behind the vocabulary.
    behind = head.find(b"token_embd.weight") - 30_000
    for at, byte in damage:
        head[at if at < 30_000 else behind + at] = byte
    file = tmp_path / "damaged.gguf"
    file.write_bytes(head[:cut])
    found = found_for(file, options)
    assert found is None or 0 < found.bytes < 1 << 46


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.text("blk.0123ffn_exps*+?{}[]()|\\=CPU,^$", max_size=60))
def test_any_override_gives_an_estimate_or_none_in_time(directory: Path, override: str) -> None:
    found = estimate(["llama-server", "-m", str(directory / "mixture.gguf"), "-ot", override], {})
    assert found is None or 0 < found.bytes < 1 << 46
