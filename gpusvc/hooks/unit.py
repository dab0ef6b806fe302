"""One run of a hook as a transient unit: systemd ends all its processes, also those that called setsid(2).

The unit is a oneshot service, so that its start job ends with the last process of its control group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusvc.journal.eventlog import Event

SERVICE = "gpusvc-hooks.service"

# All units of hooks. Their common settings are in gpusvc-hook-.service.d.
PATTERN = "gpusvc-hook-*.service"

# The time between SIGTERM and SIGKILL.
GRACE_SECONDS = 2.0

# Variables that systemd set for the daemon, and that mean nothing to a hook.
_NOT_FOR_HOOKS = re.compile(
    r"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|[A-Z]*_DIRECTORY|MAINPID|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID"
    r"|MEMORY_PRESSURE_.*|FDSTORE"
)

# A unit's name has 255 bytes at most.
_MAX_NAME = 200


def environment(inherited: Mapping[str, str], event: Event) -> dict[str, str]:
    """Return the environment of a hook. Variables for which the event has no value are empty."""
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
    # D-Bus accepts only UTF-8 without NUL.
    return {name: value.encode(errors="replace").decode().replace("\0", "�") for name, value in (kept | told).items()}


@dataclass(frozen=True, slots=True)
class HookUnit:
    """A run of the hook ``path`` for ``event``; a TransientUnit."""

    path: Path
    event: Event
    number: int  # differs from run to run
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
        # RuntimeMaxSec= has no effect on a oneshot service.
        yield "TimeoutStartUSec", "t", int(self.limit_seconds * 1_000_000)
        yield "TimeoutStopUSec", "t", int(GRACE_SECONDS * 1_000_000)
        yield "KillMode", "s", "control-group"
        # The hooks end with the daemon, however it ends.
        yield "BindsTo", "as", [SERVICE]
