"""Which files of a repository make the model that a person asked for. Pure: a listing in, a selection out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gpusvc.errors import UsageError
from gpusvc.hub.reference import safe_path
from gpusvc.quantity import format_size
from gpusvc.weights import gguf
from gpusvc.weights.description import quantisation_in

# What people take if they do not choose: the best of the small ones, as llama.cpp's own download does.
_USUAL = ("Q4_K_M", "Q4_K_XL", "MXFP4", "Q4_K_S", "Q5_K_M", "Q4_0", "Q8_0")

# A projector is small, and its precision is heard and seen.
_PROJECTORS = ("F16", "BF16", "Q8_0", "F32")

# Beside the weights, what an engine reads of a directory: configuration, tokenizer, templates.
_BESIDE_WEIGHTS = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken|py)")
_NO_MODEL = re.compile(r"(?:^|[-_./])(imatrix|mmproj)", re.IGNORECASE)


class RemoteFile(NamedTuple):
    """A file of a repository. The digests are in hexadecimal. None: the hub does not tell."""

    path: str
    size_bytes: int | None
    sha256: str | None = None
    git_sha1: str | None = None


class Selection(NamedTuple):
    """The files of a model."""

    files: tuple[RemoteFile, ...]
    main: str
    """The path of the file that an engine is given; empty: the directory."""

    @property
    def bytes(self) -> int:
        return sum(file.size_bytes or 0 for file in self.files)


class _Variant(NamedTuple):
    """One GGUF model, in one file or several."""

    first: str
    files: tuple[RemoteFile, ...]

    @property
    def quantisation(self) -> str | None:
        return quantisation_in(self.first)

    def is_tagged(self, tag: str) -> bool:
        pattern = rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])"
        return re.search(pattern, self.first.removesuffix(".gguf"), re.IGNORECASE) is not None


def select(listing: Iterable[RemoteFile], *, tag: str | None = None, path: str | None = None) -> Selection:
    """Return the files of the model: those of one quantisation with their projector, or a directory of safetensors.

    Raises:
        UsageError: the repository has no such file or quantisation, or no model at all. The hint lists what it has.
    """
    files = {file.path: file for file in listing if safe_path(file.path)}
    variants = _variants(files)
    if path is not None:
        return _one_file(files, variants, path)
    if variants:
        variant = _tagged(variants, tag) if tag is not None else _usual(variants)
        return Selection((*variant.files, *_projector(files, variant)), variant.first)
    if tag is not None:
        raise UsageError(f"There are no GGUF files, so no {tag}.", hint="Leave the quantisation out.")
    return _directory(files)


def _variants(files: dict[str, RemoteFile]) -> list[_Variant]:
    firsts = dict.fromkeys(_first(path) for path in files if path.endswith(".gguf") and not _NO_MODEL.search(path))
    found = []
    for first in firsts:
        parts = [_beside(first, part.name) for part in gguf.parts_of(Path(first))]
        if all(part in files for part in parts):
            found.append(_Variant(first, tuple(files[part] for part in parts)))
    return found


def _one_file(files: dict[str, RemoteFile], variants: Sequence[_Variant], path: str) -> Selection:
    variant = next((each for each in variants if each.first == _first(path)), None)
    if variant is not None:
        return Selection((*variant.files, *_projector(files, variant)), variant.first)
    if path in files:
        return Selection((files[path],), path)
    known = ", ".join(sorted(file for file in files if file.endswith((".gguf", ".safetensors")))[:20])
    raise UsageError(f"There is no file {path}.", hint=f"There are: {known}." if known else None)


def _tagged(variants: Sequence[_Variant], tag: str) -> _Variant:
    found = [variant for variant in variants if variant.is_tagged(tag)]
    if not found:
        raise UsageError(f"There is no {tag}.", hint=_choice(variants))
    return min(found, key=lambda variant: (len(variant.first), variant.first))


def _usual(variants: Sequence[_Variant]) -> _Variant:
    if len(variants) == 1:
        return variants[0]
    for tag in _USUAL:
        found = [variant for variant in variants if variant.is_tagged(tag)]
        if found:
            return min(found, key=lambda variant: (len(variant.first), variant.first))
    raise UsageError("There are several models, and none of the usual quantisations.", hint=_choice(variants))


def _choice(variants: Sequence[_Variant]) -> str:
    """Return the hint that lists the quantisations with their sizes."""
    words = []
    for variant in sorted(variants, key=lambda each: sum(file.size_bytes or 0 for file in each.files)):
        size = sum(file.size_bytes or 0 for file in variant.files)
        words.append(f"{variant.quantisation or PurePosixPath(variant.first).name} ({format_size(size)})")
    return f"There are: {', '.join(words)}."


def _projector(files: dict[str, RemoteFile], variant: _Variant) -> tuple[RemoteFile, ...]:
    """Return the file by which a model sees or hears, if the repository has one."""
    found = [file for path, file in files.items() if path.endswith(".gguf") and "mmproj" in path.casefold()]
    beside = [file for file in found if PurePosixPath(file.path).parent == PurePosixPath(variant.first).parent]
    candidates = beside or found

    def order(file: RemoteFile) -> tuple[int, str]:
        kind = quantisation_in(file.path)
        return (_PROJECTORS.index(kind) if kind in _PROJECTORS else len(_PROJECTORS), file.path)

    return tuple(sorted(candidates, key=order)[:1])


def _directory(files: dict[str, RemoteFile]) -> Selection:
    weights = [path for path in files if "/" not in path and path.endswith(".safetensors")]
    # Some repositories have the same weights a second time, in the form of the maker's own code.
    others = [path for path in weights if not path.startswith("consolidated")]
    weights = others or weights
    if not weights or "config.json" not in files:
        raise UsageError("There is no model in GGUF or safetensors files.", hint="Is it the right repository?")
    beside = [path for path in files if _BESIDE_WEIGHTS.fullmatch(path)]
    return Selection(tuple(files[path] for path in sorted([*weights, *beside])), "")


def _first(path: str) -> str:
    return _beside(path, gguf.first_part(Path(path)).name)


def _beside(path: str, name: str) -> str:
    parent, slash, _ = path.rpartition("/")
    return f"{parent}{slash}{name}"
