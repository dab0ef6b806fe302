"""A port that answers proves nothing: ready is a model whose own socket answers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.TRIXIE)

PORT = 8123

# A server that shares its port with whoever else of its user wants to (SO_REUSEPORT), and is healthy at once.
TWIN = """#!/usr/bin/python3 -IS
import http.server, socket, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

class Server(http.server.HTTPServer):
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def write(machine: Host, name: str, *command: str, keys: str = "") -> None:
    """A model on the port, with this engine; a failure is not tried again, so that it can be looked at."""
    timeout = "" if "start_timeout" in keys else 'start_timeout = "1s"\n'
    keys = f"port = {PORT}\n{timeout}{keys}"
    machine.write_model(name, f"command = {json.dumps(command)}\n{keys}\n[gpu]\ncount = 0\n")
    machine.write(f"/run/systemd/system/model@{name}.service.d/once.conf", "[Service]\nRestart=no\n")
    machine.run("systemctl", "daemon-reload")


def start_stranger(machine: Host, *command: str, user: str = "nobody") -> int:
    """A program of somebody else's that answers on the port; its PID."""
    unit = ("--quiet", "--collect", "--unit=stranger", f"--uid={user}")
    machine.run("systemd-run", *unit, *(command or ("test-engine", "--port", str(PORT))))
    machine.wait_until(lambda: answers(machine, PORT), "the other program answers", unit="stranger.service")
    return int(machine.property("stranger.service", "MainPID"))


def stop_stranger(machine: Host) -> None:
    machine.run("systemctl", "stop", "stranger.service")


def answers(machine: Host, port: int) -> bool:
    asking = ("curl", "-sf", "-o", "/dev/null", f"http://127.0.0.1:{port}/health")
    return machine.run(*asking, check=False).returncode == 0


def await_failure(machine: Host, name: str) -> str:
    machine.wait_for_state(f"model@{name}.service", "failed")
    return machine.messages(name)


def test_a_port_that_another_program_answers_on_fails_the_start_and_names_it(machine: Host) -> None:
    pid = start_stranger(machine)
    write(machine, "late", "test-engine", "--port", "{port}")
    said = machine.fail_to_start("late")
    stop_stranger(machine)
    sentence = rf"Port {PORT} is taken by another program: PID {pid} \(.*test-engine --port {PORT}\) of nobody"
    assert re.search(sentence, said), said
    assert "Ready" not in said


def test_a_program_that_answers_while_the_engine_loads_does_not_make_it_ready(machine: Host) -> None:
    write(machine, "loading", "sleep", "1000", keys='health = ""')
    machine.run("systemctl", "start", "--no-block", "model@loading.service")
    machine.wait_until(lambda: machine.pids("model-loading.scope"), "it loads", unit="model@loading.service")
    pid = start_stranger(machine)
    said = await_failure(machine, "loading")
    stop_stranger(machine)
    assert f"Port {PORT} is taken by another program: PID {pid}" in said
    assert "Ready" not in said


def test_a_twin_that_shares_the_port_does_not_make_it_ready(machine: Host) -> None:
    machine.write("/usr/local/bin/twin", TWIN, mode=0o755)
    # The engine comes to the port later, and may: both share it, and are of one user.
    write(machine, "shared", "sh", "-c", "sleep 0.5; exec twin $PORT")
    machine.run("systemctl", "start", "--no-block", "model@shared.service")
    machine.wait_until(lambda: machine.pids("model-shared.scope"), "it loads", unit="model@shared.service")
    pid = start_stranger(machine, "/usr/local/bin/twin", str(PORT), user="gpusvc")
    said = await_failure(machine, "shared")
    stop_stranger(machine)
    assert f"PID {pid}" in said
    assert "Ready" not in said


def test_a_free_port_is_found_beside_programs_that_listen(machine: Host) -> None:
    machine.write_model("mover")
    machine.start("mover")
    usual = int(machine.url("mover").rpartition(":")[2])
    machine.stop("mover")
    machine.run("systemd-run", "--quiet", "--collect", "--unit=stranger", "test-engine", "--port", str(usual))
    machine.wait_until(lambda: answers(machine, usual), "the other program answers", unit="stranger.service")
    machine.start("mover")
    stop_stranger(machine)
    assert answers(machine, int(machine.url("mover").rpartition(":")[2]))
    assert not answers(machine, usual)


