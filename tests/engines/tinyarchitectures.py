"""Tiny models of many architectures for the real llama-server, to see what memory it takes. Their weights are zeros.

architectures.json has the metadata and the tensors of each: what Debian's llama-server asked for when they were absent.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engines import tinygguf
from tests.engines.tinygguf import ValueType

_TABLE = Path(__file__).with_name("architectures.json")

NAMES = tuple(json.loads(_TABLE.read_text()))


def write(path: Path, name: str) -> None:
    """Write a model of the architecture ``name`` to ``path``. The file is sparse."""
    entry = json.loads(_TABLE.read_text())[name]
    vocabulary = tinygguf._vocabulary()
    common = tinygguf._metadata(tinygguf.Shape(), vocabulary)
    metadata: dict[str, tuple[ValueType, object]] = {"general.architecture": (ValueType.STRING, name)}
    metadata |= {f"{name}.{key}": _typed(value) for key, value in entry["metadata"].items()}
    metadata |= {key: value for key, value in common.items() if key.startswith("tokenizer.")}
    tensors = list(_tensors(entry))

    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        head += tinygguf._string(key) + struct.pack("<I", kind) + tinygguf._value(kind, value)
    offset = 0
    for tensor, shape in tensors:
        head += tinygguf._string(tensor) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", tinygguf.GGML_F32, offset)
        offset += tinygguf._padded(4 * math.prod(shape))
    with path.open("wb") as file:
        file.write(head.ljust(tinygguf._padded(len(head)), b"\0"))
        file.truncate(file.tell() + offset)


def _tensors(entry: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    yield from entry["tensors"].items()
    for row in entry["of_layers"]:
        for layer in row["layers"]:
            yield f"blk.{layer}.{row['name']}", row["shape"]


def _typed(value: Any) -> tuple[ValueType, object]:
    if isinstance(value, list):
        return ValueType.ARRAY, (_typed(value[0])[0], value)
    kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
    return kinds[type(value)], value
