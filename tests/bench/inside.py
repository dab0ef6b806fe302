"""The rounds of ``tests/bench/lifecycle``, run inside the machine; each sample is a line ``[what, value]`` of JSON.

Each round does everything once, in an order of its own, so that whatever else the machine does falls on all alike.
Standard library only: it is copied into the machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path

POLL_SECONDS = 0.002
DEADLINE_SECONDS = 30.0

# What the machine's models are called.
CPU, GPU = "cpu", "gpu"
MANY = [f"many{number}" for number in range(15)]

# Where the gateway listens.
GATEWAY_PORT = 8484

# Plain systemd: a service and a scope with the same engine, and somebody who polls its health path.
PLAIN_PORT = 19000
PLAIN = ["test-engine", "--port", str(PLAIN_PORT)]
PLAIN_GPU = [*PLAIN, "--vram", "1GiB"]
USER = "gpusvc"

Contest = Callable[[], None]


def main() -> None:
    rounds, gpu_uuid = int(sys.argv[1]), sys.argv[2]
    contests = [
        lambda: alone("alone", PLAIN, {}),
        lambda: alone("alone on a GPU", PLAIN_GPU, {"CUDA_VISIBLE_DEVICES": gpu_uuid}),
        service,
        scope,
        lambda: model(CPU),
        lambda: model(GPU),
        lambda: request(CPU),
        lambda: request(GPU),
    ]
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "gpusvc-gateway.service")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
        play(contests, 1)  # what is read for the first time
    play(contests, rounds)
    with up(GPU):
        memory(GPU)
        play(listings(1), rounds)
        with up(*MANY):
            play(listings(1 + len(MANY)), rounds)


def play(contests: list[Contest], rounds: int) -> None:
    for _ in range(rounds):
        for contest in random.sample(contests, len(contests)):
            contest()


def say(what: str, value: float) -> None:
    print(json.dumps([what, value]), flush=True)


# The contests


def alone(what: str, command: list[str], environment: Mapping[str, str]) -> None:
    """The engine by itself: what nothing can be faster than."""
    with timed(f"start {what}"):
        engine = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
        await_health(PLAIN_PORT)
    with timed(f"stop {what}"):
        engine.send_signal(signal.SIGTERM)
        engine.wait()


def service() -> None:
    with timed("start service"):
        run("systemctl", "start", "plain.service")
        await_health(PLAIN_PORT)
    with timed("stop service"):
        run("systemctl", "stop", "plain.service")


def scope() -> None:
    with timed("start scope"):
        starter = subprocess.Popen(
            ["systemd-run", "--quiet", "--scope", "--unit=plain", f"--uid={USER}", *PLAIN], stderr=subprocess.DEVNULL
        )
        await_health(PLAIN_PORT)
    with timed("stop scope"):
        run("systemctl", "stop", "plain.scope")
    starter.wait()


def model(name: str) -> None:
    """``systemctl start`` returns when the engine serves, and ``systemctl stop`` when its release is proven."""
    unit = f"model@{name}.service"
    with timed(f"start {name}"):
        run("systemctl", "start", unit)
    say(f"cpu {name}", int(show(unit, "CPUUsageNSec")) / 1e9)
    with timed(f"stop {name}"):
        run("systemctl", "stop", unit)


def request(name: str) -> None:
    """A client's request has the model loaded, and is answered."""
    with timed(f"start request {name}"):
        status, answer = post(name)
    if status != HTTPStatus.OK:
        raise RuntimeError(answer)
    run("systemctl", "stop", f"model@{name}.service")


def listings(count: int) -> list[Contest]:
    def gpusvc() -> None:
        with timed(f"list models {count}"):
            run("gpusvc", "ps")

    def systemctl() -> None:
        with timed(f"list units {count}"):
            run("systemctl", "--no-pager", "list-units")

    return [gpusvc, systemctl]


def memory(name: str) -> None:
    """Of the launcher and of what carries the engine's output to the journal, in bytes."""
    group = show(f"model@{name}.service", "ControlGroup")
    for pid in Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split():
        is_relay = Path(f"/proc/{pid}/comm").read_text().strip() == "gpusvc-relay"
        who = "relay" if is_relay else "launcher"
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, amount, *_ = line.split()
            if key in {"Rss:", "Pss:"}:
                say(f"{who} {key[:-1].upper()}", int(amount) * 1024)


# Parts


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(what, time.monotonic() - began)


@contextmanager
def up(*names: str) -> Iterator[None]:
    units = [f"model@{name}.service" for name in names]
    try:
        run("systemctl", "start", *units)
        yield
    finally:
        run("systemctl", "stop", *units)


def await_health(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not answers(port):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Nothing healthy on port {port}.")
        time.sleep(POLL_SECONDS)


def post(name: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", GATEWAY_PORT, timeout=DEADLINE_SECONDS)
    try:
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Well?"}]})
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def show(unit: str, name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, unit).strip()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
