"""Models with layers of real size, as sparse files: a header that llama-server accepts, and zeros for weights.

llama-server tells what memory they take without loading them: its --fit does that first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tests.engines import tinygguf
from tests.engines.tinygguf import ValueType

Metadata: TypeAlias = "dict[str, int | float]"


class TensorType(NamedTuple):
    """One of ggml's types: its number, and how many numbers take how many bytes."""

    number: int
    numbers: int
    bytes: int


F32 = TensorType(0, 1, 4)
Q8_0 = TensorType(8, 32, 34)
Q4_K = TensorType(12, 256, 144)
Q6_K = TensorType(14, 256, 210)

Tensors: TypeAlias = "dict[str, tuple[list[int], TensorType]]"

_VOCABULARY = 20_000


class Model(NamedTuple):
    """What a file says."""

    architecture: str
    metadata: Metadata
    tensors: Tensors


def dense(
    *, layers: int = 6, width: int = 4096, inner: int = 14336, heads: int = 32, kv_heads: int = 8, tied: bool = False
) -> Model:
    """Return a model of the architecture llama; a tied one has no output of its own."""
    model = _attention("llama", layers, width, heads, kv_heads, width // heads, tied=tied)
    model.metadata["feed_forward_length"] = inner
    for layer in range(layers):
        _feed_forward(model.tensors, f"blk.{layer}.", width, inner)
    return model


def mixture(
    *, layers: int = 6, width: int = 2048, experts: int = 64, used: int = 8, inner: int = 768, heads: int = 32
) -> Model:
    """Return a mixture of experts of the architecture qwen3moe."""
    model = _attention("qwen3moe", layers, width, heads, 4, 128, tied=False)
    model.metadata.update(
        feed_forward_length=3 * inner,
        expert_count=experts,
        expert_used_count=used,
        expert_feed_forward_length=inner,
    )
    for layer in range(layers):
        block = f"blk.{layer}."
        model.tensors[f"{block}attn_q_norm.weight"] = ([128], F32)
        model.tensors[f"{block}attn_k_norm.weight"] = ([128], F32)
        model.tensors[f"{block}ffn_gate_inp.weight"] = ([width, experts], F32)
        model.tensors[f"{block}ffn_gate_exps.weight"] = ([width, inner, experts], Q4_K)
        model.tensors[f"{block}ffn_up_exps.weight"] = ([width, inner, experts], Q4_K)
        model.tensors[f"{block}ffn_down_exps.weight"] = ([inner, width, experts], Q4_K)
    return model


def windowed(*, layers: int = 6, width: int = 2560, inner: int = 10240, heads: int = 8, kv_heads: int = 4) -> Model:
    """Return a model of the architecture gemma3, whose layers but one of six have a window of 1,024 tokens."""
    model = _attention("gemma3", layers, width, heads, kv_heads, 256, tied=True)
    model.metadata["feed_forward_length"] = inner
    model.metadata["attention.sliding_window"] = 1024
    for layer in range(layers):
        block = f"blk.{layer}."
        for name in ("post_attention_norm", "post_ffw_norm"):
            model.tensors[f"{block}{name}.weight"] = ([width], F32)
        for name in ("attn_q_norm", "attn_k_norm"):
            model.tensors[f"{block}{name}.weight"] = ([256], F32)
        _feed_forward(model.tensors, block, width, inner)
    return model


def _attention(
    architecture: str, layers: int, width: int, heads: int, kv_heads: int, size: int, *, tied: bool
) -> Model:
    metadata: Metadata = {
        "context_length": 131072,
        "embedding_length": width,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": size,
    }
    tensors: Tensors = {
        "token_embd.weight": ([width, _VOCABULARY], Q4_K),
        "output_norm.weight": ([width], F32),
    }
    if not tied:
        tensors["output.weight"] = ([width, _VOCABULARY], Q6_K)
    for layer in range(layers):
        block = f"blk.{layer}."
        tensors[f"{block}attn_norm.weight"] = ([width], F32)
        tensors[f"{block}ffn_norm.weight"] = ([width], F32)
        tensors[f"{block}attn_q.weight"] = ([width, heads * size], Q4_K)
        tensors[f"{block}attn_k.weight"] = ([width, kv_heads * size], Q4_K)
        tensors[f"{block}attn_v.weight"] = ([width, kv_heads * size], Q4_K)
        tensors[f"{block}attn_output.weight"] = ([heads * size, width], Q4_K)
    return Model(architecture, metadata, tensors)


def _feed_forward(tensors: Tensors, block: str, width: int, inner: int) -> None:
    tensors[f"{block}ffn_gate.weight"] = ([width, inner], Q4_K)
    tensors[f"{block}ffn_up.weight"] = ([width, inner], Q4_K)
    tensors[f"{block}ffn_down.weight"] = ([inner, width], Q4_K)


def write(path: Path, model: Model) -> None:
    """Write the file; it is sparse."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + [f"w{number}" for number in range(_VOCABULARY - 259)]
    tokens = ["<unk>", "<s>", "</s>", *words]
    metadata: dict[str, tuple[ValueType, object]] = {"general.architecture": (ValueType.STRING, model.architecture)}
    for key, value in model.metadata.items():
        kind = ValueType.UINT32 if isinstance(value, int) else ValueType.FLOAT32
        metadata[f"{model.architecture}.{key}"] = (kind, value)
    metadata["tokenizer.ggml.model"] = (ValueType.STRING, "llama")
    metadata["tokenizer.ggml.tokens"] = (ValueType.ARRAY, (ValueType.STRING, tokens))
    metadata["tokenizer.ggml.scores"] = (ValueType.ARRAY, (ValueType.FLOAT32, [0.0] * len(tokens)))
    metadata["tokenizer.ggml.token_type"] = (ValueType.ARRAY, (ValueType.INT32, [1] * len(tokens)))
    write_header(path, metadata, model.tensors)


def write_header(path: Path, metadata: Mapping[str, tuple[ValueType, object]], tensors: Tensors) -> None:
    """Write a file with this metadata and these tensors, whose numbers are all zero."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        head += tinygguf._string(key) + struct.pack("<I", kind) + tinygguf._value(kind, value)
    offset = 0
    for name, (shape, tensor_type) in tensors.items():
        head += tinygguf._string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", tensor_type.number, offset)
        offset += tinygguf._padded(bytes_of(shape, tensor_type))
    with path.open("wb") as file:
        file.write(head.ljust(tinygguf._padded(len(head)), b"\0"))
        file.truncate(file.tell() + offset)


def bytes_of(shape: list[int], tensor_type: TensorType) -> int:
    """Return what a tensor takes in the file."""
    return math.prod(shape) // tensor_type.numbers * tensor_type.bytes
