"""VRAM estimates for the architectures that llama.cpp, vLLM and SGLang treat each in their own way.

The right values are computed here by hand from the formulas of the engines' sources; ``estimate.py``,
``architecture.py`` and ``huggingface.py`` name the files and functions. ``tests/machine/test_llama_memory.py`` compares
the same formulas with what a real llama-server says that it allocates.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from gpusvc.quantity import GIB, MIB
from gpusvc.weights.estimate import estimate
from gpusvc.weights.parts import Estimate
from tests.unit.test_weights_estimate import write_safetensors

Metadata: TypeAlias = "dict[str, int | bool | list[int] | list[bool]]"

MLA: Metadata = {
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
}


def write_gguf(path: Path, architecture: str, metadata: Metadata, size: int) -> Path:
    """Write a sparse file of ``size`` bytes whose header has these keys of the architecture."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata) + 1))
    head += _text("general.architecture") + struct.pack("<I", 8) + _text(architecture)
    for key, value in metadata.items():
        head += _text(f"{architecture}.{key}") + _value(value)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: int | bool | list[int] | list[bool]) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    kind, letter = (7, "?") if isinstance(value[0], bool) else (4, "I")
    return struct.pack(f"<IIQ{len(value)}{letter}", 9, kind, len(value), *value)


class Case(NamedTuple):
    """A model, how it is served, and what its cache and its recurrent state take; ``k`` is 1,024 tokens."""

    architecture: str
    layers: int
    metadata: Metadata
    options: str
    cache: float  # bytes
    state: int = 0


def kv(heads: int, size: int, bytes_each: float = 2) -> float:
    """Return the bytes of keys and values of one layer for one token."""
    return heads * size * 2 * bytes_each


K = 1024
PLAIN: Metadata = {
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
}
SIX: list[bool] = [True] * 5 + [False]


def heads(count: int, size: int, **more: int | list[int] | list[bool]) -> Metadata:
    """Return keys of a model whose heads are all alike; ``__`` stands for a dot."""
    found: Metadata = {
        "attention.head_count_kv": count,
        "attention.key_length": size,
        "attention.value_length": size,
    }
    return found | {name.replace("__", "."): value for name, value in more.items()}


def windowed(count: int, size: int, window: int) -> Metadata:
    return heads(count, size, attention__sliding_window=window)


QWEN_STATE = (3 * (4096 + 2 * 16 * 128) + 128 * 4096) * 4
QWEN_SSM: Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 4096,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 32,
}
MAMBA: Metadata = {"ssm.conv_kernel": 4, "ssm.inner_size": 8192, "ssm.state_size": 16, "ssm.time_step_rank": 256}
MAMBA_STATE = (3 * 8192 + 16 * 8192) * 4
GRANITE: Metadata = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 3072,
    "ssm.state_size": 128,
    "ssm.group_count": 1,
    "ssm.time_step_rank": 48,
}
GRANITE_STATE = (3 * (3072 + 2 * 128) + 128 * 3072) * 4

