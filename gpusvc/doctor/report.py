"""The report of `gpusvc doctor --report`: what a maintainer needs to know of a machine, and no secret.

It has no value of a variable, no argument of a command, no key, no address of a client and no line of a log, as any of
these may be secret. The names of models, users and hosts are left out too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpusvc import __version__
from gpusvc.config.files import load_host, load_sound_model, model_names
from gpusvc.errors import GpusvcError
from gpusvc.names import of_service
from gpusvc.quantity import format_amount
from gpusvc.state import hung
from gpusvc.systemd.manager import Manager

if TYPE_CHECKING:
    from gpusvc.doctor.finding import Finding
    from gpusvc.gpu.reading import Gpu
    from gpusvc.paths import Paths

# What findings say of other subjects may quote files, commands and names.
_QUOTED = frozenset(
    {"systemd", "cgroups", "driver", "gpus", "nodes", "persistence", "isolation", "clock", "journal", "units", "polkit"}
)

_UNITS = ("gpusvc-*.service", "gpusvc-*.socket", "gpusvc-*.path", "model@*.service", "nvidia-*.service")


def compose(paths: Paths, findings: Iterable[Finding], gpus: Sequence[Gpu]) -> str:
    """Return the report, as Markdown."""
    models = {name: f"model {number}" for number, name in enumerate(model_names(paths), 1)}
    words = _secret_words(paths, models)
    parts = {
        "Machine": _machine(),
        "Findings": [_hidden(finding.to_json(), words) for finding in findings],
        "GPUs": [_gpu(gpu) for gpu in gpus],
        "GPUs that hang": [{"index": each.index} for each in hung.read(paths)],
        "Models": [_model(paths, name, models[name]) for name in models],
        "Units": _units(models),
    }
    lines = ["# Report of gpusvc doctor", "", "Without names of models and users, arguments, variables and logs."]
    for title, value in parts.items():
        lines += ["", f"## {title}", "", "```json", json.dumps(value, indent=1, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, Any]:
    release = platform.freedesktop_os_release()
    found = {
        "gpusvc": __version__,
        "python": platform.python_version(),
        "system": release.get("PRETTY_NAME", "unknown"),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "container": Path("/run/systemd/container").exists(),
        "driver": _text(Path("/sys/module/nvidia/version")),
        "nodes": sorted(node.name for node in Path("/dev").glob("nvidia*")),
    }
    try:
        with Manager() as manager:
            found["systemd"] = manager.version()
    except GpusvcError as error:
        found["systemd"] = error.message
    return found


def _gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "minor": gpu.minor,
        "name": gpu.name,
        "total": format_amount(gpu.total_bytes),
        "used": format_amount(gpu.used_bytes),
        "free": format_amount(gpu.free_bytes),
        "processes": None if gpu.processes is None else len(gpu.processes),
        "mig": gpu.mig,
        "problem": gpu.problem,
    }


def _model(paths: Paths, name: str, title: str) -> dict[str, Any]:
    try:
        config = load_sound_model(paths, name, load_host(paths))
    except GpusvcError:
        config = None
    if config is None:
        return {"model": title, "configuration": "cannot be read"}
    return {
        "model": title,
        "engine": config.engine or os.path.basename(config.command[0]),  # noqa: PTH119  the name as given
        "count": config.gpu.count,
        "vram": format_amount(config.gpu.vram_bytes),
        "devices": len(config.gpu.devices),
        "device_ids": config.gpu.device_ids,
        "env": len(config.env),
        "scope": sorted(config.scope),
    }


def _units(models: dict[str, str]) -> list[dict[str, str]] | str:
    try:
        with Manager() as manager:
            units = manager.units(*_UNITS)
    except GpusvcError as error:
        return error.message
    known = {f"model@{name}.service": title for name, title in models.items()}

    def title(unit: str) -> str:
        # A unit may outlive its model's file, and has its name.
        return known.get(unit, unit if of_service(unit) is None else "model without a file")

    return [{"unit": title(unit.name), "state": f"{unit.active} ({unit.sub})"} for unit in units]


def _secret_words(paths: Paths, models: dict[str, str]) -> dict[str, str]:
    """Return what findings may name and the report must not, with what stands there instead."""
    words = {platform.node(): "HOST", str(Path.home()): "HOME", str(paths.config): "CONFIGURATION"}
    return {**models, **{word: instead for word, instead in words.items() if len(word) > 1}}


def _hidden(finding: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
    def without(text: Any) -> Any:
        if isinstance(text, str):
            for word in sorted(words, key=len, reverse=True):
                text = text.replace(word, words[word])
        return text

    if finding["subject"] not in _QUOTED:
        return {"subject": finding["subject"], "level": finding["level"]}
    return {key: without(value) for key, value in finding.items()}


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
