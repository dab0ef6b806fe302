"""Why a start did not end with a ready model: the reason, said once, a hint, and the last lines of the log.

Values in, values out. The command and the API read systemd and the journal in their own ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpusvc.errors import NO_ROOM_STATUS, EngineError
from gpusvc.journal.lastwords import LEAD
from gpusvc.names import service
from gpusvc.systemd.jobs import JobResult

if TYPE_CHECKING:
    from gpusvc.systemd.units import ServiceStatus, Unit

LOG_LINES = 15


class StartError(EngineError):
    """A start failed. ``log`` has the last lines of the model's log, without the reason in the message."""

    retry_after_seconds: int | None = None

    def __init__(self, message: str, *, hint: str | None = None, log: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.log = tuple(log)


class NoRoomError(EngineError):
    """There is no room for the model now. The model is not broken, so that the next request tries again at once."""

    retry_after_seconds = 5


class StoppedError(EngineError):
    """Somebody stopped the model before it was ready. The model did not fail."""

    retry_after_seconds = 1


def is_told_by_log(result: JobResult, said: ServiceStatus | None) -> bool:
    """Return whether why_not() needs the model's log: the model has failed, rather than been stopped or refused."""
    is_refused = said is not None and said.exit_status == NO_ROOM_STATUS
    return result not in {JobResult.CANCELED, JobResult.DEPENDENCY} and not is_refused


def why_not(
    name: str,
    result: JobResult,
    unit: Unit | None,
    said: ServiceStatus | None,
    lines: Sequence[str] = (),
    *,
    in_lines: bool = False,
) -> EngineError:
    """Return the error of a start of ``name``.

    Args:
        name: the model.
        result: how its job ended; not "done".
        unit: its service, if that is loaded.
        said: what the service reports.
        lines: the last lines of its log, oldest first.
        in_lines: for a person who reads message and log together: the reason has its lines as in the log, and the log
            leaves out the engine's line that the reason quotes. A program gets the log with this line.
    """
    if result is JobResult.CANCELED:
        return StoppedError(f"{name} was stopped before it was ready.", hint="Try again.")
    if result is JobResult.DEPENDENCY:
        return StartError(
            f"{name} was not started: a unit that it requires failed.", hint=f"See `systemctl status {service(name)}`."
        )
    reason = "" if said is None else said.text or f"systemd calls it {said.result}, exit status {said.exit_status}."
    told, rest = parted(reason, lines)
    if in_lines:
        rest = _without_last(reason.partition(LEAD)[2], rest)
    in_full = "\n".join(told)
    sentence = f"{name} did not start. {in_full if in_lines and told else reason}".rstrip()
    if said is not None and said.exit_status == NO_ROOM_STATUS:
        if in_lines and told:  # with the launcher's own hint
            return NoRoomError("\n".join([sentence, *rest]))
        return NoRoomError(sentence, hint="`gpusvc gpus` shows which model holds what.")
    hint = f"`gpusvc logs {name}` shows all of its log."
    if unit is not None and unit.sub.startswith("auto-restart"):
        hint = f"systemd tries again; `gpusvc stop {name}` ends that. {hint}"
    return StartError(sentence, hint=hint, log=rest)


def parted(reason: str, lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the lines of the log that are the reason, and those that say something else.

    The launcher writes its reason to the unit's status in one line, and to the log, where it may have several lines and
    a hint may follow.
    """
    bare = reason.rstrip("…")
    first, last = _place(bare, lines) if bare else (0, 0)
    return list(lines[first:last]), [*lines[:first], *lines[last:]]


def _without_last(line: str, lines: Sequence[str]) -> list[str]:
    places = [place for place, each in enumerate(lines) if each == line]
    return [each for place, each in enumerate(lines) if place not in places[-1:]]


def _place(reason: str, lines: Sequence[str]) -> tuple[int, int]:
    """Return where the lines of the reason begin and end; an empty range if they are not there."""
    for first in reversed(range(len(lines))):
        if not reason.startswith(lines[first][: len(reason)]):
            continue
        text = ""
        for last in range(first, len(lines)):
            text = f"{text} {lines[last]}" if text else lines[last]
            if text.startswith(reason):
                return first, last + 1
            if not reason.startswith(text):
                break
    return 0, 0