CASES = [
    # One cache for every layer and token (llama_kv_cache).
    Case("llama", 32, PLAIN, "-c 8192", 32 * 8 * K * kv(8, 128)),
    Case("llama", 32, PLAIN, "-c 8192 -ctk q8_0 -ctv q4_0", 32 * 8 * K * 8 * 128 * (34 + 18) / 32),
    Case("llama", 32, PLAIN, "-c 8192 -ctk q5_1 -ctv iq4_nl", 32 * 8 * K * 8 * 128 * (24 + 18) / 32),
    Case("llama", 32, PLAIN, "-c 8192 -np 4", 32 * 8 * K * kv(8, 128)),
    Case("llama", 32, PLAIN, "-c 8192 -np 4 -kvu", 32 * 8 * K * kv(8, 128)),
    Case("llama", 32, PLAIN, "-c 1000 -np 3", 32 * 3 * 512 * kv(8, 128)),
    Case("llama", 32, PLAIN, "-c 8192 -nkvo", 0),
    Case("llama", 32, PLAIN, "-c 8192 -ngl 9", 8 * 8 * K * kv(8, 128)),
    Case("qwen2", 28, heads(4, 128, attention__sliding_window=32768), "-c 65536", 28 * 64 * K * kv(4, 128)),
    Case("qwen3moe", 48, heads(4, 128), "-c 32768", 48 * 32 * K * kv(4, 128)),
    Case("phi3", 32, windowed(32, 96, 2047), "-c 8192", 32 * 8 * K * kv(32, 96)),
    Case("glm4moe", 47, heads(8, 128, nextn_predict_layers=1), "-c 8192", 46 * 8 * K * kv(8, 128)),
    Case("command-r", 40, heads(8, 128), "-c 8192", 40 * 8 * K * kv(8, 128)),
    Case("deci", 4, heads(0, 128) | {"attention.head_count_kv": [8, 0, 4, 8]}, "-c 4096", 4 * K * kv(20, 128)),
    # Layers with a window (llama_kv_cache_iswa): window and one batch of 512, padded to 256.
    Case("gemma2", 42, windowed(8, 256, 4096), "-c 32768", 21 * (32 * K + 4608) * kv(8, 256)),
    Case("gemma2", 42, windowed(8, 256, 4096), "-c 2048", 42 * 2 * K * kv(8, 256)),
    Case("gemma3", 62, windowed(16, 128, 1024), "-c 32768", (10 * 32 * K + 52 * 1536) * kv(16, 128)),
    Case("gemma3", 62, windowed(16, 128, 1024), "-c 32768 --swa-full", 62 * 32 * K * kv(16, 128)),
    Case("gemma3", 62, windowed(16, 128, 1024), "-c 32768 -np 4", (10 * 32 * K + 52 * 4 * 1536) * kv(16, 128)),
    Case("gemma3", 62, windowed(16, 128, 1024), "-c 32768 -np 4 -kvu", (10 * 32 * K + 52 * 4608) * kv(16, 128)),
    Case("gemma3", 62, windowed(16, 128, 1024), "-c 32768 -ub 2048", (10 * 32 * K + 52 * 3072) * kv(16, 128)),
    Case("gemma3n", 35, windowed(2, 256, 512), "-c 32768", (4 * 32 * K + 16 * 1024) * kv(2, 256)),
    Case(
        "gemma3n",
        30,
        windowed(2, 256, 512) | {"attention.shared_kv_layers": 10, "attention.sliding_window_pattern": [*SIX[1:]] * 6},
        "-c 32768",
        (4 * 32 * K + 16 * 1024) * kv(2, 256),
    ),
    Case(
        "gemma4",
        60,
        {
            "attention.head_count_kv": [16, 16, 16, 16, 16, 4] * 10,
            "attention.key_length": 512,
            "attention.value_length": 512,
            "attention.key_length_swa": 256,
            "attention.value_length_swa": 256,
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": SIX * 10,
        },
        "-c 32768",
        10 * 32 * K * kv(4, 512) + 50 * 1536 * kv(16, 256),
    ),
    Case("gpt-oss", 24, windowed(8, 64, 128), "-c 131072", 12 * (128 * K + 768) * kv(8, 64)),
    Case("cohere2", 32, windowed(8, 128, 4096), "-c 65536", (8 * 64 * K + 24 * 4608) * kv(8, 128)),
    Case("llama4", 48, heads(8, 128), "-c 65536", (12 * 64 * K + 36 * 8704) * kv(8, 128)),
    Case("exaone4", 64, windowed(8, 128, 4096), "-c 65536", (16 * 64 * K + 48 * 4608) * kv(8, 128)),
    Case("exaone4", 30, heads(8, 64), "-c 65536", 30 * 64 * K * kv(8, 64)),
    Case("olmo2", 32, windowed(32, 128, 4096), "-c 65536", (8 * 64 * K + 24 * 4608) * kv(32, 128)),
    Case("smallthinker", 32, windowed(4, 128, 4096), "-c 16384", (8 * 16 * K + 24 * 4608) * kv(4, 128)),
    # MLA keeps one vector, as a key (llama_hparams::is_mla); older files have all heads.
    Case("deepseek2", 27, MLA, "-c 131072", 27 * 128 * K * 576 * 2),
    Case("deepseek2", 61, MLA, "-c 32768 -ctk q8_0", 61 * 32 * K * 576 * 34 / 32),
    Case(
        "deepseek2",
        27,
        {"attention.head_count_kv": 16, "attention.key_length": 192, "attention.value_length": 128},
        "-c 4096",
        27 * 4 * K * 16 * 320 * 2,
    ),
    # Recurrent layers (llama_memory_recurrent): a row of f32 for each slot.
    Case("qwen3next", 48, heads(2, 256) | QWEN_SSM, "-c 32768", 12 * 32 * K * kv(2, 256), 36 * QWEN_STATE),
    Case("qwen35", 64, heads(4, 256, full_attention_interval=4), "-c 131072", 16 * 128 * K * kv(4, 256)),
    Case(
        "qwen35moe",
        41,
        heads(2, 256, nextn_predict_layers=1) | QWEN_SSM,
        "-c 32768 -np 2",
        10 * 32 * K * kv(2, 256),
        2 * 30 * QWEN_STATE,
    ),
    Case(
        "jamba",
        32,
        heads(0, 128) | MAMBA | {"attention.head_count_kv": [0, 0, 0, 0, 8, 0, 0, 0] * 4},
        "-c 8192",
        4 * 8 * K * kv(8, 128),
        28 * MAMBA_STATE,
    ),
    Case("mamba", 64, {"attention.head_count": 0, **MAMBA}, "-c 8192", 0, 64 * MAMBA_STATE),
    Case("mamba2", 64, {"attention.head_count": 0, **GRANITE}, "-c 8192 -np 3", 0, 3 * 64 * GRANITE_STATE),
    Case(
        "granitehybrid",
        40,
        heads(0, 64) | GRANITE | {"attention.head_count_kv": [0, 0, 0, 0, 0, 4, 0, 0, 0, 0] * 4},
        "-c 131072",
        4 * 128 * K * kv(4, 64),
        36 * GRANITE_STATE,
    ),
    Case("falcon-h1", 36, heads(2, 128) | GRANITE, "-c 8192", 36 * 8 * K * kv(2, 128), 36 * GRANITE_STATE),
    Case(
        "nemotron_h",
        4,
        heads(0, 128) | GRANITE | {"attention.head_count_kv": [0, 8, 0, 0], "feed_forward_length": [0, 0, 21504, 0]},
        "-c 8192",
        8 * K * kv(8, 128),
        2 * GRANITE_STATE,
    ),
    Case(
        "lfm2",
        4,
        heads(0, 64, shortconv__l_cache=3) | {"attention.head_count_kv": [0, 0, 8, 0]},
        "-c 8192",
        8 * K * kv(8, 64),
        3 * 2 * 4096 * 4,
    ),
    Case("rwkv7", 32, {"attention.head_count": 0, "wkv.head_size": 64}, "-c 8192", 0, 32 * (2 + 64) * 4096 * 4),
    # No cache (llama_model::create_memory).
    Case("bert", 24, {"attention.head_count": 16}, "-c 512", 0),
    Case("gemma-embedding", 24, windowed(1, 256, 512), "-c 2048", 0),
]


