"""What ``tests/bench/gateway`` does: the same traffic for each contestant, in an order that every round draws anew.

Only what was measured in the same run is compared. Clients, proxy and engine share the machine's cores, so that on a
small one nobody's requests a second are the most that he could do alone; the CPU time of a request is his own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from tests.bench import contestants as field_of
from tests.bench import layers
from tests.bench.contestants import DIRECT, HAPROXY, OURS, Contestant, await_port, constant_engine, free_port
from tests.component.conftest import ROOT

MS = 1e-3
US = 1e-6
KB, MB = 1_000, 1_000_000

PACKAGES = ("gcc", "haproxy", "libc6-dev", "nginx-light", "wrk")

CONSTANT, STREAM = "constant", "stream"
STREAMS, EVENTS_PER_SECOND = 256, 50
IDLE_CONNECTIONS = 2000

# What is aimed at.
HAPROXY_SHARE = 0.5
ADDED_SECONDS = 0.1 * MS
STREAM_CORES = 0.5
RESIDENT_BYTES = 60 * MB
IDLE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk does."""

    connections: int
    content_bytes: int = 60

    @property
    def title(self) -> str:
        size = f"{self.content_bytes // MB} MB" if self.content_bytes >= MB else "small"
        return f"{size} requests, {self.connections} at a time"


LOADS = (Load(1), Load(16), Load(64), Load(256), Load(1, MB), Load(16, MB))


@dataclass(slots=True)
class Samples:
    """Of each contestant under each load, the values of all rounds by what they are of."""

    values: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)

    def add(self, load: str, who: str, sample: dict[str, float]) -> None:
        values = self.values.setdefault((load, who), {})
        for what, value in sample.items():
            values.setdefault(what, []).append(value)

    def median(self, load: str, who: str, what: str) -> float:
        return median(self.values[load, who][what])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/gateway", description="Compares the gateway with other proxies.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load in each round")
    parser.add_argument("--quick", action="store_true", help="one round of a second")
    parser.add_argument("--litellm", action="store_true", help="LiteLLM, too, if it is installed")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    subprocess.run([ROOT / "packaging/need", "gateway", *PACKAGES], check=True)
    has_litellm = options.litellm and field_of.has_litellm()
    if not has_litellm:
        why = "it is not installed" if options.litellm else "it was not asked for (--litellm)"
        print(f"Without LiteLLM: {why}.", file=sys.stderr)
    _allow_connections()
    samples = Samples()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        engines = {
            CONSTANT: stack.enter_context(constant_engine(directory)),
            STREAM: stack.enter_context(_streaming_engine()),
        }
        contestants = stack.enter_context(field_of.all_of(directory, engines, litellm=has_litellm))
        idle = {contestant.title: _idle(contestant) for contestant in contestants if contestant.pids()}
        for number in range(options.rounds):
            print(f"Round {number + 1} of {options.rounds}, load average {os.getloadavg()[0]:.1f} …", file=sys.stderr)
            _play(contestants, options.seconds, samples)
        used = {contestant.title: contestant.resident_bytes() for contestant in contestants}
        costs = layers.measure(directory / "layers")
    titles = [contestant.title for contestant in contestants]
    print(f"{os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s; medians\n")
    print("\n".join([*_report(samples, titles), *_report_streams(samples, titles), *_report_memory(idle, used)]))
    print("\n".join(["Where the time of gpusvc goes, without the kernel", *_report_layers(costs), ""]))
    print("\n".join(_aims(samples, idle)))


def _play(contestants: list[Contestant], seconds: float, samples: Samples) -> None:
    """One round."""
    for load in LOADS:
        for contestant in random.sample(contestants, len(contestants)):
            samples.add(load.title, contestant.title, _post(contestant, load, seconds))
    for contestant in random.sample(contestants, len(contestants)):
        samples.add(STREAM, contestant.title, _stream(contestant, 2 * seconds))


