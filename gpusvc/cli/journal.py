"""The journal of a model's unit, read by journalctl(1): lines of the engine, gpusvc and systemd."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gpusvc.journal import units as unitlog


def last_lines(name: str, lines: int, *, since: float | None = None) -> list[str]:
    """Return the last lines of the engine and gpusvc, oldest first; none if the caller may not read them.

    Args:
        name: the model.
        lines: how many.
        since: no lines before this time, in seconds since the epoch.
    """
    import subprocess  # noqa: PLC0415  most commands ask nobody

    try:
        # New lines may still be in journald's socket; only root may ask it to read them.
        subprocess.run(["journalctl", "--sync"], check=False, capture_output=True, timeout=2)  # noqa: S607
        command = ["journalctl", *unitlog.own_lines(name), *unitlog.newest(lines, since)]
        done = subprocess.run(command, check=False, capture_output=True, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return unitlog.messages(done.stdout.splitlines())


def window(command: Sequence[str], lines: str, since: str) -> list[str]:
    """Return options for ``command``, a journalctl(1), to show the last ``lines`` since ``since``; either may be empty.

    With both options, systemd 252 shows the first lines instead. So the cursor of the oldest line is looked up.
    """
    import subprocess  # noqa: PLC0415  as above

    options = ([f"--lines={lines}"] if lines else []) + ([f"--since={since}"] if since else [])
    if len(options) < 2:
        return options
    backwards = ["--reverse", "--output=json", "--output-fields=MESSAGE_ID", "--no-pager", "--quiet"]
    try:
        done = subprocess.run([*command, *options, *backwards], check=False, capture_output=True)  # noqa: S603
        return [f"--cursor={json.loads(done.stdout.splitlines()[-1])['__CURSOR']}"]
    except (OSError, IndexError, ValueError, KeyError):
        return options  # journalctl reports the error
