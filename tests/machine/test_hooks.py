"""Hooks on real systemd: each in a transient unit, of which nothing outlives the hook."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled("bookworm", "trixie")

TELL = "from gpusvc.journal import events; events.emit(events.EventType.READY, {sentence!r}, model={model!r})"
DIRECTORY = "/run/hooked"


class Hooks:
    """A machine with hooks, which write into one directory."""

    def __init__(self, machine: Host) -> None:
        self.machine = machine
        machine.run("rm", "-rf", DIRECTORY)
        machine.run("mkdir", DIRECTORY)

    def add(self, name: str, script: str) -> None:
        text = f"#!/bin/sh\ncd {DIRECTORY}\n{script}\n"
        self.machine.write(f"/etc/gpusvc/hooks.d/{name}", text, mode=0o755)

    def start(self) -> None:
        self.machine.run("systemctl", "start", "gpusvc-hooks.service")

    def happens(self, model: str, sentence: str = "Ready.") -> None:
        self.machine.run("python3", "-I", "-c", TELL.format(model=model, sentence=sentence))

    def read(self, name: str) -> list[str]:
        return self.machine.run("cat", f"{DIRECTORY}/{name}", check=False).stdout.splitlines()

    def wait_for(self, name: str, lines: int = 1) -> list[str]:
        self.machine.wait_until(lambda: len(self.read(name)) >= lines, f"a hook wrote {name}")
        return self.read(name)

    def units(self) -> list[str]:
        listed = self.machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "gpusvc-hook-*.service")
        return [line.split()[0] for line in listed.stdout.splitlines()]

    def wait_until_over(self) -> None:
        self.machine.wait_until(lambda: not self.units(), "no unit of a hook is left")

    def living(self, *pids: str) -> list[str]:
        shown = self.machine.run("ps", "-o", "pid=", "-p", ",".join(pids), check=False).stdout
        return shown.split()

    def warned(self) -> str:
        return self.machine.journal(None, "-t", "gpusvc-hooks")


@pytest.fixture
def hooks(machine: Host) -> Iterator[Hooks]:
    yield Hooks(machine)
    machine.run("systemctl", "stop", "gpusvc-hooks.service")
    machine.run("systemctl", "reset-failed", "gpusvc-hooks.service", check=False)


# A double fork and a session of its own: no process group, and no parent, leads to what is left.
_DAEMON = "setsid sh -c 'sleep 1000 & echo $! > escaped.new; mv escaped.new escaped' &"


def test_what_a_hook_leaves_behind_ends_with_it_even_in_a_session_of_its_own(hooks: Hooks) -> None:
    hooks.add("leaves", f"{_DAEMON}\nwhile [ ! -e escaped ]; do sleep 0.1; done")
    hooks.start()
    hooks.happens("a")
    (pid,) = hooks.wait_for("escaped")
    hooks.wait_until_over()
    assert hooks.living(pid) == []


def test_a_hook_that_hangs_is_ended_with_all_that_it_started(hooks: Hooks) -> None:
    hooks.add("hangs", f"trap '' TERM; {_DAEMON}\necho $$ > pid; while :; do sleep 1000; done")
    hooks.add("other", "echo $GPUSVC_MODEL >> other")
    hooks.start()
    hooks.happens("a")
    pids = [*hooks.wait_for("escaped"), *hooks.wait_for("pid")]
    hooks.happens("b")
    hooks.machine.wait_until(lambda: hooks.read("other") == ["a", "b"], "the next event had its turn", timeout=60)
    assert hooks.living(*pids) == []
    assert "hangs took longer than 10 s for ready of a and was ended." in hooks.warned()


def test_a_hook_that_obeys_sigterm_may_clean_up(hooks: Hooks) -> None:
    hooks.add("hangs", "trap 'echo cleaned > cleaned; exit 1' TERM; echo > began; sleep 1000 & wait")
    hooks.start()
    hooks.happens("a")
    hooks.wait_for("began")
    hooks.machine.run("systemctl", "stop", "gpusvc-hooks.service")
    assert hooks.read("cleaned") == ["cleaned"]


@pytest.mark.parametrize("verb", ["stop", "kill -s KILL"])
def test_however_the_service_ends_its_hooks_end(hooks: Hooks, verb: str) -> None:
    hooks.add("hangs", f"trap '' TERM; {_DAEMON}\necho $$ > pid; while :; do sleep 1000; done")
    hooks.start()
    hooks.happens("a")
    pids = [*hooks.wait_for("escaped"), *hooks.wait_for("pid")]
    hooks.machine.run("mv", "/etc/gpusvc/hooks.d/hangs", "/etc/gpusvc/hooks.d/hangs.disabled")
    hooks.machine.run("systemctl", *verb.split(), "gpusvc-hooks.service")
    hooks.wait_until_over()
    assert hooks.living(*pids) == []


def test_a_hook_that_fails_is_a_warning_and_leaves_no_unit(hooks: Hooks) -> None:
    hooks.add("exits", "exit 3")
    hooks.add("killed", "kill -9 $$")
    hooks.machine.write("/etc/gpusvc/hooks.d/broken", "#!/nonexistent/interpreter\n", mode=0o755)
    hooks.add("tell", "echo $GPUSVC_MODEL >> told")
    hooks.start()
    hooks.happens("a")
    hooks.happens("b")
    hooks.wait_for("told", 2)
    hooks.machine.wait_until(lambda: hooks.warned().count("failed for ready of b") == 2, "both were told of")
    said = hooks.warned()
    assert "exits failed for ready of a: exit status 3." in said
    assert "killed failed for ready of a: signal 9." in said
    assert re.search(
        r"broken cannot be run for ready of a: `journalctl -u gpusvc-hook-broken-\w+\.service` says why", said
    )
    hooks.wait_until_over()


def test_a_hook_is_told_of_the_event_whatever_is_in_it(hooks: Hooks) -> None:
    hooks.add("tell", 'printf "%s|" "$GPUSVC_EVENT" "$GPUSVC_MODEL" "$GPUSVC_MESSAGE" > told.new; mv told.new told')
    hooks.start()
    hooks.happens("a", '100 % of $HOME\n"quoted" \\x41\x1b é')
    hooks.wait_for("told", 2)
    assert "\n".join(hooks.read("told")) == 'ready|a|100 % of $HOME\n"quoted" \\x41\x1b é|'


def test_hooks_are_confined_and_an_administrator_changes_that_with_a_drop_in(hooks: Hooks) -> None:
    hooks.add("tell", "{ id -un; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status; } >> told")
    hooks.start()
    hooks.happens("a")
    assert hooks.wait_for("told", 3) == ["root", "NoNewPrivs:\t1", "Seccomp:\t2"]
    hooks.machine.run("chmod", "0666", f"{DIRECTORY}/told")
    drop_in = "/etc/systemd/system/gpusvc-hook-.service.d/user.conf"
    hooks.machine.write(drop_in, "[Service]\nUser=nobody\n")
    hooks.machine.run("systemctl", "daemon-reload")
    try:
        hooks.happens("b")
        assert hooks.wait_for("told", 6)[3] == "nobody"
    finally:
        hooks.machine.run("rm", drop_in)
        hooks.machine.run("systemctl", "daemon-reload")
