"""Learned footprints: the most VRAM that a model was seen to take on one GPU, kept across reboots.

One file for each model, with a peak for each configuration (its digest) and type of GPU. If a file or an update to it
is lost, the next run learns it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpusvc import files
from gpusvc.log import log
from gpusvc.paths import Paths

VERSION = 1

# Stands for host memory in place of a GPU's type.
HOST_MEMORY = "host memory"

# How many configurations of a model are remembered: the newest ones.
MAX_DIGESTS = 8

# Larger than any file that gpusvc writes.
_MAX_FILE_BYTES = 256 * 1024

Peaks = Mapping[str, Mapping[str, int]]
"""Digest of the configuration → name of the GPU → bytes; the digest that was learned last comes last."""


def learned(paths: Paths, name: str, digest: str, gpu_name: str) -> int | None:
    """Return the most bytes that ``name`` was seen to take on one GPU of this type; None: never seen."""
    return peaks(paths, name, digest).get(gpu_name)


def peaks(paths: Paths, name: str, digest: str) -> Mapping[str, int]:
    """Return the most bytes that ``name`` was seen to take on one GPU, by the type of the GPU."""
    try:
        return _read(_file(paths, name)).get(digest, {})
    except (OSError, ValueError):
        return {}


def learn(paths: Paths, name: str, digest: str, gpu_name: str, size_bytes: int) -> None:
    """Store ``size_bytes`` if it is more than ``name`` was seen to take before. A failure to store it is logged."""
    file = _file(paths, name)
    try:
        peaks = _known(file)
        raised = with_peak(peaks, digest, gpu_name, size_bytes)
        if raised != peaks:
            _write(file, raised)
    except OSError as error:
        log(4, f"The VRAM that {name} takes of {gpu_name} cannot be stored in {file}: {os.strerror(error.errno or 0)}.")


def with_peak(peaks: Peaks, digest: str, gpu_name: str, size_bytes: int) -> Peaks:
    """Return ``peaks`` with one more reading."""
    own = peaks.get(digest, {})
    if size_bytes <= own.get(gpu_name, 0):
        return peaks
    others = [(other, known) for other, known in peaks.items() if other != digest]
    return dict([*others[-(MAX_DIGESTS - 1) :], (digest, {**own, gpu_name: size_bytes})])


def to_json(peaks: Peaks) -> dict[str, Any]:
    return {"version": VERSION, "peaks": peaks}


def from_json(value: object) -> Peaks:
    """The inverse of to_json(); raises ValueError for anything else."""
    match value:
        case {"version": 1, "peaks": dict(peaks)} if all(map(_are_sizes, peaks.values())):
            return peaks
    raise ValueError("It is no file of footprints.")


def _are_sizes(value: object) -> bool:
    return isinstance(value, dict) and all(type(size) is int and 0 < size < 2**63 for size in value.values())


def _file(paths: Paths, name: str) -> Path:
    return paths.state / "footprints" / f"{name}.json"


def _read(file: Path) -> Peaks:
    """Return the peaks in ``file``. Raises OSError, or ValueError if its contents are invalid."""
    text = files.read(file, limit_bytes=_MAX_FILE_BYTES)
    try:
        return from_json(json.loads(text))
    except RecursionError as error:
        raise ValueError("It is nested too deeply.") from error


def _known(file: Path) -> Peaks:
    """Return what was learned so far. A file with invalid contents is renamed, so that a person can inspect it."""
    try:
        return _read(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        aside = file.with_suffix(".broken")
        file.replace(aside)
        log(4, f"{file} cannot be read ({error}) and is set aside as {aside.name}: its model is learned anew.")
        return {}


def _write(file: Path, peaks: Peaks) -> None:
    files.make_directory(file.parent)
    files.write(file, json.dumps(to_json(peaks)) + "\n")
