"""``gpusvc top``: plain lines in a pipe; on a terminal of any size a screen whose keys do what they say."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.machine.test_policy_cli import in_use, start
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.machine.host import Host

DEADLINE_SECONDS = 20


class Terminal:
    """A terminal with ``gpusvc top`` on it; what is on its screen is what was drawn last."""

    def __init__(self, machine: Host, columns: int, lines: int) -> None:
        self.size = columns, lines
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        # The machine has no controlling terminal to find it by; the three standard files are what counts.
        command = machine.entry(["env", "TERM=xterm-256color", "gpusvc", "top", "--interval", "0.2"])
        self._process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, start_new_session=True)
        os.close(side)
        self._drawn = ""

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def screen(self) -> list[str]:
        """The lines of the last whole drawing, without colours."""
        while select.select([self._main], [], [], 0)[0]:
            try:
                self._drawn += os.read(self._main, 65536).decode(errors="replace")
            except OSError:
                break
        frames = self._drawn.split("\x1b[H")
        whole = [frame for frame in frames if frame.endswith("\x1b[J")]
        # The terminal makes a "\r\n" of each "\n".
        return [plain(line).rstrip("\r") for line in whole[-1].split("\n")] if whole else []

    def wait_for(self, what: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not what(seen := self.screen()):
            assert time.monotonic() < deadline, "\n".join(seen)
            select.select([self._main], [], [], 0.1)
        return seen

    def close(self) -> int:
        self.press("q")
        try:
            return self._process.wait(DEADLINE_SECONDS)
        finally:
            self._process.kill()
            os.close(self._main)


def plain(line: str) -> str:
    """A line without its escape sequences, each of which ends with a letter."""
    head, *parts = line.split("\x1b[")
    return head + "".join(part[next(place for place, key in enumerate(part) if key.isalpha()) + 1 :] for part in parts)


@contextmanager
def top(machine: Host, columns: int, lines: int) -> Iterator[Terminal]:
    terminal = Terminal(machine, columns, lines)
    try:
        yield terminal
    finally:
        assert terminal.close() == 0


def shows(text: str) -> Callable[[list[str]], bool]:
    return lambda screen: any(text in line for line in screen)


def test_in_a_pipe_it_prints_lines_and_ends_with_who_reads_them(machine: Host) -> None:
    start(machine, "qwen", keys='idle_timeout = "1h"')
    said = machine.run("gpusvc", "top", "--count", "1").stdout
    assert "GPU 0 NVIDIA GeForce RTX 4090 (simulated):" in said
    assert "  qwen: 8.0 GiB\n" in said
    assert "\x1b" not in said
    row = next(line for line in said.splitlines() if line.startswith("qwen "))
    assert row.split()[:5] == ["qwen", "ready", "0", "8.0", "GiB"]
    assert "in 59:5" in row
    assert row.endswith("#1")
    assert machine.run("sh", "-c", "gpusvc top | head -n 1").stdout.startswith("gpusvc top, ")


@pytest.mark.generations(Generation.BOOKWORM, Generation.FORKY)
def test_keys_choose_stop_start_pin_sort_and_filter(machine: Host) -> None:
    start(machine, "alpha")
    start(machine, "beta", gpu=1)
    with top(machine, 80, 24) as terminal:
        screen = terminal.wait_for(shows("beta"))
        assert len(screen) == 24
        assert screen[0].startswith("gpusvc top  2 ready of 2 models")
        assert "q quit" in screen[-1]
        assert any("alpha 8.0 GiB" in line and "■" in line for line in screen)
        terminal.wait_for(shows("alpha: Ready after"))

        terminal.press("jp")
        terminal.wait_for(shows("beta is pinned until the next boot."))
        terminal.wait_for(lambda screen: any(line.startswith("beta ") and "pinned" in line for line in screen))
        terminal.press("k")
        terminal.press("x")
        terminal.wait_for(lambda screen: any(line.startswith("alpha ") and "stopped" in line for line in screen))
        terminal.press("s")
        terminal.wait_for(lambda screen: any(line.startswith("alpha ") and "ready" in line for line in screen))
        terminal.press("/bet\r")
        screen = terminal.wait_for(shows('filter "bet"'))
        assert not any(line.startswith("alpha  ") for line in screen)
        terminal.press("o")
        terminal.wait_for(shows("by VRAM"))


@pytest.mark.generations(Generation.TRIXIE)
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (40, 10), (200, 50)])
def test_every_size_of_terminal_is_filled_and_none_overflows(machine: Host, columns: int, lines: int) -> None:
    for number in range(4):
        machine.write_model(f"a-model-with-quite-a-long-name-{number}")
    with top(machine, columns, lines) as terminal:
        screen = terminal.wait_for(shows("a-model-with"))
    assert len(screen) == lines
    assert max(map(len, screen)) <= columns


@pytest.mark.generations(Generation.TRIXIE)
def test_a_model_in_use_is_stopped_only_after_a_yes(machine: Host) -> None:
    start(machine, "busy")
    with in_use(machine, "busy"), top(machine, 100, 30) as terminal:
        terminal.wait_for(shows("in use"))
        terminal.press("x")
        terminal.wait_for(shows("Stop it? y/n"))
        terminal.press("n")
        terminal.wait_for(shows("q quit"))
        assert machine.is_active("model@busy.service")
        terminal.press("x")
        terminal.wait_for(shows("Stop it? y/n"))
        terminal.press("y")
        terminal.wait_for(shows("stopped"))
