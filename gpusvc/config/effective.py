"""The configuration in effect: the value of each setting, and the file that decides it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from gpusvc.config import toml
from gpusvc.config.files import load_host, load_model
from gpusvc.config.serving import Serving
from gpusvc.config.table import Table, read_table
from gpusvc.paths import Paths
from gpusvc.quantity import format_duration, parse_duration

DEFAULT = "default"

# The keys of a model whose defaults are the host's, and the keys that give them there.
INHERITED = {
    "release_timeout": "release_timeout",
    "idle_timeout": "watchdog.idle_timeout",
    "busy_timeout": "watchdog.busy_timeout",
    "busy_action": "watchdog.busy_action",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a configuration."""

    key: str  # dotted, as in "gpu.count"
    value: str | None  # as TOML, so that "key = value" may stand in a file; None: there is none
    source: str  # the file that says so, or DEFAULT


def effective(paths: Paths, name: str | None = None) -> list[Setting]:
    """Every setting of the host, or of a model.

    Of a model with a preset, ``command`` is what the preset makes of ``model`` and ``args``.

    Raises:
        UnknownModelError: there is no such model.
        ConfigError: a file cannot be right, so that nothing is in effect.
    """
    host = load_host(paths)
    host_table = _table(paths.host_file)
    if name is None:
        return [_setting(key, value, host_table) for key, value in _values(host)]
    model = load_model(paths, name, host)
    table = _table(paths.model_file(name))
    return [
        _setting(key, value, host_table, INHERITED[key])
        if key in INHERITED and not table.has(key)
        else _setting(key, value, table, "engine" if key == "command" and table.has("engine") else key)
        for key, value in _values(model)
        if key not in ("name", "caller")  # decided by no file of a model
    ]


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """The keys of a configuration, dotted, with their values as TOML; a key is its field's name without the unit."""
    for field in fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if isinstance(value, Serving):
            yield from _serving_values(value)
        elif is_dataclass(value):
            yield from _values(value, f"{key}.")
        elif key.endswith("_seconds"):
            yield key.removesuffix("_seconds"), toml.inline(_duration(value))
        elif key.endswith("_bytes"):
            yield key.removesuffix("_bytes"), None if value is None else toml.inline(_size(value))
        else:
            yield key, None if value is None else toml.inline(str(value) if isinstance(value, Path) else value)


def _serving_values(serving: Serving) -> Iterator[tuple[str, str | None]]:
    """Those that do not stand in ModelConfig itself; in the file they are not under one table."""
    for key, value in _values(serving):
        if key not in ("name", "description", "aliases"):
            yield f"filter.{key}" if key in ("strip", "set") else key, value


def _setting(key: str, value: str | None, table: Table, deciding: str | None = None) -> Setting:
    """``deciding`` is the key that decides the value, if it is another."""
    owner, _, last = (deciding or key).rpartition(".")
    is_given = (table.table(owner) if owner else table).has(last)
    return Setting(key, value, str(table.file) if is_given else DEFAULT)


def _table(file: Path) -> Table:
    try:
        return read_table(file)
    except FileNotFoundError:
        return Table(file, {})


def _duration(seconds: float) -> str:
    """To the microsecond, unlike ``format_duration()``."""
    text = format_duration(seconds)
    return text if parse_duration(text) == seconds else f"{seconds:.6f}s"


def _size(size: int) -> str:
    """Exact, unlike ``format_size()``."""
    units = ["", "KiB", "MiB", "GiB"]
    while len(units) > 1 and size and size % 1024 == 0:
        size //= 1024
        units.pop(0)
    return f"{size}{units[0]}"
