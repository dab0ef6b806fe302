#!/usr/bin/python3 -IS
"""A model server that misbehaves on request: the tests' engine, and the demo's where there is no real one.

It serves ``GET /health`` (503 until loaded, then 200), ``GET /v1/models`` and ``POST /v1/chat/completions``, takes
simulated VRAM through ``libfakecuda.so`` where asked to, and has a switch for each thing that real engines do wrong.
Standard library only, one file, started in a few tens of milliseconds: it is copied into machines as ``test-engine``.

SIGUSR1 makes it hang: connections are accepted and nothing is ever answered. SIGUSR2 makes it wedged: ``/health`` stays
200, and every chat is answered with 500. A request with ``Upgrade: websocket`` becomes a connection that echoes bytes.
"""

# Nothing is imported that takes long.
# ruff: noqa: PTH109, PTH115, PTH123, PTH208, SIM105

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import signal
import socket
import sys
import threading
import time

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Processes alive at a time in a fork storm, and how long each lives before it forks its successor and exits.
STORM_SIZE = 200
STORM_SECONDS = 1.0

CHILD_KINDS = ("plain", "setsid", "double-fork", "ignore-term", "sigstop", "fork-storm", "daemonise")


def main() -> None:
    options = parse_options()
    if options.ignore_term:
        ignore_polite_signals()
    else:
        signal.signal(signal.SIGTERM, lambda *_: stop(options.stop_seconds))
    gpus = Gpus(options.gpu_library) if options.vram or options.child_vram else None
    for kind in options.children:  # before there are threads, which don't go with fork
        start_child(kind, gpus, options.child_vram)
    server = Server(options, gpus)
    say(f"serving {options.model} on {options.listen}:{options.port}, {len(gpus.uuids) if gpus else 0} GPUs visible")
    load(options, gpus)
    if options.oom:
        print("ggml_cuda: CUDA error: out of memory", file=sys.stderr, flush=True)
        os._exit(1)
    if options.die_after_load:
        die(options)
    if not options.never_ready:
        server.is_loaded = True
        say("loaded")
        if options.flood:
            flood(options.flood)
    elif options.burn == "cpu":
        while True:
            pass
    while True:
        signal.pause()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test-engine", allow_abbrev=False)
    add = parser.add_argument
    add("--port", type=int, default=int(os.environ.get("PORT", "0")), help="default: $PORT")
    add("--listen", default="127.0.0.1", metavar="ADDRESS")
    add("--model", default="test", metavar="NAME", help="what /v1/models lists")
    add("--vram", type=size, default=0, metavar="SIZE", help="taken on each visible GPU, in steps while it loads")
    add("--load-seconds", type=float, default=0.0, metavar="S")
    add("--load-steps", type=int, default=8, metavar="N")
    add("--children", type=kinds, default=[], metavar="KIND,…", help=", ".join(CHILD_KINDS))
    add("--child-vram", type=size, default=0, metavar="SIZE", help="taken by each child on the first visible GPU")
    add("--gpu-library", default="libfakecuda.so", metavar="FILE")
    add("--oom", action="store_true", help="run out of memory at the end of the load")
    add("--die-after-load", action="store_true", help="instead of becoming ready")
    add("--die-after-health", type=int, default=0, metavar="N", help="after the Nth good answer to /health")
    add("--exit-status", type=int, default=1, metavar="N", help="how to die")
    add("--kill-self", type=signal_number, default=0, metavar="SIGNAL", help="how to die, instead of exiting")
    add("--never-ready", action="store_true", help="load for ever")
    add("--burn", choices=("cpu", "idle"), default="idle", help="what to do while loading for ever")
    add("--hang-health", action="store_true", help="/health is never answered; see also SIGUSR1")
    add("--flood", type=int, default=0, metavar="N", help="lines that it writes each second once it is loaded")
    add("--ignore-term", action="store_true", help="ignore SIGTERM, SIGINT and SIGHUP")
    add("--stop-seconds", type=float, default=0.0, metavar="S", help="what stopping takes after SIGTERM")
    return parser.parse_args()


def size(text: str) -> int:
    digits = text.removesuffix("B").removesuffix("i")
    unit = digits[-1:] if digits[-1:].isalpha() else ""
    return int(float(digits.removesuffix(unit)) * UNITS[unit.upper()])


def kinds(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CHILD_KINDS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(CHILD_KINDS)}")
    return names


