"""What no container has: a clock to set, a kernel of its own, a memory controller, an OOM killer."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.machine import computer as computers
from tests.machine import tree
from tests.machine.computer import Computer
from tests.machine.host import Host
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Layers

# All of it on one machine that takes a minute to boot.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("whole-machine")]

HUNGRY = "model@hungry.service"
LIMIT = "120M"

# An engine that takes 400 MiB when it is asked to: itself, or by a child.
_HUNGRY_ENGINE = r"""#!/usr/bin/python3
import http.server, os, sys, time
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health" or (self.path == "/child" and os.fork()):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        taken = b"x" * (400 << 20)
        time.sleep(600)
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


@pytest.fixture(scope="module")
def computer(layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    """A computer with Debian's kernel, simulated GPUs and engines, on which apt has installed gpusvc."""
    if not Computer.can_be_played():
        pytest.skip(f"THE WHOLE MACHINE IS NOT TESTED: there is no {computers.EMULATOR} (package qemu-system-x86).")
    packages = tmp_path_factory.mktemp("packages")
    (packages / "gpusvc.deb").write_bytes(layers.package().read_bytes())
    scanned = subprocess.run(["dpkg-scanpackages", "."], cwd=packages, capture_output=True, check=True, timeout=60)
    with Host(tree.ensure(Generation.TRIXIE, kernel=True), name="whole-layer") as host:
        host.boot()
        host.add_gpus()
        host.add_engines()
        host.write("/srv/packages/gpusvc.deb", (packages / "gpusvc.deb").read_bytes())
        host.write("/srv/packages/Packages", scanned.stdout)
        host.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/packages ./\n")
        host.write("/usr/local/bin/hungry-engine", _HUNGRY_ENGINE, mode=0o755)
        host.write("/usr/local/lib/test-agent", computers.AGENT)
        host.write("/etc/systemd/system/test-agent.service", computers.AGENT_UNIT)
        host.run("systemctl", "enable", "test-agent.service")
        host.shut_down()
        machine = Computer(host.root, tmp_path_factory.mktemp("computer"))
    with machine:
        machine.switch_on()
        apt = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "-oDpkg::Use-Pty=0")
        machine.run(*apt, "update", timeout=120)
        machine.run(*apt, "install", "gpusvc", timeout=300)
        yield machine


def write_engine(computer: Computer, name: str, more: str, *arguments: str) -> None:
    """A model file for the test engine with these arguments, and more keys."""
    command = json.dumps(["test-engine", "--port", "{port}", "--model", name, *arguments])
    computer.write(f"/etc/gpusvc/models/{name}.toml", f"command = {command}\n{more}")


def start_hungry(computer: Computer, *, scope: str = "") -> None:
    """An engine that will be hungry, and whose end is left as it is."""
    computer.run("systemctl", "stop", HUNGRY)
    computer.run("systemctl", "reset-failed", HUNGRY, check=False)
    command = 'command = ["/usr/local/bin/hungry-engine", "{port}"]'
    computer.write("/etc/gpusvc/models/hungry.toml", f"{command}\n[gpu]\ncount = 0\n[scope]\n{scope}\n")
    computer.write(f"/run/systemd/system/{HUNGRY}.d/test.conf", "[Service]\nRestart=no\n")
    computer.run("systemctl", "daemon-reload")
    computer.run("systemctl", "start", HUNGRY, timeout=120)


def feed(computer: Computer, path: str) -> str:
    """Has the engine take what it may not have; what the journal says of that, once the unit is over."""
    rows = json.loads(computer.run("gpusvc", "ps", "--json").stdout)
    port = next(row["port"] for row in rows if row["name"] == "hungry")
    computer.run("curl", "-s", "-m", "30", f"http://127.0.0.1:{port}{path}", check=False)
    computer.wait_until(
        lambda: computer.property(HUNGRY, "ActiveState") in ("failed", "inactive"), "the unit ended", unit=HUNGRY
    )
    return computer.journal(HUNGRY)


def assert_answers(computer: Computer, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "the water"}]})
    curl = ("curl", "-s", "-m", "200", "-d", body, "http://127.0.0.1:8484/v1/chat/completions")
    answer = computer.run(*curl, check=False, timeout=240).stdout
    assert "You said: the water" in answer, computer.journal("gpusvc-*.service")


def is_active(computer: Computer, unit: str) -> bool:
    return computer.property(unit, "ActiveState") == "active"


def await_eviction(computer: Computer, model: str) -> None:
    """By the watchdog, which has then looked at all others as well."""
    unit = f"model@{model}.service"
    computer.wait_until(lambda: not is_active(computer, unit), f"{model} was evicted", unit="gpusvc-watchdog.service")
    computer.wait_until(
        lambda: computer.property(unit, "ActiveState") == "inactive", f"{model} has been released", unit=unit
    )


