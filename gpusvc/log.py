"""Lines for the journal."""

from __future__ import annotations

import sys


def log(level: int, message: str) -> None:
    """Write ``message`` to stderr, each line with the prefix of sd-daemon(3) for ``level``, which is of syslog(3)."""
    print("\n".join(f"<{level}>{line}" for line in message.splitlines()), file=sys.stderr, flush=True)  # noqa: T201
