"""An upgrade while models run and clients are served: nobody notices but who asks for the version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from gpusvc import __version__
from tests.machine import packages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.conftest import Layers
    from tests.machine.host import Host
    from tests.machine.tree import Generation

NEWER = f"{__version__}+newer"
URL = "http://127.0.0.1:8484"
GATEWAY = "gpusvc-gateway.service"
MODELS = ("qwen", "streamer")

# Chunked events, one each 50 ms, for as long as they were asked for; anything else is answered at once.
_ENGINE = r"""#!/usr/bin/python3
import http.server, json, sys, time
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"{}")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked.get("stream"):
            return self.answer(b"{}")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(asked["max_tokens"]):
            self.event("%d" % number)
            time.sleep(0.05)
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
    def event(self, text):
        data = b"data: %s\n\n" % text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""

# Until the file is there: new connections, kept ones, streams, who polls, and who looks with the command. Prints how
# many of each ended in which way.
_CLIENTS = r"""
import collections, http.client, json, os, subprocess, sys, threading, time
stop, found = sys.argv[1], collections.Counter()
EVENTS = 30

def connect():
    return http.client.HTTPConnection("127.0.0.1", 8484, timeout=60)

def chat(model, **more):
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], **more})

def request(connection, method, path, body=None):
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()

def once(method, path, body=None):
    connection = connect()
    try:
        return str(request(connection, method, path, body)[0])
    finally:
        connection.close()

def new():
    return once("POST", "/v1/chat/completions", chat("qwen"))

def stream():
    connection = connect()
    status, data = request(connection, "POST", "/v1/chat/completions", chat("streamer", stream=True, max_tokens=EVENTS))
    connection.close()
    whole = b"".join(b"data: %d\n\n" % number for number in range(EVENTS)) + b"data: [DONE]\n\n"
    return str(status) if data == whole else f"{status}, broken after {len(data)} bytes"

def kept(connections=[None]):
    # Whoever keeps a connection has to expect that it is closed between two requests (RFC 9112, 9.6).
    if connections[0] is not None:
        try:
            return str(request(connections[0], "POST", "/v1/chat/completions", chat("qwen"))[0])
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            pass
    connections[0] = connect()
    return str(request(connections[0], "POST", "/v1/chat/completions", chat("qwen"))[0])

def poll(paths=["/health", "/v1/models", "/gpusvc/models", "/metrics"]):
    paths.append(paths.pop(0))
    return once("GET", paths[0])

def look():
    done = subprocess.run(["gpusvc", "ps", "--json"], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return ",".join(sorted({row["state"] for row in json.loads(done.stdout)}))

def again(kind):
    while not os.path.exists(stop):
        try:
            found[f"{kind.__name__}: {kind()}"] += 1
        except Exception as error:
            found[f"{kind.__name__}: {error!r}"] += 1
        time.sleep(0.02)  # the upgrade has to get on as well

kinds = (new, new, stream, stream, stream, kept, poll, look)
threads = [threading.Thread(target=again, args=(kind,)) for kind in kinds]
for each in threads: each.start()
print("asking", flush=True)
for each in threads: each.join()
print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What became of a machine. ``found`` are the clients' answers, counted by kind."""

    machine: Host
    processes: dict[str, tuple[str, ...]]
    """Of each model: its launcher's PID, its restarts, and its engine's PID. Before the upgrade."""
    gateway: str
    found: dict[str, int]


def processes(machine: Host) -> dict[str, tuple[str, ...]]:
    rows = {row["name"]: str(row["pid"]) for row in json.loads(machine.run("gpusvc", "ps", "--json").stdout)}
    shown = {name: machine.properties(f"model@{name}.service", "MainPID", "NRestarts") for name in MODELS}
    return {name: (shown[name]["MainPID"], shown[name]["NRestarts"], rows[name]) for name in MODELS}


