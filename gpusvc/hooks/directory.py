"""The directory of hooks: which of its files are run."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from gpusvc.log import log
from gpusvc.paths import Paths

# As for run-parts(8) and systemd, files that editors and package managers leave behind are no hooks.
_HOOK_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LEFT_BEHIND = re.compile(r".*\.(dpkg-[a-z]+|ucf-[a-z]+|rpm[a-z]+|bak|old|orig|rej|swp|tmp|disabled)")


def hooks_directory(paths: Paths) -> Path:
    return paths.config / "hooks.d"


def is_hook_name(name: str) -> bool:
    """Return whether a file of that name is a hook: not hidden, no backup, not left by a package manager."""
    return _HOOK_NAME.fullmatch(name) is not None and _LEFT_BEHIND.fullmatch(name) is None


class HookDirectory:
    """Reads the directory at each call. Warns once about each version of a file that others may write to."""

    def __init__(self, paths: Paths) -> None:
        self._directory = hooks_directory(paths)
        self._warned: set[tuple[str, int]] = set()

    def hooks(self) -> Iterator[Path]:
        """Return the hooks that exist now, sorted by name."""
        try:
            if not self._is_safe(self._directory, self._directory.stat()):
                return
            files = sorted(self._directory.iterdir())
        except OSError:
            return
        for file in files:
            if not is_hook_name(file.name):
                continue
            try:
                status = file.stat()
            except OSError:
                continue
            is_program = stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)
            if is_program and self._is_safe(file, status):
                yield file

    def _is_safe(self, path: Path, status: os.stat_result) -> bool:
        """Return whether only root can change it. Warn if not."""
        if status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return True
        version = (str(path), status.st_ctime_ns)
        if version not in self._warned:
            self._warned.add(version)
            log(4, f"{path} is not run: it must belong to root, and no other user may write to it.")
        return False
