"""What a model's files say of it to a person: which model it is, how large, how quantised, how long its context.

From headers only, as ``weights.py``, which has the numbers that decide; nothing here decides anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gpusvc.quantity import format_size
from gpusvc.weights import gguf

_HEADER_BYTES = 1 << 20

# llama.h, enum llama_ftype.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}
_IN_NAME = re.compile(
    r"(?<![A-Za-z0-9])((?:I?Q[1-8](?:_[0-9A-Z]+)*|BF16|F16|F32|MXFP4)(?:_[SMLX]+)?)(?![A-Za-z0-9])", re.IGNORECASE
)
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


class Kind(StrEnum):
    """What a path is, as far as an engine is concerned."""

    GGUF = "gguf"
    PROJECTOR = "projector"  # of a model that sees or hears; no model by itself
    ADAPTER = "adapter"
    SAFETENSORS = "safetensors"  # a directory as it is downloaded from Hugging Face


@dataclass(frozen=True, slots=True)
class About:
    """A model's files. None: they do not say."""

    kind: Kind
    size_bytes: int
    name: str | None = None
    quantisation: str | None = None
    context: int | None = None  # tokens that it was trained for

    def __str__(self) -> str:
        parts = [
            self.name or "A model",
            *([self.quantisation] if self.quantisation else []),
            format_size(self.size_bytes),
        ]
        trained = "" if self.context is None else f", made for a context of {self.context} tokens"
        return f"{', '.join(parts)}{trained}."


def look(path: Path) -> About | None:
    """What ``path`` is; None if it is no model's file or directory.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _of_directory(path)
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return None
    return _of_gguf(path)


def first_part(path: Path) -> Path:
    """The first file of a model that is split over several, which is the one that engines are given."""
    part = _PART.fullmatch(path.name)
    return path if part is None else path.with_name(f"{part.group(1)}-00001-of-{part.group(3)}.gguf")


def ggufs_in(directory: Path) -> list[Path]:
    """The GGUF files of a directory that are models, a split one once."""
    found = sorted({first_part(file) for file in directory.glob("*.gguf") if file.is_file()})
    return [file for file in found if file.is_file() and _is_gguf_model(file)]


def projectors_in(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.gguf") if file.is_file() and not _is_gguf_model(file))


def _is_gguf_model(file: Path) -> bool:
    try:
        about = look(file)
    except OSError:
        return False
    return about is not None and about.kind is Kind.GGUF


def _of_gguf(path: Path) -> About | None:
    try:
        known = gguf.read_metadata(path)
    except ValueError:
        return None
    architecture = known.get("general.architecture")
    kind = Kind.GGUF
    if known.get("general.type") == "mmproj" or architecture == "clip":
        kind = Kind.PROJECTOR
    elif known.get("general.type") == "adapter":
        kind = Kind.ADAPTER
    name = known.get("general.name") or known.get("general.basename")
    label = known.get("general.size_label")
    words = [str(word) for word in (name, label) if isinstance(word, str) and word.isprintable()]
    # Most names say the size already.
    if len(words) == 2 and words[1].casefold() in words[0].casefold():
        del words[1]
    file_type = known.get("general.file_type")
    in_name = _IN_NAME.search(path.stem)
    return About(
        kind=kind,
        size_bytes=_size_of(path),
        name=" ".join(words)
        or (architecture if isinstance(architecture, str) and architecture.isprintable() else None),
        quantisation=_FILE_TYPES.get(file_type) if isinstance(file_type, int) else in_name and in_name.group(1).upper(),
        context=_count(known.get(f"{architecture}.context_length")),
    )


def _size_of(path: Path) -> int:
    """Of all its parts."""
    part = _PART.fullmatch(path.name)
    files = [path] if part is None else path.parent.glob(f"{_escaped(part.group(1))}-?????-of-{part.group(3)}.gguf")
    return sum(file.stat().st_size for file in files)


def _escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _of_directory(directory: Path) -> About | None:
    files = list(directory.glob("*.safetensors"))
    if not files:
        return None
    config = _config_of(directory)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config  # of a model that also sees or hears
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    number = inner.get("torch_dtype") or inner.get("dtype") or config.get("torch_dtype")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return About(
        kind=Kind.SAFETENSORS,
        size_bytes=sum(file.stat().st_size for file in files),
        name=name if isinstance(name, str) and name.isprintable() else None,
        quantisation=next((word for word in (method, number) if isinstance(word, str) and word.isprintable()), None),
        context=_count(inner.get("max_position_embeddings")),
    )


def _config_of(directory: Path) -> Mapping[str, object]:
    try:
        with (directory / "config.json").open("rb") as stream:
            config = json.loads(stream.read(_HEADER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 32 else None