def test_models_that_are_enabled_are_up_after_a_reboot(computer: Computer) -> None:
    gpu = '[gpu]\ndevices = [1]\nvram = "4GiB"\n'
    write_engine(computer, "qwen", gpu, "--vram", "4GiB")
    write_engine(computer, "plain", "[gpu]\ncount = 0\n")
    write_engine(computer, "early", f"preload = true\n{gpu}", "--vram", "4GiB")
    computer.run("systemctl", "enable", "model@qwen.service", "model@plain.service")
    computer.reboot()

    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in json.loads(computer.run("gpusvc", "ps", "--json").stdout)}

    wanted = {"qwen": "ready", "plain": "ready", "early": "ready"}
    computer.wait_until(lambda: wanted.items() <= states().items(), "all are up", unit="model@*.service")
    assert computer.run("systemctl", "is-system-running").stdout == "running\n"
    assert "GPU 1" in computer.property("model@qwen.service", "StatusText")
    assert_answers(computer, "qwen")
    units = ("model@qwen.service", "model@plain.service", "model@early.service")
    computer.run("systemctl", "disable", "--now", *units, timeout=120)
    assert "4.0 GiB of VRAM on GPU 1 came back" in computer.journal("model@qwen.service")


def test_a_memory_limit_ends_the_engine_and_not_the_launcher_which_says_so(computer: Computer) -> None:
    start_hungry(computer, scope=f'MemoryMax = "{LIMIT}"')
    launcher = computer.property(HUNGRY, "MainPID")
    said = feed(computer, "/eat")
    assert f"because it reached its memory limit (MemoryMax={LIMIT})" in said
    assert "hungry is released" in said
    killed = computer.run("journalctl", "-k", "-b", "-o", "cat", "--grep", "Killed process").stdout
    assert f"Killed process {launcher} " not in killed
    assert "MemoryMax=" in computer.run("gpusvc", "status", "hungry", check=False).stdout
    assert computer.property(HUNGRY, "Result") == "signal"


def test_an_engine_that_loses_a_part_to_its_memory_limit_has_failed(computer: Computer) -> None:
    start_hungry(computer, scope=f'MemoryMax = "{LIMIT}"')
    said = feed(computer, "/child")
    assert f"because it reached its memory limit (MemoryMax={LIMIT})" in said
    assert computer.property(HUNGRY, "ActiveState") == "failed"


def test_the_limit_of_all_engines_is_not_taken_for_that_of_one(computer: Computer) -> None:
    start_hungry(computer)
    computer.run("systemctl", "set-property", "--runtime", "gpusvc-models.slice", f"MemoryMax={LIMIT}")
    try:
        said = feed(computer, "/eat")
    finally:
        computer.run("systemctl", "set-property", "--runtime", "gpusvc-models.slice", "MemoryMax=infinity")
    assert "memory ran out outside its own limits" in said


def test_whoever_sets_the_clock_makes_nobody_idle_and_nobody_stay(computer: Computer) -> None:
    write_engine(computer, "fresh", 'idle_timeout = "1h"\n[gpu]\ncount = 0\n')
    write_engine(computer, "used", 'idle_timeout = "5s"\n[gpu]\ncount = 0\n')
    write_engine(computer, "decoy", 'idle_timeout = "5s"\n[gpu]\ncount = 0\n')
    use = ("gpusvc", "use", "used", "--", "sleep", "infinity")
    computer.run("systemctl", "start", "model@fresh.service", timeout=120)
    computer.run("systemd-run", "--unit=user-of-used", *use)
    computer.wait_until(lambda: is_active(computer, "model@used.service"), "used is up", unit="model@used.service")
    offset = 0
    try:
        for days in (1, -2):
            computer.run("systemctl", "start", "model@decoy.service", timeout=120)
            computer.run("date", "--set", f"{days * 24} hours")
            offset += days
            await_eviction(computer, "decoy")
            assert is_active(computer, "model@fresh.service"), computer.journal("gpusvc-watchdog.service")
            assert is_active(computer, "model@used.service"), computer.journal("gpusvc-watchdog.service")
            assert_answers(computer, "fresh")
        # It was used for the last time tomorrow, and is idle today.
        computer.run("systemctl", "stop", "user-of-used.service")
        computer.run("touch", "-d", "tomorrow", "/run/gpusvc/models/used/use")
        await_eviction(computer, "used")
        computer.run("systemctl", "stop", "model@fresh.service", timeout=120)
        assert "fresh is released" in computer.journal("model@fresh.service")
    finally:
        computer.run("date", "--set", f"{-offset * 24} hours")
