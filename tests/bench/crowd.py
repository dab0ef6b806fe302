"""What ``tests/bench/waiting`` does: boots a machine, lets the crowd of ``clients.py`` in, prints how long it waited.

Waits are compared with a swap of the same run: a request with nobody else about that needs another model's room.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from tests.bench import clients
from tests.bench.life import need_tools
from tests.machine import tree
from tests.machine.host import Host, build_package
from tests.machine.tree import Generation

MODELS = [f"model{number}" for number in range(6)]
TOGETHER = 2
MODEL_SECONDS = 1.0
LONGEST_SECONDS = 600.0

# What is aimed at: no failure, and no wait longer than the turns of all models and one more, in swaps.
LONGEST_SWAPS = len(MODELS) / TOGETHER + 1

Response = tuple[str, int, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/waiting", description="Measures waits for room.")
    parser.add_argument("--generation", type=Generation, choices=list(Generation), default=Generation.TRIXIE)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=4, help="of each client, one after the other")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    need_tools("waiting")
    with tempfile.TemporaryDirectory() as scratch:
        package = build_package(Path(scratch))
        with Host(tree.ensure(options.generation), name="gpusvc-bench") as machine:
            print(f"Preparing a container of Debian {options.generation} …", file=sys.stderr)
            _prepare(machine, package)
            print(f"{options.clients} clients ask {options.requests} times each …", file=sys.stderr)
            command = [str(value) for value in (options.clients, options.requests, options.seed, *MODELS)]
            said = machine.run("python3", "/root/clients.py", *command, timeout=LONGEST_SECONDS).stdout
            loads = machine.run("journalctl", "-q", "-o", "cat", "GPUSVC_EVENT=ready").stdout.count("\n")
    responses = [(model, status, seconds) for model, status, seconds in map(json.loads, said.splitlines())]
    print(f"Debian {options.generation}, {options.clients} clients, {len(MODELS)} models, room for {TOGETHER}\n")
    print("\n".join(_report(responses, loads)))


def _prepare(machine: Host, package: Path) -> None:
    machine.boot()
    machine.add_gpus()
    machine.add_engines()
    machine.install(package)
    for name in MODELS:
        # Two of them fit on a GPU of 24 GiB, and each may have the first GPU alone.
        arguments = f"--vram 11GiB --load-seconds {MODEL_SECONDS}"
        machine.write_model(name, gpu="devices = [0]\nvram = '11GiB'", arguments=arguments)
    machine.write("/root/clients.py", Path(clients.__file__).read_bytes())
    machine.run("systemctl", "start", "gpusvc-gateway.service")


def _report(responses: Sequence[Response], loads: int) -> Iterator[str]:
    # The first two found room; the next two were there already.
    swap = median(seconds for _, _, seconds in [one for one in responses if one[0] == "alone"][TOGETHER * 2 :])
    crowd = [one for one in responses if one[0] != "alone"]
    waits = sorted(seconds for _, _, seconds in crowd)
    failures = sum(status != 200 for _, status, _ in crowd)
    yield f"  {'a swap with nobody else about':46}{swap:8.2f} s"
    yield f"  {'requests':46}{len(crowd):8}"
    yield f"  {'failures':46}{failures:8}"
    yield f"  {'loads, and requests for each':46}{loads:8}   {len(crowd) / max(1, loads):.0f}"
    for title, seconds in (
        ("median wait", median(waits)),
        ("wait of 95 %", waits[int(0.95 * (len(waits) - 1))]),
        ("longest wait", waits[-1]),
    ):
        yield f"  {title:46}{seconds:8.2f} s   {seconds / swap:.1f} swaps"
    by_model = [max(seconds for model, _, seconds in crowd if model == name) for name in MODELS]
    yield f"  {'longest wait by model, least and most':46}{min(by_model):8.2f} s   {max(by_model):.2f} s"
    yield "Aims"
    yield f"  {'no failure':46}{failures:8}     {'met' if not failures else 'NOT MET'}"
    bound = waits[-1] / swap
    met = "met" if bound <= LONGEST_SWAPS else "NOT MET"
    yield f"  {f'longest wait within {LONGEST_SWAPS:.0f} swaps':46}{bound:8.1f}     {met}"


if __name__ == "__main__":
    main()
