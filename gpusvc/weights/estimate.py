"""A first guess at a model's VRAM, from the files that its command names; a run that was seen knows better.

It reads headers, never weights, and no more than a megabyte of any file; what makes no sense gives no guess.

The guess is the least that the engine needs. Too low, and the engine runs out of memory once and is learned from; too
high, and a model that fits is refused for ever. So a context that the command does not ask for counts as a short one,
to which engines fall back (llama.cpp's --fit), and where layers may stay in RAM in a way that is not plain, there is
no guess.

Formats: gguf.py; safetensors' README; Hugging Face's config.json.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gpusvc.quantity import MIB, format_size
from gpusvc.record import Record
from gpusvc.weights import gguf

_HEADER_BYTES = 1 * MIB

# Buffers of a graph, and what the driver takes for a context.
_WORK_BYTES = 512 * MIB

_SHORT_CONTEXT = 4096

# Whatever says more is no file of a model.
_MAX_COUNT = 1 << 32
_MAX_LAYERS = 1 << 14
_MAX_BYTES = 1 << 46

_MODEL = ("-m", "--model", "--model-path")
_CONTEXT = ("-c", "--ctx-size", "--max-model-len", "--context-length")
_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
_CACHE_K = ("-ctk", "--cache-type-k")
_CACHE_V = ("-ctv", "--cache-type-v")
_KEEPS_CACHE_IN_RAM = {"-nkvo", "--no-kv-offload"}
_KEEPS_PARTS_IN_RAM = {"-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-ot", "--override-tensor", "--cpu-offload-gb"}

# llama-server takes these from the environment too.
_VARIABLES = {
    _MODEL: "LLAMA_ARG_MODEL",
    _CONTEXT: "LLAMA_ARG_CTX_SIZE",
    _LAYERS: "LLAMA_ARG_N_GPU_LAYERS",
    _CACHE_K: "LLAMA_ARG_CACHE_TYPE_K",
    _CACHE_V: "LLAMA_ARG_CACHE_TYPE_V",
}

# Bytes for each number of the cache: a block of 32 has its scale beside it.
_F16_BYTES = 2.0
_CACHE_BYTES = {
    "f32": 4.0,
    "f16": _F16_BYTES,
    "bf16": _F16_BYTES,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

_SPLIT = re.compile(r"(.+)-00001-of-([0-9]{5})\.gguf")


class Estimate(Record):
    """Bytes of VRAM, on all GPUs of the model together, and in a sentence how they come about."""

    bytes: int
    reason: str


class _Shape(Record):
    """What decides the size of a model's cache: numbers for each token of context, all layers together."""

    layers: int
    context: int
    keys: int
    values: int


class _Command(Record):
    """An engine's command and environment, as questions are put to it."""

    arguments: Sequence[str]
    env: Mapping[str, str]

    def has_any(self, names: Collection[str]) -> bool:
        return any(argument.partition("=")[0] in names for argument in self.arguments)

    def option(self, names: tuple[str, ...]) -> str | None:
        """The value of an option, as ``NAME VALUE`` or ``NAME=VALUE``; the last one counts."""
        found = self.env.get(_VARIABLES[names])
        for argument, following in zip(self.arguments, [*self.arguments[1:], None], strict=True):
            name, equals, value = argument.partition("=")
            if name in names:
                found = value if equals else following
        return found

    def files(self) -> list[Path]:
        """The files and directories that may be a model, the one that is called so first."""
        model = self.option(_MODEL)
        values = [model] if model else []
        values += [word.partition("=")[2] if word.startswith("-") else word for word in self.arguments[1:]]
        return [Path(text) for text in dict.fromkeys(values) if text.startswith("/") and os.path.lexists(text)]

    def tokens(self, longest: int) -> int:
        """Of context; 0 asks for all that the model knows."""
        asked = self.option(_CONTEXT) or ""
        if asked == "0":
            return longest
        return min(int(asked), _MAX_COUNT) if asked.isdecimal() else min(longest, _SHORT_CONTEXT)

    def share_of_layers(self, layers: int) -> float:
        """How much of a model is in VRAM; all unless the command says otherwise. The output counts as a layer."""
        asked = self.option(_LAYERS) or ""
        return min(int(asked), layers + 1) / (layers + 1) if asked.isdecimal() else 1.0

    def bytes_per_token(self, shape: _Shape) -> float:
        if self.has_any(_KEEPS_CACHE_IN_RAM):
            return 0.0
        sizes = (_CACHE_BYTES.get(self.option(names) or "", _F16_BYTES) for names in (_CACHE_K, _CACHE_V))
        return sum(count * size for count, size in zip((shape.keys, shape.values), sizes, strict=True))


