"""Lines for the journal."""

from __future__ import annotations

import sys


def log(level: int, message: str) -> None:
    """Write ``message`` at a ``level`` of syslog(3), put before each line as sd-daemon(3) wants it."""
    print("\n".join(f"<{level}>{line}" for line in message.splitlines()), file=sys.stderr, flush=True)  # noqa: T201
