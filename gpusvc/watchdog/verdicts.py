"""The watchdog's last verdicts, in a file in /run for the command and the API. systemd removes it with the watchdog."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpusvc import files
from gpusvc.log import log
from gpusvc.paths import Paths
from gpusvc.watchdog.judge import Finding, Source, Verdict

VERSION = 1


@dataclass(frozen=True, slots=True)
class LastVerdict:
    """A verdict on a model, and the source that told whether the model works."""

    kind: Finding
    source: Source | None


def file_of(paths: Paths) -> Path:
    return paths.runtime / "watchdog" / "verdicts.json"


def write(paths: Paths, verdicts: Iterable[Verdict]) -> None:
    """Write the file, whole or not at all. An error is logged: the verdicts are only shown."""
    target = file_of(paths)
    models = {verdict.model: {"kind": verdict.kind, "source": verdict.source} for verdict in verdicts}
    try:
        files.write(target, json.dumps({"version": VERSION, "models": models}) + "\n")
    except OSError as error:
        log(4, f"{target} cannot be written: {os.strerror(error.errno or 0)}.")


def read(paths: Paths) -> dict[str, LastVerdict]:
    """Return the verdicts by model; empty if no watchdog runs, or its file cannot be read."""
    try:
        value = json.loads(files.read(file_of(paths)))
        return {
            str(model): LastVerdict(Finding(each["kind"]), Source(each["source"]) if each["source"] else None)
            for model, each in value["models"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