def signal_number(text: str) -> int:
    return int(text) if text.isdigit() else signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value


def say(text: str) -> None:
    print(f"test-engine: {text}", file=sys.stderr, flush=True)


def stop(seconds: float) -> None:
    say("stopping")
    time.sleep(seconds)
    os._exit(0)


def die(options: argparse.Namespace) -> None:
    say("dying")
    if options.kill_self:
        # In C, as Python changes the way of a signal in its main thread only. Whichever thread it hits, it has time.
        ctypes.CDLL(None).signal(options.kill_self, None)  # SIG_DFL
        os.kill(os.getpid(), options.kill_self)
        time.sleep(5)
    os._exit(options.exit_status)


def load(options: argparse.Namespace, gpus: Gpus | None) -> None:
    """Takes the VRAM in equal steps, over the load's time; exits like a CUDA program when that is too much."""
    steps = max(1, options.load_steps)
    for step in range(steps):
        if gpus and options.vram:
            share = options.vram * (step + 1) // steps - options.vram * step // steps
            for uuid in gpus.uuids:
                gpus.allocate(uuid, share)
        time.sleep(options.load_seconds / steps)


def flood(lines: int) -> None:
    """Writes so many lines a second, for ever."""
    number = 0
    while True:
        began = time.monotonic()
        text = "".join(f"slot update {number + line} {'x' * 100}\n" for line in range(max(lines // 10, 1)))
        number += max(lines // 10, 1)
        sys.stderr.write(text)
        sys.stderr.flush()
        time.sleep(max(0.0, began + 0.1 - time.monotonic()))


class Gpus:
    """The simulated GPUs that this process may see, as CUDA chooses them by CUDA_VISIBLE_DEVICES."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        uuids = ctypes.create_string_buffer(4096)
        self._library.fake_visible(uuids, ctypes.c_size_t(len(uuids)))
        self.uuids = [uuid for uuid in uuids.value.decode().split(",") if uuid]
        self._library.fake_alloc.argtypes = (ctypes.c_char_p, ctypes.c_ulonglong)
        self._library.fake_alloc.restype = ctypes.c_int
        if not self.uuids:
            print("CUDA error: no CUDA-capable device is detected", file=sys.stderr, flush=True)
            os._exit(1)

    def allocate(self, uuid: str, amount: int) -> None:
        if self._library.fake_alloc(uuid.encode(), amount) != 0:
            print("ggml_cuda: CUDA error: out of memory", file=sys.stderr, flush=True)
            os._exit(1)


def start_child(kind: str, gpus: Gpus | None, vram: int) -> None:
    """Starts a child that is hard to end, and returns when it holds its VRAM and has become what it is meant to be."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        try:
            run_child(kind, gpus, vram, done)
        finally:
            os._exit(1)
    os.close(done)
    if os.read(ready, 1) != b"+":
        say(f"child {kind} failed")
        os._exit(1)
    os.close(ready)


def run_child(kind: str, gpus: Gpus | None, vram: int, done: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if kind in ("setsid", "double-fork", "daemonise"):
        os.setsid()
    if kind in ("double-fork", "daemonise") and os.fork() != 0:
        os._exit(0)
    if kind in ("ignore-term", "fork-storm"):
        ignore_polite_signals()
    set_name(f"engine-{kind}"[:15])
    if gpus and vram:
        gpus.allocate(gpus.uuids[0], vram)
    if kind == "fork-storm":
        os.write(done, b"+")
        os.close(done)
        storm()
    if kind == "daemonise":
        os.chdir("/")
        os.umask(0)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(done, b"+")
        # All but the files that hold the VRAM: to close one of those is to free it.
        close_descriptors(keep=vram_descriptors())
    else:
        os.write(done, b"+")
        os.close(done)
    while True:
        if kind == "sigstop":
            os.kill(os.getpid(), signal.SIGSTOP)
        signal.pause()


def storm() -> None:
    """Forks without end: whoever lists these processes finds others than those he then signals."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for number in range(STORM_SIZE):
        if os.fork() == 0:
            time.sleep(STORM_SECONDS * number / STORM_SIZE)  # spread over time
            while True:
                time.sleep(STORM_SECONDS)
                if os.fork() != 0:
                    os._exit(0)
    while True:  # this one keeps the VRAM
        signal.pause()


def ignore_polite_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def set_name(name: str) -> None:
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME


def vram_descriptors() -> set[int]:
    return {fd for fd in descriptors() if descriptor_target(fd).endswith(".vram")}


def close_descriptors(keep: set[int]) -> None:
    for fd in descriptors():
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # the directory that was listed


def descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def descriptor_target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _identity() -> dict[str, object]:
    with open("/proc/self/status") as file:
        status = dict(line.rstrip().split(":\t", 1) for line in file if ":\t" in line)
    ids = {"uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "cwd": os.getcwd()}
    fds = {fd: descriptor_target(fd) for fd in descriptors()}
    return {**ids, "capabilities": status["CapEff"], "no_new_privileges": status["NoNewPrivs"], "descriptors": fds}


class Server:
    """As little HTTP/1.1 as clients and health checks need; one thread per connection."""

    def __init__(self, options: argparse.Namespace, gpus: Gpus | None) -> None:
        self.options = options
        self._gpus = gpus
        self.is_loaded = False
        self.is_hung = False
        self.is_sick = False
        self.is_wedged = False
        self._healthy_answers = 0
        signal.signal(signal.SIGUSR1, self._hang)
        signal.signal(signal.SIGUSR2, self._wedge)
        self._socket = socket.create_server((options.listen, options.port), backlog=128)
        options.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _hang(self, *_: object) -> None:
        self.is_hung = True
        say("hanging")

    def _wedge(self, *_: object) -> None:
        self.is_wedged = True
        say("wedged")

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while request := stream.readline():
                    method, path, _ = request.decode("latin-1").split(" ", 2)
                    length, upgrade = 0, b""
                    while (line := stream.readline().strip()) != b"":
                        name, _, value = line.partition(b":")
                        if name.lower() == b"content-length":
                            length = int(value)
                        elif name.lower() == b"upgrade":
                            upgrade = value.strip().lower()
                    body = stream.read(length)
                    if self.is_hung or (self.options.hang_health and path == "/health"):
                        threading.Event().wait()
                    if upgrade == b"websocket" and self.is_loaded:
                        echo(connection, stream)
                        return
                    status, answer = self._answer(method, path, body)
                    data = json.dumps(answer).encode()
                    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
                    connection.sendall(head.encode() + data)
                    self._count(status, path)
            except (OSError, ValueError):
                return

    def _answer(self, method: str, path: str, body: bytes) -> tuple[str, dict[str, object]]:
        loading: dict[str, object] = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        if path == "/sicken":  # 500 to everything from now on
            self.is_sick = True
        if self.is_sick:
            return "500 Internal Server Error", {"error": {"code": 500, "message": "EngineDeadError"}}
        if not self.is_loaded and path in ("/health", "/v1/chat/completions"):
            return "503 Service Unavailable", loading
        if (method, path) == ("GET", "/health"):
            return "200 OK", {"status": "ok"}
        if (method, path) == ("GET", "/v1/models"):
            return "200 OK", {"object": "list", "data": [{"id": self.options.model, "object": "model"}]}
        if (method, path) == ("GET", "/self"):
            return "200 OK", {"environment": dict(os.environ), **_identity()}
        if (method, path) == ("POST", "/grow") and self._gpus is not None:  # as a cache that grows with its users
            for uuid in self._gpus.uuids:
                self._gpus.allocate(uuid, size(json.loads(body)["vram"]))
            return "200 OK", {}
        if (method, path) == ("POST", "/v1/chat/completions"):
            if self.is_wedged:
                return "500 Internal Server Error", {
                    "error": {"code": 500, "message": "CUDA error: unspecified failure"}
                }
            asked = json.loads(body)
            question = asked["messages"][-1]["content"]
            time.sleep(float(asked.get("seconds", 0)))  # how long the answer takes
            message = {"role": "assistant", "content": f"You said: {question}"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return "200 OK", {"object": "chat.completion", "model": self.options.model, "choices": [choice]}
        return "404 Not Found", {"error": {"code": 404, "message": f"{method} {path}"}}

    def _count(self, status: str, path: str) -> None:
        if path == "/health" and status.startswith("200"):
            self._healthy_answers += 1
            if self._healthy_answers == self.options.die_after_health:
                die(self.options)


def echo(connection: socket.socket, stream: io.BufferedReader) -> None:
    """Switches protocols, and sends back what comes until the client has enough."""
    connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    while data := stream.read1(65536):
        connection.sendall(data)


if __name__ == "__main__":
    main()
