"""One run of a hook as a transient unit: the kernel ends it with all that it started, setsid(2) or not.

The unit is a oneshot service, so that its start job ends when the last process of its control group has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusvc.journal.eventlog import Event

SERVICE = "gpusvc-hooks.service"

# All units of hooks; packaging and administrators have drop-ins for them (gpusvc-hook-.service.d).
PATTERN = "gpusvc-hook-*.service"

# How long a hook may take to end after SIGTERM, before SIGKILL.
GRACE_SECONDS = 2.0

# What systemd told the daemon is not for its hooks.
_NOT_FOR_HOOKS = re.compile(
    r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|[A-Z]*_DIRECTORY|MAINPID|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID"
    r"|MEMORY_PRESSURE_.*|FDSTORE"
)

# A unit's name has 255 bytes at most.
_MAX_NAME = 200


def environment(inherited: Mapping[str, str], event: Event) -> dict[str, str]:
    """The variables of a hook; what the event does not tell is there, and empty."""
    told = {
        "GPUSVC_EVENT": event.kind,
        "GPUSVC_MODEL": event.model or "",
        "GPUSVC_GPU": ",".join(map(str, event.gpus)),
        "GPUSVC_BYTES": "" if event.bytes is None else str(event.bytes),
        "GPUSVC_REASON": event.reason or "",
        "GPUSVC_MESSAGE": event.message,
        "GPUSVC_PRIORITY": str(event.level),
        "GPUSVC_TIME": f"{event.seconds:.6f}",
    }
    kept = {name: value for name, value in inherited.items() if not _NOT_FOR_HOOKS.fullmatch(name)}
    # D-Bus takes neither NUL nor what is no UTF-8.
    return {name: value.encode(errors="replace").decode().replace("\0", "�") for name, value in (kept | told).items()}


@dataclass(frozen=True, slots=True)
class HookUnit:
    """A run of ``path`` for ``event``; a TransientUnit of the service manager."""

    path: Path
    event: Event
    number: int  # tells the runs apart
    limit_seconds: float
    inherited: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"gpusvc-hook-{self.path.name[:_MAX_NAME]}-{self.number:x}.service"

    def properties(self) -> Iterator[tuple[str, str, Any]]:
        path = str(self.path)
        yield "Description", "s", f"Hook {self.path.name} for {self.event}"
        yield "Type", "s", "oneshot"
        yield "ExecStart", "a(sasb)", [(path, [path], False)]
        yield (
            "Environment",
            "as",
            [f"{name}={value}" for name, value in environment(self.inherited, self.event).items()],
        )
        yield "WorkingDirectory", "s", "/"
        yield "SyslogIdentifier", "s", "gpusvc-hooks"
        # For a oneshot service this, and not RuntimeMaxSec=, is what limits its time.
        yield "TimeoutStartUSec", "t", int(self.limit_seconds * 1_000_000)
        yield "TimeoutStopUSec", "t", int(GRACE_SECONDS * 1_000_000)
        yield "KillMode", "s", "control-group"
        # However the daemon ends, its hooks end.
        yield "BindsTo", "as", [SERVICE]
