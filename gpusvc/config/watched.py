"""The configuration for a daemon: files are read again when they change. An invalid file keeps its last valid version.

Each call costs a stat(2) per file. Not for several threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from gpusvc import files, names
from gpusvc.config.files import HostConfig, InvalidFileError, ModelConfig, load_host, load_model
from gpusvc.config.serving import Serving, load_serving
from gpusvc.errors import UnknownModelError
from gpusvc.files import Stamp
from gpusvc.paths import Paths

Value = TypeVar("Value")

# An editor may still write, or have moved the old file away; and two changes may have the same time, as the kernel's
# clock ticks every 10 ms at most. After this time a file counts as complete.
SETTLED_SECONDS = 0.1

# An invalid file is read again: the cause may be that this process had no descriptor left.
RETRY_SECONDS = 10.0

_ABSENT = Stamp(0, 0, 0, 0, 0)


@dataclass(slots=True)
class _Kept(Generic[Value]):
    """The state of one file."""

    file: Path
    value: Value | None = None  # the last valid one
    stamp: Stamp | None = None  # of the version that was read last; None: read it in any case
    read_at: float = 0.0
    complaint: str | None = None  # the problem that was reported last


class Watched:
    """The last valid configuration of the host and of each model.

    ``report`` is called once for each problem, and again only after the file was valid or had another problem.
    ``now`` returns the time of the file system's clock, in seconds since 1970.
    """

    def __init__(
        self, paths: Paths, report: Callable[[InvalidFileError], None], *, now: Callable[[], float] = time.time
    ) -> None:
        self._paths = paths
        self._report = report
        self._now = now
        self._host: _Kept[HostConfig] = _Kept(paths.host_file)
        self._models: dict[str, _Kept[ModelConfig]] = {}
        self._servings: dict[str, _Kept[Serving]] = {}
        self._models_host: HostConfig | None = None  # the policy that the models were read with

    def host(self) -> HostConfig | None:
        """Return the host's policy; None if the file was never valid, so that the policy is unknown."""
        return self._look(self._host, partial(load_host, self._paths))

    def model(self, name: str) -> ModelConfig | None:
        """Return a model's configuration; None if there is no file, or it or the host's was never valid."""
        return self._model(name, self.host())

    def models(self, names: Iterable[str]) -> dict[str, ModelConfig | None]:
        """Return the configurations of several models. The host's file is checked only once."""
        host = self.host()
        return {name: self._model(name, host) for name in names}

    def serving(self, name: str) -> Serving | None:
        """Return how a model is offered to clients; None if there is no file. The host's file is not needed.

        A model whose file was never valid has the defaults: its start reports the problem.
        """
        kept = self._kept(self._servings, name)
        if kept is None:
            return None
        try:
            return self._look(kept, partial(load_serving, self._paths, name)) or Serving(name, description=name)
        except UnknownModelError:
            del self._servings[name]
            return None

    def reread(self) -> None:
        """Have every file read at its next use, changed or not, and its problems reported again."""
        self._host.stamp = self._host.complaint = None
        for model in self._models.values():
            model.stamp = model.complaint = None
        for serving in self._servings.values():
            serving.stamp = serving.complaint = None

    def _model(self, name: str, host: HostConfig | None) -> ModelConfig | None:
        if host is None:
            return None
        if host is not self._models_host:
            self._models_host = host
            for each in self._models.values():
                each.stamp = None
        kept = self._kept(self._models, name)
        if kept is None:
            return None
        try:
            return self._look(kept, partial(load_model, self._paths, name, host))
        except UnknownModelError:
            del self._models[name]
            return None

    def _kept(self, models: dict[str, _Kept[Value]], name: str) -> _Kept[Value] | None:
        """Return the state of a model's file; None if there is no file."""
        kept = models.get(name)
        if kept is None and names.is_name(name):
            file = self._paths.model_file(name)
            # Nothing is stored for a missing file: a client may make up any number of names.
            if os.path.lexists(file):
                kept = models[name] = _Kept(file)
        return kept

    def _look(self, kept: _Kept[Value], load: Callable[[], Value]) -> Value | None:
        now = self._now()
        stamp, changed_at = _look_at(kept.file)
        is_settled = abs(now - changed_at) >= SETTLED_SECONDS  # a time in the future is a clock that was set back
        is_due = kept.complaint is not None and abs(now - kept.read_at) >= RETRY_SECONDS
        if (stamp == kept.stamp and not is_due) or (kept.value is not None and not is_settled):
            return kept.value
        try:
            value = load()
        except InvalidFileError as error:
            if str(error) != kept.complaint:
                kept.complaint = str(error)
                self._report(error)
        else:
            kept.complaint = None
            if value != kept.value:  # one that means the same stays the same object
                kept.value = value
        kept.read_at = now
        kept.stamp = stamp if is_settled else None
        return kept.value


def _look_at(file: Path) -> tuple[Stamp, float]:
    """What tells a file from its next version, and when it was changed; of a file that is absent, its directory's."""
    for path in (file, file.parent):
        try:
            stamp = files.stamp(path)
        except OSError:
            continue
        return stamp, stamp.changed_ns / 1e9
    return _ABSENT, 0.0
