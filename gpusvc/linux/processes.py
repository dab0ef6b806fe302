"""Processes, as /proc and psutil show them; the only importer of psutil."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from gpusvc.printable import printable
from gpusvc.record import Record


class Process(NamedTuple):
    """A process that cannot be mistaken for a later one of the same PID.

    ``start_ticks`` is field 22 of proc_pid_stat(5): clock ticks after boot. Unlike a wall-clock time it does not change
    when the clock is set.
    """

    pid: int
    start_ticks: int


class Trace(Record):
    """Why a process may still exist: its command, its state (proc_pid_stat(5)) and its kernel stack."""

    pid: int
    command: str
    state: str | None
    stack: str | None


class Portrait(Record):
    """What a person needs to recognise a process. ``ancestors`` are (PID, name), the parent first, PID 1 last.

    ``leads_session``: it called setsid(2). The main process of a service does, most children of servers do not.
    """

    process: Process
    name: str
    command: str
    user: str
    ancestors: tuple[tuple[int, str], ...]
    leads_session: bool


def identify(pid: int) -> Process | None:
    """Return the process that has ``pid`` now; None if there is none."""
    fields = _stat(pid)
    return Process(pid, int(fields[19])) if fields else None


def identify_all(pids: Iterable[int]) -> frozenset[Process]:
    """Return the processes of ``pids`` that exist."""
    return frozenset(process for process in map(identify, pids) if process is not None)


def command(pid: int) -> str | None:
    """Return its command line, made printable, or its name in brackets if that is empty; None if it has ended."""
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        return printable(" ".join(process.cmdline()) or f"[{process.name()}]")
    except (psutil.AccessDenied, UnicodeDecodeError):
        return "[not readable]"
    except (psutil.Error, OSError):
        return None


def portrait(pid: int) -> Portrait | None:
    """Return the portrait of the process that has ``pid`` now; None if it has ended."""
    psutil = _psutil()
    who = identify(pid)
    try:
        process = psutil.Process(pid)
        ancestors = tuple((parent.pid, parent.name()) for parent in process.parents())
        name, user, leads_session = process.name(), process.username(), os.getsid(pid) == pid
    except (psutil.Error, OSError):
        return None
    if who is None or identify(pid) != who:
        return None
    return Portrait(who, name, command(pid) or "", user, ancestors, leads_session)


def named(*names: str) -> list[Process]:
    """Return the processes whose name is one of ``names``."""
    psutil = _psutil()
    pids = [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in names]
    return sorted(identify_all(pids))


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Take the effective user and group of the processes to look at, which may see their files and I/O.

    Root may see them too, but only with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, which allow access to everything.
    The real user stays root, so that a process of that user may neither signal nor trace this one (credentials(7)).
    Not for use with threads. If the caller is not root, nothing changes.
    """
    before = os.geteuid(), os.getegid()
    if before[0] != 0:
        yield
        return
    try:
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


def io_bytes(pids: Iterable[int]) -> int:
    """Return the bytes that ``pids`` read and wrote, the page cache included. Unreadable processes count as 0."""
    psutil = _psutil()
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            counters = psutil.Process(pid).io_counters()
            total += counters.read_chars + counters.write_chars
    return total


def trace(pid: int) -> Trace:
    """Return what is known of a process that does not end."""
    fields = _stat(pid)
    try:
        stack: str | None = Path(f"/proc/{pid}/stack").read_text().strip()
    except OSError:
        stack = None
    return Trace(pid=pid, command=command(pid) or "[gone]", state=fields[0] if fields else None, stack=stack or None)


def _psutil() -> ModuleType:
    # It takes 20 ms to load, and most starts do not need it.
    import psutil  # noqa: PLC0415

    return psutil


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; empty if the process has ended."""
    try:
        # A name is any 15 bytes, and may be cut within a character.
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    # The second field is the name in parentheses. It may contain ") ".
    return text[text.rindex(")") + 2 :].split()
