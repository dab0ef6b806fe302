"""What a model's files say about it to a person: its name, size, quantisation and context.

It reads headers only. The numbers that decide something come from ``estimate``; nothing here decides anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gpusvc.quantity import format_size
from gpusvc.weights import gguf, huggingface
from gpusvc.weights.layers import count_of

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


class FileKind(StrEnum):
    """What a path is to an engine."""

    GGUF = "gguf"
    PROJECTOR = "projector"  # the part of a model that sees or hears; not a model by itself
    ADAPTER = "adapter"
    SAFETENSORS = "safetensors"  # a directory as it is downloaded from Hugging Face


@dataclass(frozen=True, slots=True)
class Description:
    """A model's files. None: they do not say."""

    kind: FileKind
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


def describe(path: Path) -> Description | None:
    """Return what ``path`` is, or None if it is not a model's file or directory.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _of_directory(path)
    try:
        if not gguf.has_magic(path):
            return None
        return _of_gguf(path)
    except ValueError:
        return None


def ggufs_in(directory: Path) -> list[Path]:
    """Return the GGUF files of a directory that are models; of a split one, the first part."""
    found = sorted({gguf.first_part(file) for file in directory.glob("*.gguf") if file.is_file()})
    return [file for file in found if file.is_file() and _is_gguf_model(file)]


def projectors_in(directory: Path) -> list[Path]:
    """Return the GGUF files of a directory that are not models."""
    return sorted(file for file in directory.glob("*.gguf") if file.is_file() and not _is_gguf_model(file))


def quantisation_in(name: str) -> str | None:
    """Return the quantisation that the name of a GGUF file tells, such as ``Q4_K_M``; None if it tells none."""
    found = _IN_NAME.search(name.rpartition("/")[2].removesuffix(".gguf"))
    return None if found is None else found.group(1).upper()


def _is_gguf_model(file: Path) -> bool:
    try:
        found = describe(file)
    except OSError:
        return False
    return found is not None and found.kind is FileKind.GGUF


def _of_gguf(path: Path) -> Description:
    known = gguf.read_metadata(path)
    architecture = known.get("general.architecture")
    kind = FileKind.GGUF
    if known.get("general.type") == "mmproj" or architecture == "clip":
        kind = FileKind.PROJECTOR
    elif known.get("general.type") == "adapter":
        kind = FileKind.ADAPTER
    name = known.get("general.name") or known.get("general.basename")
    label = known.get("general.size_label")
    words = [str(word) for word in (name, label) if isinstance(word, str) and word.isprintable()]
    # Most names have the size in them.
    if len(words) == 2 and words[1].casefold() in words[0].casefold():
        del words[1]
    file_type = known.get("general.file_type")
    return Description(
        kind=kind,
        size_bytes=sum(part.stat().st_size for part in gguf.parts_of(path) if part.exists()),
        name=" ".join(words)
        or (architecture if isinstance(architecture, str) and architecture.isprintable() else None),
        quantisation=_FILE_TYPES.get(file_type) if isinstance(file_type, int) else quantisation_in(path.name),
        context=count_of(known.get(f"{architecture}.context_length")),
    )


def _of_directory(directory: Path) -> Description | None:
    files = list(directory.glob("*.safetensors"))
    if not files:
        return None
    config = huggingface.read_config(directory)
    inner = huggingface.text_config(config)
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    number = inner.get("torch_dtype") or inner.get("dtype") or config.get("torch_dtype")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return Description(
        kind=FileKind.SAFETENSORS,
        size_bytes=sum(file.stat().st_size for file in files),
        name=name if isinstance(name, str) and name.isprintable() else None,
        quantisation=next((word for word in (method, number) if isinstance(word, str) and word.isprintable()), None),
        context=count_of(inner.get("max_position_embeddings")),
    )
