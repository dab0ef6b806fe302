"""Processes that SIGKILL does not end, set apart: each gets a scope of its own.

systemd waits for every process of a unit before it lets the unit stop, for minutes if need be. A process that hangs in
the driver of one GPU would so delay the stop and the restart of a model on another GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gpusvc.errors import GpusvcError
from gpusvc.log import log

_JOB_SECONDS = 5.0


class _Apart(NamedTuple):
    name: str
    pid: int

    def properties(self) -> Iterator[tuple[str, str, Any]]:
        yield "Description", "s", "A process of gpusvc that hangs in the driver of a GPU"
        yield "CollectMode", "s", "inactive-or-failed"
        yield "PIDs", "au", [self.pid]


def set_apart(pids: Iterable[int]) -> None:
    """Move each of these processes to a scope of its own. What fails is logged: it delays a stop, and no more."""
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  rarely needed

    for pid in pids:
        log(4, f"PID {pid} hangs in the driver of a GPU, and SIGKILL does not end it. It gets a scope of its own.")
        try:
            with Manager() as manager:
                manager.wait(manager.start_transient(_Apart(f"gpusvc-hung-{pid}.scope", pid)), _JOB_SECONDS)
        except GpusvcError as error:
            log(4, f"PID {pid} stays where it is: {error}")
