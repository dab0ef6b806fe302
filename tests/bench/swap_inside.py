"""The rounds of ``tests/bench/swap``, run inside the machine; each sample is a line ``[what, value]`` of JSON.

A swap is a request for a model while another one has the GPU. Each round makes one swap of each kind of engine, with
gpusvc, by hand and through another program if there is one, in an order of its own.
Standard library only: it is copied into the machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path

GATEWAY_PORT, PEER_PORT, HAND_PORT = 8484, 8585, 19000
POLL_SECONDS = 0.002
DEADLINE_SECONDS = 120.0
USER = "gpusvc"

# By kind: the command of a model. Two models of each kind, NAME-a and NAME-b, never fit together.
ENGINES = {
    "instant": "test-engine --model {name} --port {port}",
    "late-0.4": "test-engine --model {name} --port {port} --load-seconds 0.4",
    "late-1.5": "test-engine --model {name} --port {port} --load-seconds 1.5",
    "leaves-1.0": "test-engine --model {name} --port {port} --stop-seconds 1.0",
}
LLAMA = "llama-server -m /srv/models/{name}.gguf --port {port} -c 512 -t 2 --no-warmup"
LLAMAS = ("llama-warm", "llama-cold")

Splits = dict[str, float]


def main() -> None:
    rounds, peer, llama = int(sys.argv[1]), sys.argv[2] == "peer", sys.argv[3] == "llama"
    kinds = [*ENGINES, *(LLAMAS if llama else ())]
    contests: list[Callable[[], None]] = []
    for kind in kinds:
        ways = (by_gpusvc, by_hand, by_peer) if peer else (by_gpusvc, by_hand)
        contests += [partial(way, kind) for way in ways]
    for number in range(rounds + 1):
        for contest in random.sample(contests, len(contests)):
            contest()
        if number == 0:
            say("begin", 0.0)  # what came before was read for the first time


def say(what: str, value: float) -> None:
    print(json.dumps([what, value]), flush=True)


def by_gpusvc(kind: str) -> None:
    first, second = f"{kind}-a", f"{kind}-b"
    ask(GATEWAY_PORT, first)
    chill(kind, second)
    began = time.time()
    answered = ask(GATEWAY_PORT, second)
    say(f"gpusvc {kind}", answered - began)
    for part, seconds in split(first, second, began, answered).items():
        say(f"{part} {kind}", seconds)
    subprocess.run(["systemctl", "stop", f"model@{second}.service"], check=True)


def split(first: str, second: str, began: float, answered: float) -> Splits:
    """The parts of a swap, by the times of gpusvc's events."""
    subprocess.run(["journalctl", "--sync"], check=True)
    shown = subprocess.run(
        ["journalctl", "-t", "gpusvc", "-o", "json", f"--since=@{began:.6f}", "--no-pager"],
        check=True,
        capture_output=True,
    ).stdout
    at: dict[tuple[str, str], float] = {}
    for line in shown.splitlines():
        entry = json.loads(line)
        if "GPUSVC_EVENT" in entry:
            moment = int(entry.get("_SOURCE_REALTIME_TIMESTAMP", entry["__REALTIME_TIMESTAMP"])) / 1e6
            at.setdefault((entry["GPUSVC_EVENT"], entry.get("GPUSVC_MODEL", "")), moment)
    evicted, released = at["evict", first], at["release", first]
    started, ready = at["start", second], at["ready", second]
    return {
        "until its eviction": evicted - began,
        "stop and proof": released - evicted,
        "placement": started - released,
        "start until ready": ready - started,
        "first byte": answered - ready,
    }


def by_hand(kind: str) -> None:
    """The same engines, one after the other as fast as it goes: nothing can be faster without suspending them."""
    first, second = f"{kind}-a", f"{kind}-b"
    engine = launch(kind, first)
    await_health(HAND_PORT)
    chill(kind, second)
    began = time.time()
    engine.send_signal(signal.SIGKILL if kind.startswith("llama") else signal.SIGTERM)
    engine.wait()
    engine = launch(kind, second)
    await_health(HAND_PORT)
    say(f"hand {kind}", ask(HAND_PORT, second) - began)
    engine.kill()
    engine.wait()


def by_peer(kind: str) -> None:
    first, second = f"{kind}-a", f"{kind}-b"
    ask(PEER_PORT, first)
    chill(kind, second)
    began = time.time()
    say(f"peer {kind}", ask(PEER_PORT, second) - began)


def launch(kind: str, name: str) -> subprocess.Popen[bytes]:
    command = command_of(kind, name, HAND_PORT).split()
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def command_of(kind: str, name: str, port: object) -> str:
    return ENGINES.get(kind, LLAMA).format(name=name, port=port)


def chill(kind: str, name: str) -> None:
    """Have the next engine read its weights from the disk, or from memory."""
    file = Path(f"/srv/models/{name}.gguf")
    if not kind.startswith("llama"):
        return
    with file.open("rb") as stream:
        if kind == "llama-cold":
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while stream.read(1 << 24):
                pass


def await_health(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == HTTPStatus.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"Nothing healthy on port {port}.")


def ask(port: int, model: str) -> float:
    """Ask for one token, and return when its first byte came, in seconds since the epoch."""
    connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    try:
        body = json.dumps(
            {"model": model, "stream": True, "max_tokens": 1, "messages": [{"role": "user", "content": "Well?"}]}
        )
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.read(1)
        moment = time.time()
        rest = response.read()
        if response.status != HTTPStatus.OK:
            raise RuntimeError((first + rest).decode(errors="replace"))
        return moment
    finally:
        connection.close()


if __name__ == "__main__":
    main()