def found_for(path: Path, *options: str, **env: str) -> Estimate | None:
    return estimate(["llama-server", "-m", str(path), *options], env)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.architecture} {case.options}")
def test_a_cache_is_what_the_engine_allocates(tmp_path: Path, case: Case) -> None:
    known = {"block_count": case.layers, "context_length": 131072, "embedding_length": 4096} | case.metadata
    options = case.options if "-np" in case.options else f"{case.options} -np 1"
    found = found_for(write_gguf(tmp_path / "m.gguf", case.architecture, known, GIB), *options.split())
    assert found is not None
    assert (found.cache_bytes, found.state_bytes) == (case.cache, case.state)


def test_the_table_covers_the_kinds_of_architectures() -> None:
    assert len({case.architecture for case in CASES}) >= 25


@pytest.mark.parametrize(
    ("architecture", "metadata", "size", "options", "right"),
    [
        (
            "gemma4",
            {
                "block_count": 60,
                "attention.head_count_kv": [16, 16, 16, 16, 16, 4] * 10,
                "attention.key_length": 512,
                "attention.value_length": 512,
                "attention.key_length_swa": 256,
                "attention.value_length_swa": 256,
                "attention.sliding_window": 1024,
                "attention.sliding_window_pattern": SIX * 10,
            },
            18.3e9,
            "-c 32768 -np 1",
            21.2,
        ),
        ("qwen35", {"block_count": 64, **heads(4, 256, full_attention_interval=4)}, 16.6e9, "-c 131072 -np 1", 24.0),
        ("gemma3", {"block_count": 62, **windowed(16, 128, 1024)}, 16.5e9, "-c 32768 -np 1", 19.0),
        ("deepseek2", {"block_count": 47, **MLA, "attention.key_length_mla": 256}, 18.1e9, "-c 131072 -np 1", 24.0),
        ("gpt-oss", {"block_count": 24, **windowed(8, 64, 128)}, 12.1e9, "-c 131072 -np 1", 14.8),
    ],
)
def test_the_whole_is_within_a_hundredth_of_what_people_saw(
    tmp_path: Path, architecture: str, metadata: Metadata, size: float, options: str, right: float
) -> None:
    known = {"context_length": 262144, "embedding_length": 5376, **metadata}
    found = found_for(write_gguf(tmp_path / "sha256-0a1b", architecture, known, int(size)), *options.split())
    assert found is not None
    assert found.bytes / GIB == pytest.approx(right, rel=0.01)


