"""Two machines behind HAProxy, as docs/fleet.md has it: requests find the models, and one machine dies."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.machine.host import REPOSITORY
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Layers
    from tests.machine.host import Host

# The release whose tree has HAProxy.
pytestmark = pytest.mark.generations(Generation.TRIXIE)

EXAMPLE = REPOSITORY / "docs/examples/haproxy-fleet.cfg"
ADDRESSES = ("192.0.2.1", "192.0.2.2")
URL = "http://127.0.0.1:8080"
QUESTION = {"role": "user", "content": "hello"}

SOCKET = """
[Socket]
ListenStream=
ListenStream=0.0.0.0:8484
"""

# One line for each answer: the status and which machine's engine it was. It ends with its input.
CLIENT = r"""
key=$1
while ! read -r -t 0.05 _; do
    curl --silent --max-time 60 --write-out '\n%{http_code}\n' http://127.0.0.1:8080/v1/chat/completions \
        -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
        -d '{"model": "qwen", "messages": [{"role": "user", "content": "hello"}]}' | tail -n 1
done
"""


class Fleet:
    """Two machines that reach each other; HAProxy is on the first."""

    def __init__(self, one: Host, two: Host) -> None:
        self.one, self.two = one, two
        _connect(one, two)
        self.key = one.run("gpusvc", "key", "add", "fleet").stdout.strip()
        two.run("install", "-D", "-m", "640", "-g", "gpusvc-gateway", "/dev/stdin", "/etc/gpusvc/keys.toml",
                input=one.read("/etc/gpusvc/keys.toml"))  # fmt: skip
        for machine in (one, two):
            for name in ("qwen", "coder"):
                machine.write_model(name)
            machine.write("/etc/systemd/system/gpusvc-gateway.socket.d/override.conf", SOCKET)
            machine.run("systemctl", "daemon-reload")
            machine.run("systemctl", "restart", "gpusvc-gateway.socket")
        one.write("/etc/haproxy/haproxy.cfg", EXAMPLE.read_text().replace("gsk_replace_me", self.key))
        one.run("systemctl", "restart", "haproxy.service")
        # It begins by believing in all of them.
        one.wait_until(lambda: not self.is_up("ready-coder", "one"), "HAProxy has looked at the first machine")
        one.wait_until(lambda: not self.is_up("ready-coder", "two"), "HAProxy has looked at the second machine")
        assert self.is_up("any", "one")
        assert self.is_up("any", "two")

    def is_up(self, backend: str, server: str) -> bool:
        """What HAProxy thinks of a machine, by its admin socket."""
        script = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        script += "s.sendall(b'show stat\\n'); print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
        rows = (line.split(",") for line in self.one.run("python3", "-c", script).stdout.splitlines())
        status = next(row[17] for row in rows if row[:2] == [backend, server])
        return status.startswith("UP")

    def ask(self, name: str) -> int:
        """The status of an answer of ``name``."""
        done = self.one.run(
            "curl", "--silent", "--max-time", "60", "--output", "/dev/null", "--write-out", "%{http_code}",
            "-H", f"Authorization: Bearer {self.key}", "-d", json.dumps({"model": name, "messages": [QUESTION]}),
            f"{URL}/v1/chat/completions", timeout=70, check=False,
        )  # fmt: skip
        return int(done.stdout)

    def where(self, name: str) -> list[str]:
        """On which machines a model is active."""
        machines = [("one", self.one), ("two", self.two)]
        return [which for which, machine in machines if machine.pid and machine.is_active(f"model@{name}.service")]


def _connect(one: Host, two: Host) -> None:
    """A switch in the first machine, and a cable to the second, which goes with either; addresses stay."""
    one.run("ip", "link", "add", "fleet0", "type", "bridge")
    enter = ("nsenter", "--target", str(one.pid), "--net", "--")
    subprocess.run(
        [*enter, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "fleet0", "netns", str(two.pid)],
        check=True, timeout=10,
    )  # fmt: skip
    one.run("ip", "link", "set", "cable", "master", "fleet0", "up")
    for machine, address in zip((one, two), ADDRESSES, strict=True):
        machine.run("ip", "address", "add", f"{address}/24", "dev", "fleet0")
        machine.run("ip", "link", "set", "fleet0", "up")


@pytest.fixture
def fleet(generation: Generation, layers: Layers) -> Iterator[Fleet]:
    with layers.boot(generation) as one, layers.boot(generation) as two:
        yield Fleet(one, two)


def test_requests_find_the_machine_where_their_model_is_and_go_on_when_one_dies(fleet: Fleet) -> None:
    # A model that is ready nowhere is loaded once, whoever asks how often.
    assert [fleet.ask("coder") for _ in range(4)] == [200] * 4
    assert len(fleet.where("coder")) == 1

    # One that is ready somewhere is found there, wherever its name would lead.
    fleet.two.start("qwen")
    fleet.one.wait_until(lambda: fleet.is_up("ready-qwen", "two"), "HAProxy sees qwen on the second machine")
    assert not fleet.is_up("ready-qwen", "one")
    assert [fleet.ask("qwen") for _ in range(4)] == [200] * 4
    assert fleet.where("qwen") == ["two"]

    # The machine that has it dies while clients go on.
    client = fleet.one.popen("bash", "-c", CLIENT, "client", fleet.key)
    assert client.stdout is not None
    assert [int(client.stdout.readline()) for _ in range(5)] == [200] * 5
    fleet.two.cut_power()
    fleet.one.wait_until(lambda: fleet.where("qwen") == ["one"], "qwen is loaded on the machine that is left")
    answers = [int(client.stdout.readline()) for _ in range(10)]
    assert answers[-5:] == [200] * 5, answers
    assert len([status for status in answers if status != 200]) <= 1, answers  # what was under way, at most
    assert fleet.ask("coder") == 200
    client.communicate("\n", timeout=60)
