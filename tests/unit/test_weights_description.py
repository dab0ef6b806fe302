"""What a model's files say of it to a person."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from gpusvc.weights import gguf
from gpusvc.weights.description import Description, FileKind, describe, ggufs_in
from tests.engines import tinygguf


def write_gguf(file: Path, **values: str | int) -> Path:
    """A head of GGUF with these values, dots written as double underscores, and no tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for name, value in values.items():
        key = name.replace("__", ".").encode()
        head += struct.pack("<Q", len(key)) + key
        if isinstance(value, str):
            head += struct.pack("<IQ", 8, len(value.encode())) + value.encode()
        else:
            head += struct.pack("<II", 4, value)
    file.write_bytes(head)
    return file


def test_a_gguf_says_which_model_it_is(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tinygguf.write(file)
    found = describe(file)
    assert found == Description(FileKind.GGUF, file.stat().st_size, "tiny random llama", None, 4096)
    assert str(found) == "tiny random llama, 526.3 KiB, made for a context of 4096 tokens."


def test_its_quantisation_is_in_its_header_or_else_in_its_name(tmp_path: Path) -> None:
    said = write_gguf(tmp_path / "a-Q8_0.gguf", general__architecture="llama", general__file_type=15)
    named = write_gguf(tmp_path / "Model-8B.q4_k_m.gguf", general__architecture="llama")
    neither = write_gguf(tmp_path / "IQuest.gguf", general__architecture="llama")
    looked = [describe(file) for file in (said, named, neither)]
    assert [found and found.quantisation for found in looked] == ["Q4_K_M", "Q4_K_M", None]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"general__architecture": "clip"}, FileKind.PROJECTOR),
        ({"general__architecture": "qwen", "general__type": "mmproj"}, FileKind.PROJECTOR),
        ({"general__architecture": "llama", "general__type": "adapter"}, FileKind.ADAPTER),
        ({"general__architecture": "llama", "general__type": "model"}, FileKind.GGUF),
    ],
)
def test_what_goes_with_a_model_is_none(tmp_path: Path, values: dict[str, str], kind: FileKind) -> None:
    found = describe(write_gguf(tmp_path / "x.gguf", **values))
    assert found is not None
    assert found.kind is kind


def test_a_split_model_is_one_and_as_large_as_its_parts(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "big-00001-of-00002.gguf", general__architecture="llama")
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(b"GGUF" + bytes(996))
    found = describe(first)
    assert found is not None
    assert found.size_bytes == first.stat().st_size + 1000
    assert gguf.first_part(tmp_path / "big-00002-of-00002.gguf") == first
    assert ggufs_in(tmp_path) == [first]


def test_a_directory_of_safetensors_says_it_in_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    config = {
        "architectures": ["SomeForCausalLM"],
        "quantization_config": {"quant_method": "awq"},
        "text_config": {"max_position_embeddings": 40960},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path) == Description(FileKind.SAFETENSORS, 100, "SomeForCausalLM", "awq", 40960)


@pytest.mark.parametrize("config", ["", "[]", '{"architectures": 3, "text_config": 1, "quantization_config": []}'])
def test_a_configuration_that_makes_no_sense_says_nothing(tmp_path: Path, config: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "config.json").write_text(config)
    assert describe(tmp_path) == Description(FileKind.SAFETENSORS, 100)


def test_a_file_that_would_block_a_reader_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    assert describe(tmp_path / "m.gguf") is None
    assert describe(Path("/dev/zero")) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "config.json")
    assert describe(tmp_path) == Description(FileKind.SAFETENSORS, 100)


@pytest.mark.parametrize("content", [b"", b"GGU", b"#!/bin/sh", b"GGUF", b"GGUF" + bytes(100)])
def test_what_is_no_model_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    assert describe(file) is None
    assert describe(tmp_path) is None
