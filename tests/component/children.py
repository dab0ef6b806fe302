"""A runner of hooks without a service manager, for tests of the daemon: hooks are its child processes.

How systemd ends hooks, and what they leave behind, is tested on real machines (tests/machine/test_hooks.py).
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpusvc.hooks.runner import Outcome
from gpusvc.hooks.unit import environment
from gpusvc.journal.eventlog import Event


@dataclass(slots=True)
class _Child:
    path: Path
    event: Event
    process: subprocess.Popen[bytes]


class ChildRunner:
    """Each hook has a pidfd in one epoll, which is readable once one of them ended."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._children: dict[int, _Child] = {}

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __len__(self) -> int:
        return len(self._children)

    def start(self, hook: Path, event: Event) -> None:
        process = subprocess.Popen([str(hook)], stdin=subprocess.DEVNULL, cwd="/", env=environment(os.environ, event))
        pidfd = os.pidfd_open(process.pid)
        self._children[pidfd] = _Child(hook, event, process)
        self._epoll.register(pidfd, select.EPOLLIN)

    def pause_seconds(self) -> float | None:
        return None

    def ended(self) -> Iterator[Outcome]:
        for pidfd, _ in self._epoll.poll(0):
            child = self._children.pop(pidfd)
            os.close(pidfd)
            status = child.process.wait()
            problem = f"{child.path.name} failed for {child.event}: exit status {status}" if status else None
            yield Outcome(child.path, child.event, problem)

    def end_all(self) -> list[Outcome]:
        for child in self._children.values():
            child.process.kill()
            child.process.wait()
        message = "{} was ended while it ran for {}: the service stops"
        return [
            Outcome(each.path, each.event, message.format(each.path.name, each.event))
            for each in self._children.values()
        ]
