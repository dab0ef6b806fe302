"""The end of an engine: why it ended, said once, in the journal and in the unit's status."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NamedTuple

from gpusvc.journal import lastwords
from gpusvc.journal import units as unitlog
from gpusvc.journal.events import EventType
from gpusvc.launcher import caller, oom, watching
from gpusvc.log import log

if TYPE_CHECKING:
    from gpusvc.launcher.run import Run
    from gpusvc.linux.cgroup import Cgroup


# How long the engine's last lines may take to the journal. Other processes of the engine may keep its pipe open.
_RELAY_SECONDS = 0.3


class End(NamedTuple):
    """How an engine ended. ``status`` is as os.waitstatus_to_exitcode() gives it."""

    status: int
    ran_out: bool = False
    """Whether the VRAM of its GPUs ran out."""


def after_serving(run: Run, cgroup: Cgroup) -> End:
    """Reap an engine that was ready, and report its end."""
    killed, left = _oom_kill(run, cgroup), _left(run, cgroup)
    status = watching.wait_status(run.parked.pid)
    if run.caller is not None:
        if killed is not None:
            log(4, f"The program lost a process: {killed}.")
        log(6, f"The program ended {watching.manner(status)}.")
        caller.tell(run.caller, status)
        return End(status)
    ran_out = _report(run, f"The engine ended {watching.manner(status)}{_background(status, left)}", killed)
    if killed is not None and status in (0, -signal.SIGTERM):
        # The kernel killed a part, and systemd stopped the rest. That must not look like a stop that was asked for.
        status = -signal.SIGKILL
    return End(status, ran_out)


def before_ready(run: Run, cgroup: Cgroup, *, was_full: bool) -> End:
    """Reap an engine that never became ready, and report its end.

    Args:
        run: the run.
        cgroup: the engine's control group.
        was_full: whether a GPU of it was full when last looked at: some engines die of that without a known message.
    """
    killed, left = _oom_kill(run, cgroup), _left(run, cgroup)
    status = watching.wait_status(run.parked.pid)
    sentence = f"The engine ended {watching.manner(status)} before it was ready{_background(status, left)}"
    ran_out = _report(run, sentence, killed, was_full=was_full)
    return End(status or 1, ran_out)


def _left(run: Run, cgroup: Cgroup) -> int:
    """How many processes the engine left. Ask before the engine is reaped."""
    return len(set(cgroup.pids()) - {run.parked.pid})


def _background(status: int, left: int) -> str:
    """Return what to say of an engine that ended well and left processes running."""
    if status != 0 or not left:
        return ""
    running = "1 process of it runs" if left == 1 else f"{left} processes of it run"
    return (
        f", but {running} on: it put itself into the background, where gpusvc cannot supervise it."
        " Have it stay in the foreground: leave out nohup, & and its option for a daemon"
    )


def _oom_kill(run: Run, cgroup: Cgroup) -> str | None:
    """What the kernel's OOM killer did. Ask before the engine is reaped, as systemd then removes the control group."""
    return oom.account(cgroup.memory_events(), run.config.scope.get("MemoryMax"))


def _report(run: Run, sentence: str, killed: str | None, *, was_full: bool = False) -> bool:
    """Report the end with the engine's last words; whether VRAM ran out."""
    run.relay.has_ended(_RELAY_SECONDS)
    own = (*unitlog.this_run(run.name, run.began_at), f"SYSLOG_IDENTIFIER={run.identifier()}")
    words = lastwords.last_words(*own, lines=lastwords.ENOUGH_LINES)
    ran_out = bool(run.gpus) and killed is None and (was_full or lastwords.tells_of_memory(words))
    if killed is not None:
        sentence += f": {killed}"
    if ran_out:
        sentence += ": it ran out of VRAM"
        if run.is_second_try:
            sentence += ", although all idle models made room for it"
    line = f"{sentence}; {lastwords.LEAD}{lastwords.telling(words)}" if words else f"{sentence}; it wrote nothing."
    run.notifier.status(line)
    run.emit(EventType.FAIL, line, level=3)
    return ran_out