def _post(contestant: Contestant, load: Load, seconds: float) -> dict[str, float]:
    began = contestant.cpu_seconds()
    options = ("-t1", f"-c{load.connections}", f"-d{seconds:g}s", "--timeout", "30", "-s", "tests/bench/post.lua")
    arguments = (CONSTANT, str(load.content_bytes), contestant.key)
    done = subprocess.run(
        ["wrk", *options, contestant.url(CONSTANT), "--", *arguments],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=seconds + 60,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if result["errors"] or not result["requests"]:
        raise RuntimeError(f"{contestant.title}, {load.title}: {done.stdout}")
    return {
        "rate": result["requests"] / result["seconds"],
        "p50": result["p50"],
        "p99": result["p99"],
        "cpu": (contestant.cpu_seconds() - began) / result["requests"],
    }


def _stream(contestant: Contestant, seconds: float) -> dict[str, float]:
    arguments = (contestant.url(STREAM), STREAM, contestant.key, str(STREAMS), str(seconds))
    with _streams("clients", *arguments, stdout=subprocess.PIPE) as clients:
        assert clients.stdout is not None
        assert clients.stdout.readline() == b"go\n"
        began, cpu = time.monotonic(), contestant.cpu_seconds()
        word, _, line = clients.stdout.readline().partition(b" ")
        cores = (contestant.cpu_seconds() - cpu) / (time.monotonic() - began)
        assert word == b"stop"
        result: dict[str, float] = json.loads(line)
        clients.wait(30)
    if result.pop("broken"):
        raise RuntimeError(f"{contestant.title}: streams broke.")
    events = result.pop("events")
    return {**result, "events": events / seconds, "cores": cores, "cpu": cores * seconds / events}


def _idle(contestant: Contestant) -> tuple[int, int]:
    """What it takes of memory at first, and what each connection takes more that waits for its next request."""
    where = urlsplit(contestant.url(CONSTANT))
    request = f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {contestant.key}\r\n"
    body = json.dumps({"model": CONSTANT})
    request += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    before = contestant.resident_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            connection = stack.enter_context(socket.create_connection((where.hostname or "", where.port or 0), 30))
            connection.sendall(request.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        return before, max(0, contestant.resident_bytes() - before) // IDLE_CONNECTIONS


@contextmanager
def _streaming_engine() -> Iterator[int]:
    port = free_port()
    with _streams("engine", str(port), str(EVENTS_PER_SECOND)) as process:
        await_port(process, port)
        yield port


@contextmanager
def _streams(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, ROOT / "tests/bench/streams.py", *arguments], **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _allow_connections() -> None:
    """For us, and for those whom we start."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _report(samples: Samples, titles: list[str]) -> Iterator[str]:
    for load in LOADS:
        heads = ("requests/s", "× no proxy", "× HAProxy", "p50", "p99", "CPU each")
        yield f"{load.title:32}" + "".join(f"{head:>12}" for head in heads)
        direct, haproxy = (samples.median(load.title, who, "rate") for who in (DIRECT, HAPROXY))
        for who in titles:
            rate, p50, p99, cpu = (samples.median(load.title, who, what) for what in ("rate", "p50", "p99", "cpu"))
            yield (
                f"  {who:30}{rate:12,.0f}{rate / direct:12.2f}{rate / haproxy:12.2f}"
                f"{p50 / MS:9.3f} ms{p99 / MS:9.3f} ms" + (f"{cpu / US:9.1f} µs" if cpu else "")
            )


def _report_streams(samples: Samples, titles: list[str]) -> Iterator[str]:
    heads = ("events/s", "first p50", "p99", "delay p50", "p99", "CPU, 1000", "cores")
    yield f"{f'{STREAMS} streams, {EVENTS_PER_SECOND} events/s':32}" + "".join(f"{head:>12}" for head in heads)
    for who in titles:
        value = {what: samples.median(STREAM, who, what) for what in samples.values[STREAM, who]}
        times = ("first p50", "first p99", "delay p50", "delay p99")
        line = f"  {who:30}{value['events']:12,.0f}" + "".join(f"{value[what] / MS:9.3f} ms" for what in times)
        yield line + (f"{value['cpu'] * 1000 / MS:9.1f} ms{value['cores']:12.2f}" if value["cpu"] else "")


def _report_memory(idle: dict[str, tuple[int, int]], used: dict[str, int]) -> Iterator[str]:
    heads = ("at first", "+ each", "in the end")
    yield f"{f'Resident, {IDLE_CONNECTIONS} idle connections':32}" + "".join(f"{head:>12}" for head in heads)
    for who, (resident, each) in idle.items():
        yield f"  {who:30}{resident / MB:9.1f} MB{each / KB:9.1f} KB{used[who] / MB:9.1f} MB"


def _report_layers(costs: list[tuple[str, float]]) -> Iterator[str]:
    for what, seconds in costs:
        yield f"  {what:46}{seconds / US:8.2f} µs"


def _aims(samples: Samples, idle: dict[str, tuple[int, int]]) -> Iterator[str]:
    def aim(what: str, found: str, *, met: bool) -> str:
        return f"  {what:56}{found:>12}   {'met' if met else 'NOT MET'}"

    yield "Aims"
    for connections in (16, 64):
        load = Load(connections).title
        share = samples.median(load, OURS, "rate") / samples.median(load, HAPROXY, "rate")
        yield aim(f"{HAPROXY_SHARE} × HAProxy, {load}", f"× {share:.2f}", met=share >= HAPROXY_SHARE)
    added = samples.median(Load(1).title, OURS, "p50") - samples.median(Load(1).title, DIRECT, "p50")
    yield aim(
        f"{ADDED_SECONDS / MS:g} ms more than no proxy, one at a time (p50)",
        f"{added / MS:.3f} ms",
        met=added <= ADDED_SECONDS,
    )
    cores = samples.median(STREAM, OURS, "cores")
    yield aim(
        f"{STREAMS} streams of {EVENTS_PER_SECOND} events/s in {STREAM_CORES} of a core",
        f"{cores:.2f}",
        met=cores <= STREAM_CORES,
    )
    resident, each = idle[OURS]
    yield aim(
        f"{RESIDENT_BYTES // MB} MB, and {IDLE_BYTES // 1024} KiB for each idle connection",
        f"{resident / MB:.0f} MB, {each / KB:.1f} KB",
        met=resident <= RESIDENT_BYTES and each <= IDLE_BYTES,
    )
    yield "  The start of a model by a request: tests/bench/lifecycle."
