"""The watchdog's last verdicts, as it leaves them for others to show; a file in /run that ends with the watchdog."""

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
    """What the watchdog thinks of a model, and where its knowledge comes from whether the model works."""

    kind: Finding
    source: Source | None


def file_of(paths: Paths) -> Path:
    return paths.runtime / "watchdog" / "verdicts.json"


def write(paths: Paths, verdicts: Iterable[Verdict]) -> None:
    """Whole or not at all; what cannot be written is logged, and missed by nobody but who looks."""
    target = file_of(paths)
    models = {verdict.model: {"kind": verdict.kind, "source": verdict.source} for verdict in verdicts}
    try:
        files.write(target, json.dumps({"version": VERSION, "models": models}) + "\n")
    except OSError as error:
        log(4, f"{target} cannot be written: {os.strerror(error.errno or 0)}.")


def read(paths: Paths) -> dict[str, LastVerdict]:
    """By model; empty where no watchdog runs, or its file makes no sense."""
    try:
        value = json.loads(files.read(file_of(paths)))
        return {
            str(model): LastVerdict(Finding(each["kind"]), Source(each["source"]) if each["source"] else None)
            for model, each in value["models"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
