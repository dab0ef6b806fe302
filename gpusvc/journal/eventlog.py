"""Events read back from the journal, through journalctl(1); it knows nothing of who wants to know.

Anybody may write to the journal, whatever fields they like. So only entries count that journald says come from root or
from a service of gpusvc: the fields that begin with an underscore are its own, and cannot be forged. In a user's
instance his own entries count, and no others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Self

from gpusvc.errors import GpusvcError
from gpusvc.journal.events import MESSAGE_IDS
from gpusvc.paths import is_user_instance

# Services of gpusvc that do not run as root.
_OUR_UNITS = ("gpusvc-api.service", "gpusvc-gateway.service", "gpusvc-watchdog.service")

_FIELDS = "MESSAGE,PRIORITY,GPUSVC_EVENT,GPUSVC_MODEL,GPUSVC_GPU,GPUSVC_BYTES,GPUSVC_REASON"

_CURSOR = re.compile(r"[a-z]=[0-9a-f]+(;[a-z]=[0-9a-f]+)*")

_ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, as events.emit() was told; None and empty: it was not told."""

    kind: str
    """A value of events.EventType, or one that a newer gpusvc has."""
    seconds: float
    """When, since the epoch, by the clock of that time."""
    message: str
    cursor: str
    """Its place in the journal."""
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
        """What journalctl's JSON says; raises KeyError or ValueError for anything that is no event."""
        vram_bytes = _text(entry.get("GPUSVC_BYTES"))
        return cls(
            kind=_text(entry["GPUSVC_EVENT"]) or "",
            seconds=int(entry["__REALTIME_TIMESTAMP"]) / 1_000_000,
            message=_text(entry.get("MESSAGE")) or "",
            cursor=str(entry["__CURSOR"]),
            model=_text(entry.get("GPUSVC_MODEL")),
            gpus=tuple(int(index) for index in _texts(entry.get("GPUSVC_GPU"))),
            bytes=None if vram_bytes is None else int(vram_bytes),
            reason=_text(entry.get("GPUSVC_REASON")),
            level=int(_text(entry.get("PRIORITY")) or 6),
        )


def parse(line: bytes | str) -> Event | None:
    """The event of one line of ``journalctl --output=json``; None if it holds none."""
    try:
        entry = json.loads(line)
        return Event.from_entry(entry) if isinstance(entry, dict) else None
    except (KeyError, OverflowError, TypeError, ValueError):
        return None


def _texts(value: Any) -> list[str]:
    """The values of a field: it may be there more than once, and what is not printable comes as a list of bytes."""
    if value is None:
        return []
    if not isinstance(value, list):
        return [str(value)]
    if value and all(isinstance(item, int) for item in value):
        return [bytes(value).decode(errors="replace")]
    return [text for item in value for text in _texts(item)]


def _text(value: Any) -> str | None:
    texts = _texts(value)
    return texts[0] if texts else None


def is_cursor(text: str) -> bool:
    """Whether journalctl would take ``text`` for a place in a journal."""
    return _CURSOR.fullmatch(text) is not None


def command(*options: str, model: str | None = None) -> list[str]:
    """What prints events as lines for parse(), oldest first: of all models, or of one."""
    what = [f"MESSAGE_ID={message_id}" for message_id in MESSAGE_IDS.values()]
    if model is not None:
        what.append(f"GPUSVC_MODEL={model}")
    shown = ["--output=json", "--all", f"--output-fields={_FIELDS}", "--no-pager"]
    if is_user_instance():
        return ["journalctl", *shown, "--quiet", *options, *what, f"_UID={os.getuid()}"]
    # As journalctl(1) reads it: values of one field are alternatives, fields must all fit, "+" is an or between groups.
    ours = [f"_SYSTEMD_UNIT={unit}" for unit in _OUR_UNITS]
    return ["journalctl", *shown, *options, *what, "_UID=0", "+", *what, *ours]


@contextmanager
def opened(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """journalctl while it runs, its lines in ``stdout``; ended at the end.

    Raises:
        GpusvcError: it cannot be run.
    """
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)  # noqa: S603
    except OSError as error:
        raise GpusvcError(f"journalctl cannot be run: {error.strerror}.") from None
    try:
        yield child
    finally:
        child.terminate()
        output_of(child).close()
        child.wait()


def output_of(child: subprocess.Popen[bytes]) -> IO[bytes]:
    """The pipe that opened() made."""
    assert child.stdout is not None  # noqa: S101
    return child.stdout


def newest_cursor() -> str | None:
    """Where the journal ends now; None if it is empty.

    Raises:
        GpusvcError: the journal cannot be read.
    """
    # The newest entry of all, not of ours: an event may be years ago.
    ask = ["journalctl", "--output=json", "--output-fields=MESSAGE_ID", "--no-pager", "--quiet", "--lines=1"]
    try:
        done = subprocess.run(ask, check=False, stdout=subprocess.PIPE, timeout=_ANSWER_SECONDS)  # noqa: S603
    except OSError as error:
        raise GpusvcError(f"journalctl cannot be run: {error.strerror}.") from None
    except subprocess.TimeoutExpired:
        raise GpusvcError(f"journalctl does not answer within {_ANSWER_SECONDS:.0f} s.") from None
    if done.returncode:
        raise GpusvcError(f"The journal cannot be read: journalctl ended with exit status {done.returncode}.")
    try:
        return str(json.loads(done.stdout)["__CURSOR"])
    except (ValueError, KeyError):
        return None