def test_llama_server_makes_four_slots_that_share_the_cache(gemma: Path, tmp_path: Path) -> None:
    assert found_for(gemma, "-c", "32768") == found_for(gemma, "-c", "32768", "-np", "4", "-kvu")
    assert found_for(gemma, "-c", "32768", "-np", "-1") == found_for(gemma, "-c", "32768")
    assert estimate(["llama-cli", "-m", str(gemma), "-c", "32768"], {}) == found_for(gemma, "-c", "32768", "-np", "1")
    assert found_for(gemma, "--kv-unified-per-slot", "2048") == found_for(gemma, "-c", "8192")


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    known = {"block_count": 62, "context_length": 131072, "embedding_length": 5376} | windowed(16, 128, 1024)
    return write_gguf(tmp_path / "gemma.gguf", "gemma3", known, 8 * GIB)


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ({"LLAMA_ARG_N_PARALLEL": "4", "LLAMA_ARG_KV_UNIFIED": "1"}, "-np 4 -kvu"),
        ({"LLAMA_ARG_N_PARALLEL": "4"}, "-np 4"),
        ({"LLAMA_ARG_SWA_FULL": "true"}, "--swa-full"),
        ({"LLAMA_ARG_SWA_FULL": "0"}, ""),
        ({"LLAMA_ARG_UBATCH": "2048"}, "-ub 2048"),
        ({"LLAMA_ARG_UBATCH": "8192", "LLAMA_ARG_BATCH": "1024"}, "-ub 1024"),
        ({"LLAMA_ARG_NO_KV_OFFLOAD": "1"}, "--no-kv-offload"),
        ({"LLAMA_ARG_KV_OFFLOAD": "off"}, "-nkvo"),
        ({"LLAMA_ARG_N_GPU_LAYERS": "20"}, "-ngl 20"),
        ({"LLAMA_ARG_CACHE_TYPE_K": "q8_0"}, "-ctk q8_0"),
    ],
)
def test_a_variable_counts_as_its_option(gemma: Path, env: dict[str, str], options: str) -> None:
    found = found_for(gemma, "-c", "32768", **env)
    assert found is not None
    assert found == found_for(gemma, "-c", "32768", *options.split())


def test_a_projector_may_stay_in_ram(gemma: Path, tmp_path: Path) -> None:
    projector = write_gguf(tmp_path / "mmproj", "clip", {"block_count": 27}, GIB)
    alone = found_for(gemma)
    assert alone is not None
    beside = alone._replace(weights_bytes=9 * GIB)
    assert found_for(gemma, "--mmproj", str(projector)) == beside
    assert found_for(gemma, LLAMA_ARG_MMPROJ=str(projector)) == beside
    assert found_for(gemma, "--mmproj", str(projector), "--no-mmproj-offload") == alone
    assert found_for(gemma, LLAMA_ARG_MMPROJ=str(projector), LLAMA_ARG_MMPROJ_OFFLOAD="0") == alone