def estimate(command: Sequence[str], env: Mapping[str, str]) -> Estimate | None:
    """What the files that ``command`` names suggest; None: nothing.

    Args:
        command: of the engine, with absolute paths.
        env: what its configuration adds to its environment.
    """
    asked = _Command(command, env)
    if asked.has_any(_KEEPS_PARTS_IN_RAM):
        return None
    try:
        files = asked.files()
        ggufs = [file for file in files if file.suffix == ".gguf"]
        if ggufs:
            return _of_gguf(ggufs, asked)
        return next(filter(None, (_of_safetensors(file, asked) for file in files)), None)
    except (OSError, ValueError):
        return None


def _estimate(weights: float, cache: float, note: str) -> Estimate | None:
    total = round(weights + cache) + _WORK_BYTES
    if not 0 < total < _MAX_BYTES:
        return None
    parts = f"{format_size(round(weights))} of weights, {format_size(round(cache))} of {note}"
    return Estimate(total, f"{parts}, and {format_size(_WORK_BYTES)} to work with.")


def _of_gguf(files: Sequence[Path], asked: _Command) -> Estimate | None:
    """Of the model, which comes first, and of what stands beside it: a projector, a draft model."""
    main, *beside = [sum(part.stat().st_size for part in _parts(file)) for file in files]
    shape = _gguf_shape(files[0])
    if shape is None:
        share = asked.share_of_layers(0)
        return _estimate((main * share + sum(beside)) * 1.1, 0.0, "context, which its header does not tell")
    share = asked.share_of_layers(shape.layers)
    tokens = asked.tokens(shape.context)
    cache = tokens * asked.bytes_per_token(shape) * share
    return _estimate((main * share + sum(beside)) * 1.05, cache, f"cache for {tokens} tokens")


def _parts(file: Path) -> list[Path]:
    """All files of a model that is split over several, given the first."""
    split = _SPLIT.fullmatch(file.name)
    if split is None:
        return [file]
    stem, count = split.groups()
    return [file.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def _gguf_shape(file: Path) -> _Shape | None:
    """Out of a GGUF's header; None if that does not tell. Raises ValueError if it is none."""
    try:
        known = gguf.read_metadata(file)
    except PermissionError:
        return None  # the engine's user may well read it
    values = {key.removeprefix(f"{known.get('general.architecture')}."): value for key, value in known.items()}
    layers, context = _count(values.get("block_count")), _count(values.get("context_length"))
    width, heads = _count(values.get("embedding_length")), _count(values.get("attention.head_count"))
    cached = values.get("attention.head_count_kv", heads)
    # A list has a number for each layer, 0 where a layer has no attention.
    of_layers = cached if isinstance(cached, list) else [cached] * min(layers or 0, _MAX_LAYERS)
    total = sum(count for count in map(_count, of_layers) if count is not None)
    one = width // heads if width is not None and heads is not None else None
    key = _count(values.get("attention.key_length")) or one
    value = _count(values.get("attention.value_length")) or one
    if layers is None or context is None or cached is None or key is None or value is None:
        return None
    return _Shape(layers, context, total * key, total * value)


def _of_safetensors(path: Path, asked: _Command) -> Estimate | None:
    """Of a file, or of a directory as it is downloaded from Hugging Face; None if it is neither."""
    if path.is_dir():
        files = list(path.glob("*.safetensors"))
        # Some carry the same weights a second time, in one piece.
        files = [file for file in files if file.name.startswith("model")] or files
    else:
        files = [path] if path.suffix == ".safetensors" else []
    if not files or not all(map(_is_safetensors, files)):
        return None
    weights = sum(file.stat().st_size for file in files) * 1.1
    shape = _hugging_face_shape(path / "config.json") if path.is_dir() else None
    if shape is None:
        return _estimate(weights, 0.0, "context, which its files do not tell")
    tokens = asked.tokens(shape.context)
    return _estimate(weights, tokens * asked.bytes_per_token(shape), f"cache for {tokens} tokens")


def _is_safetensors(file: Path) -> bool:
    """Eight bytes of length, then a JSON object."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except PermissionError:
        return True
    return len(head) == 9 and head[8:] == b"{" and struct.unpack_from("<Q", head)[0] <= file.stat().st_size - 8


def _hugging_face_shape(file: Path) -> _Shape | None:
    try:
        with file.open("rb") as stream:
            config = json.loads(stream.read(_HEADER_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a model that also sees or hears

    if not isinstance(config, dict):
        return None
    layers, context = _count(config.get("num_hidden_layers")), _count(config.get("max_position_embeddings"))
    width, heads = _count(config.get("hidden_size")), _count(config.get("num_attention_heads"))
    cached = _count(config.get("num_key_value_heads")) or heads
    one = _count(config.get("head_dim")) or (width // heads if width is not None and heads is not None else None)
    if layers is None or context is None or cached is None or one is None:
        return None
    return _Shape(layers, context, layers * cached * one, layers * cached * one)


def _count(value: object) -> int | None:
    """A number that a model could have of anything; None for all else."""
    return value if type(value) is int and 0 < value < _MAX_COUNT else None
