"""Arguments of journalctl(1) for the lines of models' units, those of the system and those of a user."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from gpusvc.journal import journalctl
from gpusvc.names import service
from gpusvc.paths import is_user_instance


def command(name: str, *options: str) -> list[str]:
    """Return the command that shows all lines of the model ``name``: the engine's, gpusvc's and systemd's."""
    if is_user_instance():
        # --quiet suppresses the hint that users do not see the system's journal.
        return ["journalctl", f"--user-unit={service(name)}", "--quiet", *options]
    return ["journalctl", f"--unit={service(name)}", *options]


def own_lines(name: str) -> list[str]:
    """Return matches for the engine's and gpusvc's lines, without those of systemd about the unit."""
    if is_user_instance():
        return [f"_SYSTEMD_USER_UNIT={service(name)}", f"_UID={os.getuid()}"]
    return [f"_SYSTEMD_UNIT={service(name)}"]


def this_run(name: str, since: float) -> list[str]:
    """Return matches for the lines of the run that this process is a part of.

    Args:
        name: the model.
        since: when it began, in seconds since the epoch.
    """
    if is_user_instance():
        # For their lines journald records the invocation ID of user@UID.service.
        return [*own_lines(name), f"--since=@{since:.6f}"]
    return [f"_SYSTEMD_INVOCATION_ID={os.environ.get('INVOCATION_ID', '')}"]


def newest(lines: int, since: float | None = None) -> list[str]:
    """Return options for the last entries, at most ``lines``, as messages() reads them.

    They are read backwards: with --since= and without --reverse, journalctl of systemd 252 prints the first ones.

    Args:
        lines: how many entries.
        since: only entries from this time on, in seconds since the epoch.
    """
    shown = [
        "--reverse",
        f"--lines={lines}",
        "--output=json",
        "--output-fields=MESSAGE",
        "--all",
        "--no-pager",
        "--quiet",
    ]
    return shown if since is None else [*shown, f"--since=@{since:.6f}"]


def messages(printed: Iterable[bytes]) -> list[str]:
    """Return the lines of the output for newest(), oldest first, without empty ones."""
    found = []
    for entry in printed:
        try:
            message = journalctl.text(json.loads(entry)["MESSAGE"])
        except (ValueError, KeyError, TypeError):
            continue  # an entry without MESSAGE
        found.append([line for line in (message or "").splitlines() if line.strip()])
    return [line for lines in reversed(found) for line in lines]
