"""A machine whose models are asked all the time: what an upgrade must not disturb."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.host import Host

URL = "http://127.0.0.1:8484"
MODELS = ("qwen", "streamer")

# What the clients may find while gpusvc is upgraded.
GOOD = {"new: 200", "stream: 200", "kept: 200", "poll: 200", "look: ready"}

_STOP = "/run/stop-asking"

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


def start_models(machine: Host) -> None:
    """Two models: one on GPU 0, and one without a GPU that streams."""
    machine.write("/usr/local/bin/stream-engine", _ENGINE, mode=0o755)
    machine.write_model("qwen", arguments="--vram 4GiB", gpu='vram = "4GiB"\ndevices = [0]')
    machine.write_model("streamer", 'command = ["stream-engine", "{port}"]\n[gpu]\ncount = 0\n')
    machine.run("systemctl", "enable", "--now", *(f"model@{name}.service" for name in MODELS))
    machine.curl(f"{URL}/health")


@contextmanager
def asked(machine: Host) -> Iterator[dict[str, int]]:
    """All kinds of clients ask during the block; after it the dictionary has their results, counted by kind."""
    found: dict[str, int] = {}
    clients = machine.popen("python3", "-c", _CLIENTS, _STOP)
    assert clients.stdout is not None
    assert clients.stdout.readline() == "asking\n"
    yield found
    machine.write(_STOP, "")
    found.update(json.loads(clients.communicate(timeout=60)[0]))


def processes(machine: Host) -> dict[str, tuple[str, ...]]:
    """Of each model: its launcher's PID, its restarts, and its engine's PID."""
    rows = {row["name"]: str(row["pid"]) for row in json.loads(machine.run("gpusvc", "ps", "--json").stdout)}
    shown = {name: machine.properties(f"model@{name}.service", "MainPID", "NRestarts") for name in MODELS}
    return {name: (shown[name]["MainPID"], shown[name]["NRestarts"], rows[name]) for name in MODELS}


def version_served(machine: Host) -> str:
    """The version that the management API, behind the gateway, reports."""
    version: str = json.loads(machine.curl(f"{URL}/gpusvc/openapi.json"))["info"]["version"]
    return version