def test_a_draft_model_has_a_cache_for_the_same_context(gemma: Path, tmp_path: Path) -> None:
    known = {"block_count": 26, "context_length": 32768, "embedding_length": 1152} | windowed(1, 256, 512)
    draft = write_gguf(tmp_path / "draft", "gemma3", known, GIB)
    alone = found_for(gemma, "-c", "32768", "-np", "4")
    assert alone is not None
    cache = (4 * 32 * K + 22 * 4 * 1024) * kv(1, 256)
    beside = alone._replace(
        weights_bytes=9 * GIB,
        cache_bytes=alone.cache_bytes + round(cache),
        compute_bytes=2 * alone.compute_bytes,
    )
    assert found_for(gemma, "-c", "32768", "-np", "4", "-md", str(draft)) == beside
    assert found_for(gemma, "-c", "32768", "-np", "4", LLAMA_ARG_SPEC_DRAFT_MODEL=str(draft)) == beside
    in_ram = found_for(gemma, "-c", "32768", "-np", "4", "-md", str(draft), "-ngld", "0")
    assert in_ram is not None
    assert (in_ram.weights_bytes, in_ram.cache_bytes) == (alone.weights_bytes, alone.cache_bytes)


def test_the_parts_are_told(tmp_path: Path) -> None:
    known = {"block_count": 48, "context_length": 262144, "embedding_length": 2048} | heads(2, 256) | QWEN_SSM
    found = found_for(write_gguf(tmp_path / "m.gguf", "qwen3next", known, 40 * GIB), "-c", "32768")
    assert found is not None
    assert found.reason == (
        "40.0 GiB of weights, 768.0 MiB of KV cache for 32768 tokens, 301.5 MiB of recurrent state, 104.8 MiB of "
        "compute buffers, and 384.0 MiB for the driver."
    )


# --- vLLM and SGLang