@pytest.fixture(scope="module")
def upgrade(generation: Generation, layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgrade]:
    """A machine that was upgraded while two models ran and all kinds of clients were served."""
    changes = {
        "gpusvc/__init__.py": (f'"{__version__}"', f'"{NEWER}"'),
        "gpusvc/state/counters.py": ("0x67707573_76630001", "0x67707573_76630002"),  # counts of another layout
    }
    newer = packages.newer(
        layers.package(),
        tmp_path_factory.mktemp("newer"),
        version=NEWER,
        changes={packages.MODULES + name.removeprefix("gpusvc"): change for name, change in changes.items()},
    )
    with layers.boot(generation) as machine:
        machine.write("/usr/local/bin/stream-engine", _ENGINE, mode=0o755)
        machine.write_model("qwen", arguments="--vram 4GiB", gpu='vram = "4GiB"\ndevices = [0]')
        machine.write_model("streamer", 'command = ["stream-engine", "{port}"]\n[gpu]\ncount = 0\n')
        machine.run("systemctl", "enable", "--now", *(f"model@{name}.service" for name in MODELS))
        machine.curl(f"{URL}/health")
        before, gateway = processes(machine), machine.property(GATEWAY, "MainPID")
        clients = machine.popen("python3", "-c", _CLIENTS, "/run/stop-asking")
        assert clients.stdout is not None
        assert clients.stdout.readline() == "asking\n"
        machine.install(newer)
        machine.wait_until(lambda: version_served(machine) == NEWER, "the new one answers", unit=GATEWAY)
        machine.write("/run/stop-asking", "")
        found = json.loads(clients.communicate(timeout=60)[0])
        yield Upgrade(machine, before, gateway, found)


def version_served(machine: Host) -> str:
    """What the management API, behind the gateway, says of itself."""
    version: str = json.loads(machine.curl(f"{URL}/gpusvc/openapi.json"))["info"]["version"]
    return version


def test_every_request_is_answered_and_no_stream_breaks(upgrade: Upgrade) -> None:
    good = {"new: 200", "stream: 200", "kept: 200", "poll: 200", "look: ready"}
    assert set(upgrade.found) == good, upgrade.found
    assert upgrade.found["new: 200"] > 50


def test_no_model_is_stopped_or_started(upgrade: Upgrade) -> None:
    assert processes(upgrade.machine) == upgrade.processes
    for name in MODELS:
        assert upgrade.machine.property(f"model@{name}.service", "NeedDaemonReload") == "no"
    events = json.loads(upgrade.machine.run("gpusvc", "events", "--json").stdout)
    assert sorted(event["model"] for event in events if event["event"] == "start") == [*MODELS]
    assert {event["event"] for event in events} == {"start", "ready"}


def test_all_that_serves_is_new(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    assert machine.run("gpusvc", "--version").stdout == f"gpusvc {NEWER}\n"
    assert machine.property(GATEWAY, "MainPID") != upgrade.gateway
    assert machine.run("systemctl", "is-system-running").stdout == "running\n"


def test_counts_of_another_layout_make_way_with_a_message(upgrade: Upgrade) -> None:
    assert "of another version of gpusvc" in upgrade.machine.journal(GATEWAY, "-o", "cat")
    assert "gpusvc_model_requests_total{" in upgrade.machine.curl(f"{URL}/metrics")


def test_files_of_another_version_are_set_aside_with_a_message(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    lease, footprint = "/run/gpusvc/models/qwen/lease.json", "/var/lib/gpusvc/footprints/qwen.json"
    held = json.loads(machine.read(lease))
    machine.write(lease, json.dumps({**held, "version": 0}))
    machine.write(footprint, json.dumps({"version": 0, "peaks": {}}))
    machine.stop("qwen")
    assert machine.remains("qwen") == []
    assert f"The lease {lease} cannot be read (ValueError: version 0)" in machine.messages("qwen")
    machine.run("test", "-e", lease.replace(".json", ".broken"))

    machine.start("qwen")
    assert "is set aside as qwen.broken: its model is learned anew." in machine.messages("qwen")
    assert json.loads(machine.read(footprint))["version"] == 1


def test_a_lease_of_another_version_on_a_disk_of_old_keeps_no_model_from_starting(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    machine.stop("streamer")
    machine.write("/run/gpusvc/models/streamer/lease.json", json.dumps({"version": 99, "model": "streamer"}))
    machine.start("streamer")
    assert "cannot be read (ValueError: version 99)" in machine.messages("streamer")


def test_keys_of_another_version_let_nobody_in_and_say_why(upgrade: Upgrade) -> None:
    machine = upgrade.machine
    machine.write("/etc/gpusvc/keys.toml", "version = 2\n", mode=0o640)
    machine.run("chgrp", "gpusvc-gateway", "/etc/gpusvc/keys.toml")
    machine.wait_until(
        lambda: "/etc/gpusvc/keys.toml: version" in machine.journal(GATEWAY, "-o", "cat"), "it is told", unit=GATEWAY
    )
    status = ("--silent", "--output", "/dev/null", "--write-out", "%{http_code}")
    assert machine.run("curl", *status, f"{URL}/gpusvc/openapi.json").stdout == "401"
    # A file that is gone again changes nothing by itself.
    machine.remove("/etc/gpusvc/keys.toml")
    machine.run("systemctl", "restart", GATEWAY)
    assert version_served(machine) == NEWER