def test_an_engine_that_listens_on_another_port_never_is_ready(machine: Host) -> None:
    write(machine, "elsewhere", "test-engine", "--port", str(PORT + 1), keys='start_timeout = "4s"')
    unit = "model@elsewhere.service"
    machine.run("systemctl", "start", "--no-block", unit)
    named = f"It listens on port {PORT + 1}, not on port {PORT}."
    machine.wait_until(lambda: named in machine.property(unit, "StatusText"), "its port is named", unit=unit)
    said = await_failure(machine, "elsewhere")
    assert f"made no progress for 4s, and it listens on port {PORT + 1}, not on port {PORT}." in said
    assert f"or set `port = {PORT + 1}` in the model's file." in said


def test_an_engine_whose_health_path_does_not_answer_well_never_is_ready(machine: Host) -> None:
    write(machine, "ill", "test-engine", "--port", "{port}", keys='health = "/nowhere"')
    assert f"/nowhere does not answer on port {PORT}" in machine.fail_to_start("ill")


def test_an_open_port_is_enough_for_a_model_without_a_health_path(machine: Host) -> None:
    write(machine, "simple", "test-engine", "--port", "{port}", "--never-ready", keys='health = ""')
    machine.start("simple")
    assert machine.is_active("model@simple.service")


@pytest.mark.parametrize(("case", "address"), [("ipv6", "::1"), ("all", "0.0.0.0"), ("second", "127.0.0.2")])
def test_an_engine_is_found_at_whatever_address_it_listens(machine: Host, case: str, address: str) -> None:
    write(machine, f"at-{case}", *listening_at(address))
    machine.start(f"at-{case}")
    row = machine.ps(f"at-{case}")
    assert row is not None
    assert row["address"] == {"0.0.0.0": "127.0.0.1"}.get(address, address)


def listening_at(address: str) -> tuple[str, ...]:
    if ":" not in address:
        return ("test-engine", "--port", "{port}", "--listen", address)
    script = (
        "import http.server, os, socket;"
        "http.server.HTTPServer.address_family = socket.AF_INET6;"
        "handler = http.server.SimpleHTTPRequestHandler;"
        "handler.do_GET = lambda self: (self.send_response(200), self.end_headers());"
        f"http.server.HTTPServer(('{address}', int(os.environ['PORT'])), handler).serve_forever()"
    )
    return ("python3", "-c", script)


# Takes the port as soon as it is free, and notes what it is asked: in the /tmp of the machine, or an engine's own.
THIEF = """#!/usr/bin/python3 -IS
import http.server, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        open("/tmp/stolen", "ab").write(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

while True:
    try:
        server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    except OSError:
        time.sleep(0.01)
    else:
        server.serve_forever()
"""


def test_whoever_takes_the_port_of_a_killed_model_gets_no_request(machine: Host) -> None:
    machine.write("/usr/local/bin/thief", THIEF, mode=0o755)
    write(machine, "killed", "thief", "{port}")
    machine.start("killed")
    body = json.dumps({"model": "killed", "messages": []})
    ask = ("curl", "-s", "-m", "5", "http://127.0.0.1:8484/v1/chat/completions", "-d", body)
    assert machine.run(*ask).stdout == "{}"
    # The proof, which removes the lease, waits until it is let go.
    machine.override(
        "killed",
        "Restart=no",
        "ExecStopPost=",
        "ExecStopPost=/bin/sh -c 'until test -e /run/go; do sleep 0.1; done; exec python3 -I -m gpusvc.release killed'",
    )
    machine.run("systemd-run", "--quiet", "--collect", "--unit=stranger", "--uid=gpusvc", "thief", str(PORT))
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "model@killed.service")
    machine.run("systemctl", "kill", "--signal=KILL", "model-killed.scope", check=False)
    machine.wait_until(lambda: answers(machine, PORT), "the thief has the port", unit="stranger.service")
    lease = json.loads(machine.read("/run/gpusvc/models/killed/lease.json"))
    assert (lease["ready"], lease["address"], lease["port"]) == (True, "127.0.0.1", PORT)
    answered = [machine.run(*ask, check=False).stdout for _ in range(3)]
    assert machine.run("cat", "/tmp/stolen", check=False).stdout == ""
    said = machine.journal("gpusvc-gateway.service")
    assert "is not sent: another program has taken its port" in said, (answered, said)

    machine.run("touch", "/run/go")
    stop_stranger(machine)
    machine.wait_for_state("model@killed.service", "failed", "inactive", "active")
    machine.remove("/run/go")


def test_a_twin_that_comes_after_the_start_fails_the_model(machine: Host) -> None:
    machine.write("/usr/local/bin/twin", TWIN, mode=0o755)
    write(machine, "shared", "twin", "{port}", keys='user = "nobody"\nhealth_timeout = "2s"')
    machine.start("shared")
    pid = start_stranger(machine, "twin", str(PORT))
    assert f"Port {PORT} is taken by another program: PID {pid} " in await_failure(machine, "shared")
    stop_stranger(machine)