EIGHT_B: dict[str, object] = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}
LATENT: dict[str, object] = EIGHT_B | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
NEXT: dict[str, object] = EIGHT_B | {
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


class Served(NamedTuple):
    """A configuration, how it is served, and what its cache and its recurrent state take."""

    config: dict[str, object]
    options: str
    cache: float
    state: int = 0


SERVED = [
    Served(EIGHT_B, "--max-model-len 131072", 36 * 128 * K * kv(8, 128)),
    Served(EIGHT_B, "--max-model-len 128K", 36 * 128 * K * kv(8, 128)),
    Served(EIGHT_B, "--max-model-len 131072 --kv-cache-dtype fp8", 36 * 128 * K * kv(8, 128, 1)),
    Served(EIGHT_B, "--context-length 8192 --kv-cache-dtype fp8_e5m2", 36 * 8 * K * kv(8, 128, 1)),
    Served(EIGHT_B, "--context-length 8192 --tp 8", 36 * 8 * K * kv(8, 128)),
    Served(EIGHT_B, "--context-length 8192 --tp 16", 2 * 36 * 8 * K * kv(8, 128)),
    Served(LATENT, "--max-model-len 131072", 61 * 128 * K * 576 * 2),
    Served(LATENT, "--max-model-len 131072 -tp 8", 8 * 61 * 128 * K * 576 * 2),
    Served(
        NEXT,
        "--max-model-len 32768",
        12 * 32 * K * kv(2, 256),
        36 * (3 * (2 * 2048 + 4096) * 2 + 32 * 128 * 128 * 4),
    ),
    Served(
        EIGHT_B | {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18},
        "--max-model-len 131072",
        18 * (128 * K + 128 + 2048) * kv(8, 128),
    ),
    Served(
        EIGHT_B | {"sliding_window": 4096, "use_sliding_window": False},
        "--max-model-len 131072",
        36 * 128 * K * kv(8, 128),
    ),
    Served(
        EIGHT_B | {"num_hidden_layers": 32, "sliding_window": 4096}, "--max-model-len 32768", 32 * 6144 * kv(8, 128)
    ),
    Served(
        EIGHT_B | {"num_hidden_layers": 26, "sliding_window": 4096, "model_type": "gemma2"},
        "--max-model-len 8192",
        13 * (8 * K + 6144) * kv(8, 128),
    ),
    Served(
        EIGHT_B
        | {
            "num_hidden_layers": 40,
            "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
        },
        "--max-model-len 131072",
        4 * 128 * K * kv(8, 128),
        36 * (3 * (3072 + 256) * 2 + 3072 * 128 * 4),
    ),
    Served(
        EIGHT_B | {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*M"},
        "--max-model-len 8192",
        8 * K * kv(8, 128),
    ),
    Served(
        EIGHT_B | {"num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4},
        "--max-model-len 8192",
        4 * 8 * K * kv(8, 128),
    ),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "model.safetensors", 12 * GIB)
    return tmp_path


@pytest.mark.parametrize("served", SERVED, ids=lambda served: served.options)
def test_a_directory_has_the_cache_that_vllm_makes(directory: Path, served: Served) -> None:
    (directory / "config.json").write_text(json.dumps(served.config))
    found = estimate(["vllm", "serve", str(directory), *served.options.split()], {})
    assert found is not None
    assert (found.cache_bytes, found.state_bytes) == (served.cache, served.state)


@pytest.mark.parametrize(
    ("config", "options", "weights", "gpus", "right"),
    [
        (EIGHT_B, "--max-model-len 131072 --kv-cache-dtype fp8", 13.1, 1, 23.4),
        (LATENT, "--max-model-len 131072", 22.65, 1, 33.5),
        (EIGHT_B, "--max-model-len 131072 -tp 2", 13.1, 2, 32.4 + 0.5),
        (EIGHT_B, "--max-model-len 131072 -tp 2 -pp 2", 13.1, 4, 32.4 + 1.5),
        (EIGHT_B, "--max-model-len 131072 -tp 2 -dp 2", 13.1, 4, 2 * 32.4 + 1.0),  # each rank has all of it
        (EIGHT_B, "--context-length 131072 --tp 2 --dp 2 --enable-dp-attention", 13.1, 2, 32.4 + 0.5),
        (EIGHT_B, "--max-model-len 131072 --cpu-offload-gb 4", 13.1, 1, 28.4 + 0.5),
    ],
)
def test_the_whole_is_what_people_saw_of_vllm(
    tmp_path: Path, config: dict[str, object], options: str, weights: float, gpus: int, right: float
) -> None:
    write_safetensors(tmp_path / "model.safetensors", int(weights * GIB))
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = estimate(["vllm", "serve", str(tmp_path), *options.split()], {})
    assert found is not None
    assert found.gpus == gpus
    assert found.bytes / GIB == pytest.approx(right, rel=0.03)
    assert found.bytes_on_gpu(80 * GIB, gpus) == pytest.approx(found.bytes / gpus, abs=1)


@pytest.mark.parametrize("option", ["--gpu-memory-utilization", "--mem-fraction-static"])
def test_an_engine_that_takes_a_share_of_each_gpu_needs_that_share(directory: Path, option: str) -> None:
    (directory / "config.json").write_text(json.dumps(EIGHT_B))
    found = estimate(["vllm", "serve", str(directory), option, "0.5"], {})
    assert found is not None
    assert found.bytes_on_gpu(80 * GIB, 1) == 40 * GIB


def test_without_a_share_the_need_is_divided_among_the_gpus(directory: Path) -> None:
    found = estimate(["vllm", "serve", str(directory), "-tp", "2"], {})
    assert found is not None
    assert found.gpus == 2
    assert found.bytes == round(12 * GIB * 1.1) + 2 * 512 * MIB
    assert found.bytes_on_gpu(80 * GIB, 2) == -(-found.bytes // 2)


# --- Files that are something else


def test_a_file_that_would_block_gives_no_estimate(tmp_path: Path) -> None:
    fifo = tmp_path / "m.gguf"
    os.mkfifo(fifo)
    assert found_for(fifo) is None
    assert found_for(Path("/dev/zero")) is None
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert estimate(["vllm", "serve", str(tmp_path)], {}) is None


def test_a_link_is_followed_as_people_link_models(gemma: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(gemma)
    assert found_for(link) == found_for(gemma)
