"""Write the events of models to the journal, for people and for programs (gpusvc-hooks(7)).

An event is one entry of journald's native protocol (systemd.journal-fields(7)): a sentence for a person, and its parts
in separate fields. MESSAGE_ID= refers to the catalog, which tells an operator what to do (journalctl -x).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from enum import StrEnum

from gpusvc import names
from gpusvc.log import log
from gpusvc.paths import is_user_instance

# All events of all models have it, whichever process sends them: `journalctl -t gpusvc`.
IDENTIFIER = "gpusvc"

_SOCKET = "/run/systemd/journal/socket"

# A working journald accepts an entry at once. No process of gpusvc waits for one that does not work.
_SEND_SECONDS = 0.2

# A datagram holds 208 KiB (net.core.wmem_default) and an environment string of a hook 128 KiB (execve(2)).
_MAX_VALUE_BYTES = 32 * 1024


class EventType(StrEnum):
    """The kinds of events. The values are those of GPUSVC_EVENT=, and part of the interface for hooks."""

    START = "start"
    """A model got its GPUs, and its engine is being started."""
    READY = "ready"
    """The engine answers."""
    FAIL = "fail"
    """A start failed, or an engine ended by itself."""
    REFUSAL = "refusal"
    """There was no room for a start, and none could be made."""
    IDLE = "idle"
    """A model was not used for its idle_timeout."""
    STUCK = "stuck"
    """A model is in use, but made no progress for its busy_timeout."""
    FAILING = "failing"
    """A model answered nothing but server errors for its failing_time, the watchdog's own request included."""
    PRESSURE = "pressure"
    """A GPU has had less free VRAM than its reserve for pressure_time."""
    EVICT = "evict"
    """A model is stopped to make room, or because it is idle; at level 4 one that was in use."""
    RELEASE = "release"
    """It was proven that a model gave its VRAM back."""
    UNRELEASED = "unreleased"
    """The release could not be proven in time: the model's VRAM counts as taken."""
    ABANDON = "abandon"
    """A start is given up, because no request waits for it any more."""
    LEAK = "leak"
    """Something of a model was left behind: a lease, a scope, or a process that holds VRAM."""


# packaging/gpusvc.catalog has them too. An ID of a published version is never used for another kind.
MESSAGE_IDS = {
    EventType.START: "1b8ad4eb769e493ca6f193ee5f64fe15",
    EventType.READY: "0315fb9cbc8f4c7fa307bda0efd3832b",
    EventType.FAIL: "c14a62bd1549446c89b2c2d35ab2567e",
    EventType.REFUSAL: "1631cdb8c6a4475bbe7bba91d92f3e46",
    EventType.IDLE: "109137fcca7e4fec9989640bd3dcf1e0",
    EventType.STUCK: "0e5609f975394a19a938c17494921a11",
    EventType.FAILING: "e374b49d1fc44dd491a6fac7e45f0d79",
    EventType.PRESSURE: "a96530b3374740f2accb6e96b9390ba3",
    EventType.EVICT: "4a6a2d5027294f079652f48cc49d870f",
    EventType.RELEASE: "82404427ed7740dc97582d2bb2ed7e4f",
    EventType.UNRELEASED: "4b69b016a0da4688a82fc4660cb920f2",
    EventType.ABANDON: "5d2c0f7be0a54b1e9a4f8a6f0c9f1c37",
    EventType.LEAK: "fa14589ae3d544c988834b5aa56db9c5",
}


def emit(
    kind: EventType,
    sentence: str,
    *,
    model: str | None,
    gpu: Sequence[int] | None = None,
    bytes: int | None = None,  # noqa: A002  as the field is called
    reason: str | None = None,
    level: int = 6,
) -> None:
    """Write an event to the journal, or the sentence to stderr if that fails. Never raises, and waits 0.2 s at most.

    Args:
        kind: of the event.
        sentence: for a person; it may have several lines.
        model: that the event is about; None: not about one model.
        gpu: NVML indices of the GPUs that the event is about.
        bytes: of VRAM that were taken, came back, or are missing.
        reason: in a sentence, why gpusvc decided so.
        level: of syslog(3): 3 error, 4 warning, 6 information.
    """
    entry = encode(_fields(kind, sentence, model, gpu or (), bytes, reason, level))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_SECONDS)
            sender.sendto(entry, _SOCKET)
    except OSError:
        log(level, sentence)


def _fields(
    kind: EventType,
    sentence: str,
    model: str | None,
    gpus: Sequence[int],
    vram_bytes: int | None,
    reason: str | None,
    level: int,
) -> Iterable[tuple[str, str]]:
    yield "MESSAGE", sentence
    yield "MESSAGE_ID", MESSAGE_IDS[kind]
    yield "PRIORITY", str(level)
    yield "SYSLOG_FACILITY", "3"  # LOG_DAEMON, as for lines that services write to stderr
    yield "SYSLOG_IDENTIFIER", IDENTIFIER
    yield "SYSLOG_PID", str(os.getpid())
    yield "GPUSVC_EVENT", kind.value
    if model is not None:
        yield "GPUSVC_MODEL", model
        # journald reads a sender's unit from /proc: too late if the sender ends at once, and the watchdog's is another.
        # With this field, entries of root appear in `journalctl -u` and `systemctl status` of the model, and entries
        # of a user, with the other field, in `journalctl --user-unit` and `systemctl --user status`.
        yield "OBJECT_SYSTEMD_USER_UNIT" if is_user_instance() else "OBJECT_SYSTEMD_UNIT", names.service(model)
    # One field for each GPU, so that GPUSVC_GPU=1 also finds an event about GPUs 0 and 1.
    yield from (("GPUSVC_GPU", str(index)) for index in gpus)
    if vram_bytes is not None:
        yield "GPUSVC_BYTES", str(vram_bytes)
    if reason is not None:
        yield "GPUSVC_REASON", reason


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return an entry of the native protocol, https://systemd.io/JOURNAL_NATIVE_PROTOCOL; long values are cut."""
    parts = []
    for name, text in fields:
        value = text.encode(errors="replace")
        if len(value) > _MAX_VALUE_BYTES:
            value = value[:_MAX_VALUE_BYTES].decode(errors="ignore").encode()
        if b"\n" in value:
            parts.append(b"%b\n%b%b\n" % (name.encode(), len(value).to_bytes(8, "little"), value))
        else:
            parts.append(b"%b=%b\n" % (name.encode(), value))
    return b"".join(parts)
