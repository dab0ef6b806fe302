"""A tiny language model for the real llama-server: the llama architecture with random weights, about half a megabyte.

It says nonsense in English words, fast, for as long as it is asked to; the same seed writes the same file. Standard
library only, so that a bare machine can write it: ``python3 tinygguf.py FILE``. The format is GGUF 3, see ggml's
docs/gguf.md.
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

ALIGNMENT = 32
GGML_F32 = 0

# The values of a larger matrix repeat: a file of gigabytes takes seconds to write then.
_DIFFERENT_VALUES = 1 << 18


class ValueType(IntEnum):
    """GGUF's types of metadata values, as far as they are used here."""

    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    BYTE = 6


_PACKING = {ValueType.UINT32: "<I", ValueType.INT32: "<i", ValueType.FLOAT32: "<f", ValueType.BOOL: "<?"}

_WORDS = """
the a of and to in is it that was for on are with as at be this have from or had by but not what all were we
when your can said there use an each which she do how their if will up other about out many then them these so
some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part over new sound take only little
work know place year live me back give most very after thing our just name good sentence man think say great
where help through much before line right too mean old
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's dimensions."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    feed_forward: int = 128
    context: int = 4096


def write(path: Path, *, shape: Shape | None = None, seed: int = 1) -> None:
    """Writes the model to ``path``."""
    shape = shape or Shape()
    vocabulary = _vocabulary()
    metadata = _metadata(shape, vocabulary)
    tensors = _tensors(shape, vocabulary, random.Random(seed))

    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        head += _string(key) + struct.pack("<I", kind) + _value(kind, value)
    offset = 0
    for name, (dimensions, data) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", GGML_F32, offset)
        offset += _padded(len(data))
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for _, data in tensors.values():
            file.write(data.ljust(_padded(len(data)), b"\0"))


def _vocabulary() -> list[tuple[str, TokenType]]:
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    single = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    words = [(f"▁{word}", TokenType.NORMAL) for word in sorted(set(_WORDS.split()))]
    return special + single + words


def _metadata(shape: Shape, vocabulary: list[tuple[str, TokenType]]) -> dict[str, tuple[ValueType, object]]:
    return {
        "general.architecture": (ValueType.STRING, "llama"),
        "general.name": (ValueType.STRING, "tiny random llama"),
        "general.alignment": (ValueType.UINT32, ALIGNMENT),
        "llama.block_count": (ValueType.UINT32, shape.layers),
        "llama.context_length": (ValueType.UINT32, shape.context),
        "llama.embedding_length": (ValueType.UINT32, shape.width),
        "llama.feed_forward_length": (ValueType.UINT32, shape.feed_forward),
        "llama.attention.head_count": (ValueType.UINT32, shape.heads),
        "llama.attention.head_count_kv": (ValueType.UINT32, shape.heads),
        "llama.attention.layer_norm_rms_epsilon": (ValueType.FLOAT32, 1e-5),
        "llama.rope.dimension_count": (ValueType.UINT32, shape.width // shape.heads),
        "llama.vocab_size": (ValueType.UINT32, len(vocabulary)),
        "tokenizer.ggml.model": (ValueType.STRING, "llama"),
        "tokenizer.ggml.tokens": (ValueType.ARRAY, (ValueType.STRING, [text for text, _ in vocabulary])),
        "tokenizer.ggml.scores": (ValueType.ARRAY, (ValueType.FLOAT32, [-float(i) for i in range(len(vocabulary))])),
        "tokenizer.ggml.token_type": (ValueType.ARRAY, (ValueType.INT32, [kind.value for _, kind in vocabulary])),
        "tokenizer.ggml.unknown_token_id": (ValueType.UINT32, 0),
        "tokenizer.ggml.bos_token_id": (ValueType.UINT32, 1),
        "tokenizer.ggml.eos_token_id": (ValueType.UINT32, 2),
        "tokenizer.ggml.add_bos_token": (ValueType.BOOL, True),
        "tokenizer.chat_template": (ValueType.STRING, "{% for m in messages %}{{ m['content'] }} {% endfor %}"),
    }


def _tensors(
    shape: Shape, vocabulary: list[tuple[str, TokenType]], source: random.Random
) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Name → dimensions, the fastest varying first, and the values."""

    def matrix(columns: int, rows: int) -> tuple[tuple[int, ...], bytes]:
        # Uniform, for its speed; of the variance that keeps activations in range.
        bound = (3 / columns) ** 0.5
        count = columns * rows
        values = array("f", (source.uniform(-bound, bound) for _ in range(min(count, _DIFFERENT_VALUES))))
        whole = _little_endian(values) * -(-count // len(values))
        return (columns, rows), whole[: 4 * count]

    def head() -> tuple[tuple[int, ...], bytes]:
        # Tokens that are no words score 0, which is never among the best: it speaks in words, and never ends early.
        bound = (3 / shape.width) ** 0.5
        values = array("f")
        for _, kind in vocabulary:
            scale = bound if kind is TokenType.NORMAL else 0.0
            values.extend(source.uniform(-scale, scale) for _ in range(shape.width))
        return (shape.width, len(vocabulary)), _little_endian(values)

    ones = (shape.width,), _little_endian(array("f", [1.0]) * shape.width)
    tensors = {
        "token_embd.weight": matrix(shape.width, len(vocabulary)),
        "output_norm.weight": ones,
        "output.weight": head(),
    }
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = ones
        tensors[block + "ffn_norm.weight"] = ones
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}{part}.weight"] = matrix(shape.width, shape.width)
        tensors[block + "ffn_gate.weight"] = matrix(shape.width, shape.feed_forward)
        tensors[block + "ffn_up.weight"] = matrix(shape.width, shape.feed_forward)
        tensors[block + "ffn_down.weight"] = matrix(shape.feed_forward, shape.width)
    return tensors


def _value(kind: ValueType, value: object) -> bytes:
    if kind is ValueType.STRING:
        return _string(str(value))
    if kind is ValueType.ARRAY:
        assert isinstance(value, tuple)
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(_value(item_kind, item) for item in items)
    return struct.pack(_PACKING[kind], value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(length: int) -> int:
    return -length % ALIGNMENT + length


def _little_endian(values: array[float]) -> bytes:
    if sys.byteorder == "big":
        values = array("f", values)
        values.byteswap()
    return values.tobytes()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
