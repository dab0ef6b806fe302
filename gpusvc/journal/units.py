"""How journalctl(1) is asked for what models' units wrote, those of the system and those of a user."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from gpusvc.names import service
from gpusvc.paths import is_user_instance


def command(name: str, *options: str) -> list[str]:
    """What shows all of the model ``name``: the engine's lines, gpusvc's and systemd's."""
    if is_user_instance():
        # Quiet: otherwise it tells each user that he does not see the system's journal.
        return ["journalctl", f"--user-unit={service(name)}", "--quiet", *options]
    return ["journalctl", f"--unit={service(name)}", *options]


def own_lines(name: str) -> list[str]:
    """Matches for the engine's and gpusvc's lines alone: a unit's own field leaves out what systemd says about it."""
    if is_user_instance():
        return [f"_SYSTEMD_USER_UNIT={service(name)}", f"_UID={os.getuid()}"]
    return [f"_SYSTEMD_UNIT={service(name)}"]


def this_run(name: str, since: float) -> list[str]:
    """Matches for the lines of the run that this process is a part of.

    Args:
        name: the model.
        since: when it began, in seconds since the epoch.
    """
    if is_user_instance():
        # As their invocation journald has that of user@UID.service.
        return [*own_lines(name), f"--since=@{since:.6f}"]
    return [f"_SYSTEMD_INVOCATION_ID={os.environ.get('INVOCATION_ID', '')}"]


def newest(lines: int, since: float | None = None) -> list[str]:
    """Options for the last entries, at most ``lines``, as messages() reads them.

    They come from the end backwards: with --since= alone, journalctl of systemd 252 takes the first ones.

    Args:
        lines: how many entries.
        since: none before that, in seconds since the epoch.
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
    """The lines of what newest() has printed, oldest first, without empty ones."""
    found = []
    for entry in printed:
        try:
            message = json.loads(entry)["MESSAGE"]
            text = message if isinstance(message, str) else bytes(message).decode(errors="replace")
        except (ValueError, KeyError, TypeError):
            continue  # none of a message's, or one that is too long to be told
        found.append([line for line in text.splitlines() if line.strip()])
    return [line for lines in reversed(found) for line in lines]
