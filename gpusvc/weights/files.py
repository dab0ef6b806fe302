"""Which files an engine reads its weights from: those that its command names, with their further parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpusvc.weights import gguf
from gpusvc.weights.command import EngineCommand, option

# Engines that read past the page cache: llama.cpp's --direct-io, and vLLM's loaders that stream or use GPUDirect.
_DIRECT_IO = option("-dio --direct-io", "LLAMA_ARG_DIO")
_LOAD_FORMAT = option("--load-format")
_DIRECT_FORMATS = frozenset({"runai_streamer", "runai_streamer_sharded", "fastsafetensors", "dummy"})


def weight_files(command: Sequence[str], env: Mapping[str, str]) -> list[Path]:
    """Return the files with weights that the command names, in the order in which engines read them.

    Empty if there are none, or if the engine reads past the page cache. It opens files, to know GGUF by its content.
    """
    asked = EngineCommand(command, env)
    if asked.flag(_DIRECT_IO) or asked.value(_LOAD_FORMAT) in _DIRECT_FORMATS:
        return []
    return list(dict.fromkeys(file for path in asked.paths(()) for file in _files_of(path)))


def _files_of(path: Path) -> Iterator[Path]:
    try:
        if path.is_dir():
            # Names of safetensors sort as their index lists them: model-00001-of-00004.safetensors.
            yield from sorted(path.glob("*.safetensors"))
        elif path.suffix == ".safetensors":
            yield path
        elif gguf.is_gguf(path):
            yield from (part for part in gguf.parts_of(path) if part.is_file())
    except OSError:
        return
