"""Read events back from the journal, through journalctl(1).

Any process may write any fields to the journal. So only entries count whose sender is root or a service of gpusvc:
journald itself sets the fields that begin with an underscore, and nobody can forge them. In a user's instance only the
user's own entries count.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any, Self

from gpusvc.journal import journalctl
from gpusvc.journal.events import MESSAGE_IDS
from gpusvc.paths import is_user_instance

# Services of gpusvc that do not run as root.
_OUR_UNITS = ("gpusvc-api.service", "gpusvc-gateway.service", "gpusvc-watchdog.service")

_FIELDS = "MESSAGE,PRIORITY,GPUSVC_EVENT,GPUSVC_MODEL,GPUSVC_GPU,GPUSVC_BYTES,GPUSVC_REASON"

_CURSOR = re.compile(r"[a-z]=[0-9a-f]+(;[a-z]=[0-9a-f]+)*")


@dataclass(frozen=True, slots=True)
class Event:
    """One event, with the arguments of events.emit(); None and empty: not given."""

    kind: str
    """A value of events.EventType, or a value of a newer gpusvc."""
    seconds: float
    """Seconds since the epoch, by the wall clock when it was written."""
    message: str
    cursor: str
    """Its position in the journal."""
    model: str | None = None
    gpus: tuple[int, ...] = ()
    bytes: int | None = None
    reason: str | None = None
    level: int = 6

    def __str__(self) -> str:
        return self.kind if self.model is None else f"{self.kind} of {self.model}"

    def to_json(self) -> dict[str, Any]:
        from datetime import UTC, datetime  # noqa: PLC0415  only JSON needs it

        return {
            "time": datetime.fromtimestamp(self.seconds, tz=UTC).astimezone().isoformat(timespec="milliseconds"),
            "event": self.kind,
            "model": self.model,
            "gpus": list(self.gpus),
            "bytes": self.bytes,
            "reason": self.reason,
            "level": self.level,
            "message": self.message,
        }

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Self:
        """Return the event of an entry in journalctl's JSON; raises KeyError or ValueError if it is not an event."""
        vram_bytes = journalctl.text(entry.get("GPUSVC_BYTES"))
        return cls(
            kind=journalctl.text(entry["GPUSVC_EVENT"]) or "",
            seconds=int(entry["__REALTIME_TIMESTAMP"]) / 1_000_000,
            message=journalctl.text(entry.get("MESSAGE")) or "",
            cursor=str(entry["__CURSOR"]),
            model=journalctl.text(entry.get("GPUSVC_MODEL")),
            gpus=tuple(int(index) for index in journalctl.texts(entry.get("GPUSVC_GPU"))),
            bytes=None if vram_bytes is None else int(vram_bytes),
            reason=journalctl.text(entry.get("GPUSVC_REASON")),
            level=int(journalctl.text(entry.get("PRIORITY")) or 6),
        )


def parse(line: bytes | str) -> Event | None:
    """Return the event in one line of ``journalctl --output=json``; None if it has none."""
    try:
        entry = json.loads(line)
        return Event.from_entry(entry) if isinstance(entry, dict) else None
    except (KeyError, OverflowError, TypeError, ValueError):
        return None


def is_cursor(text: str) -> bool:
    """Return whether ``text`` has the form of a journal cursor."""
    return _CURSOR.fullmatch(text) is not None


def command(*options: str, model: str | None = None) -> list[str]:
    """Return the command that prints the events of all models, or of one, as lines for parse(), oldest first."""
    what = [f"MESSAGE_ID={message_id}" for message_id in MESSAGE_IDS.values()]
    if model is not None:
        what.append(f"GPUSVC_MODEL={model}")
    shown = ["--output=json", "--all", f"--output-fields={_FIELDS}", "--no-pager"]
    if is_user_instance():
        return ["journalctl", *shown, "--quiet", *options, *what, f"_UID={os.getuid()}"]
    # journalctl(1): values of one field are alternatives, all fields must match, "+" is "or" between groups.
    ours = [f"_SYSTEMD_UNIT={unit}" for unit in _OUR_UNITS]
    return ["journalctl", *shown, *options, *what, "_UID=0", "+", *what, *ours]
