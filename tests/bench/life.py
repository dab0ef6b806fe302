"""What ``tests/bench/lifecycle`` does: boots a machine, plays the rounds of ``inside.py`` in it, prints what came out.

Only what was measured in the same run is compared: absolute times say more about the machine than about gpusvc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests import fakegpu
from tests.bench import inside
from tests.machine import tree
from tests.machine.host import PACKAGE_VARIABLE, REPOSITORY, Host, build_package
from tests.machine.tree import Generation

MS = 1e-3
MB = 1_000_000

# What is aimed at, on top of what the engine itself takes.
START_SECONDS = 0.130
REQUEST_SECONDS = 0.200
STOP_RATIO = 1.3
LISTING_SECONDS = 0.150
LAUNCHER_BYTES = 30 * MB

SECONDS_PER_ROUND = 12.0
PLAIN_SERVICE = f"[Service]\nExecStart={' '.join(inside.PLAIN)}\nUser={inside.USER}\n"
GPU_MODEL = {"gpu": "count = 1\nvram = '1GiB'", "arguments": "--vram 1GiB"}


@dataclass(slots=True)
class Samples:
    """All values of each thing that was measured, in the order of the rounds."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        self.values.setdefault(what, []).append(value)

    def median(self, what: str) -> float:
        return median(self.values[what])

    def over(self, what: str, other: str) -> float:
        """By how much ``what`` exceeds ``other`` in the median round."""
        return median(one - two for one, two in zip(self.values[what], self.values[other], strict=True))

    def ratio(self, what: str, other: str) -> float:
        return self.median(what) / self.median(other)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/lifecycle", description="Compares models with plain systemd.")
    parser.add_argument("--generation", type=Generation, choices=list(Generation), default=Generation.TRIXIE)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    need_tools("lifecycle")
    with tempfile.TemporaryDirectory() as scratch:
        package = build_package(Path(scratch))
        with Host(tree.ensure(options.generation), name="gpusvc-bench") as machine:
            print(f"Preparing a container of Debian {options.generation} …", file=sys.stderr)
            _prepare(machine, package)
            print(f"Playing {options.rounds} rounds …", file=sys.stderr)
            samples = _play(machine, options.rounds)
            systemd = machine.run("systemctl", "--version").stdout.split()[1]
    print(f"Debian {options.generation}, systemd {systemd}, {options.rounds} rounds; medians\n")
    print("\n".join([*_report(samples), "", *_aims(samples)]))


def need_tools(purpose: str) -> None:
    """Install what a bench with a booted machine needs. ``purpose`` is said where something is missing."""
    needed = ("gcc", "libc6-dev", "mmdebstrap", "procps", "systemd-container", "util-linux")
    subprocess.run([REPOSITORY / "packaging/need", purpose, *needed], check=True)
    if PACKAGE_VARIABLE not in os.environ:
        subprocess.run([REPOSITORY / "packaging/build-deb", "--tools"], check=True)


def _prepare(machine: Host, package: Path) -> None:
    machine.boot()
    machine.add_gpus()
    machine.add_engines()
    machine.install(package)
    machine.write_model(inside.CPU)
    for name in (inside.GPU, *inside.MANY):
        machine.write_model(name, **GPU_MODEL)
    machine.write("/etc/systemd/system/plain.service", PLAIN_SERVICE)
    machine.write("/root/inside.py", Path(inside.__file__).read_bytes())


def _play(machine: Host, rounds: int) -> Samples:
    samples = Samples()
    command = ("python3", "/root/inside.py", str(rounds), fakegpu.uuid_of(0))
    for line in machine.run(*command, timeout=60 + rounds * SECONDS_PER_ROUND).stdout.splitlines():
        samples.add(*json.loads(line))
    return samples


def _report(samples: Samples) -> Iterator[str]:
    def times(verb: str, rows: dict[str, str], base: str) -> Iterator[str]:
        """Each with the smallest, and how it compares with ``base``."""
        for what, title in rows.items():
            key = f"{verb} {what}"
            values = samples.values[key]
            line = f"  {title:46}{median(values) / MS:8.1f} ms   (least {min(values) / MS:6.1f})"
            if what != base:
                other = f"{verb} {base}"
                line += f"   {samples.over(key, other) / MS:+7.1f} ms   × {samples.ratio(key, other):.2f}"
            yield line

    yield "Start, until the health path answers"
    yield from times(
        "start",
        {
            "alone": "the engine alone",
            "service": "plain service, and a poll",
            "scope": "systemd-run --scope, and a poll",
            inside.CPU: "systemctl start model@…, count = 0",
            f"request {inside.CPU}": "a request to the gateway, count = 0",
        },
        base="alone",
    )
    yield from times(
        "start",
        {
            "alone on a GPU": "the engine alone, on a simulated GPU",
            inside.GPU: "systemctl start model@…, count = 1",
            f"request {inside.GPU}": "a request to the gateway, count = 1",
        },
        base="alone on a GPU",
    )
    yield from (
        f"  {f'CPU time of model@…, count = {count}, when ready':46}{samples.median(f'cpu {name}') / MS:8.1f} ms"
        for count, name in enumerate((inside.CPU, inside.GPU))
    )
    yield "Stop, until nothing is left of it"
    yield from times(
        "stop",
        {
            "service": "plain service",
            "scope": "scope",
            inside.CPU: "systemctl stop model@…, count = 0, with proof",
            inside.GPU: "systemctl stop model@…, count = 1, with proof",
        },
        base="service",
    )
    for count in (1, 1 + len(inside.MANY)):
        yield "One model is up" if count == 1 else f"{count} models are up"
        yield from times(
            "list", {f"units {count}": "systemctl list-units", f"models {count}": "gpusvc ps"}, base=f"units {count}"
        )
    yield "Memory"
    for who, title in {"launcher": "the launcher", "relay": "the relay of its output"}.items():
        rss, pss = (samples.median(f"{who} {kind}") / MB for kind in ("RSS", "PSS"))
        yield f"  {title:46}{rss:8.1f} MB resident   {pss:5.1f} MB its share"


def _aims(samples: Samples) -> Iterator[str]:
    start = max(
        samples.over(f"start {inside.CPU}", "start alone"), samples.over(f"start {inside.GPU}", "start alone on a GPU")
    )
    request = max(
        samples.over(f"start request {inside.CPU}", "start alone"),
        samples.over(f"start request {inside.GPU}", "start alone on a GPU"),
    )
    stop = max(samples.ratio(f"stop {name}", "stop service") for name in (inside.CPU, inside.GPU))
    over = max(samples.over(f"stop {name}", "stop service") for name in (inside.CPU, inside.GPU))
    listing = max(samples.median(f"list models {count}") for count in (1, 1 + len(inside.MANY)))
    resident = samples.median("launcher RSS")
    # What a stop costs on top does not grow with what the engine takes to end, so that the ratio falls with it.
    enough = over / (STOP_RATIO - 1)

    def aim(what: str, found: str, *, met: bool) -> str:
        return f"  {what:46}{found:>11}   {'met' if met else 'NOT MET'}"

    yield "Aims"
    yield aim(
        f"start within {START_SECONDS / MS:.0f} ms over the engine's own",
        f"{start / MS:.1f} ms",
        met=start <= START_SECONDS,
    )
    yield aim(
        f"request within {REQUEST_SECONDS / MS:.0f} ms over the engine's own",
        f"{request / MS:.1f} ms",
        met=request <= REQUEST_SECONDS,
    )
    yield aim(f"stop within {STOP_RATIO} × plain, engine ends at once", f"× {stop:.2f}", met=stop <= STOP_RATIO)
    yield f"    (within {STOP_RATIO} × from engines on whose plain stop takes {enough / MS:.0f} ms)"
    yield aim(
        f"gpusvc ps within {LISTING_SECONDS / MS:.0f} ms", f"{listing / MS:.1f} ms", met=listing <= LISTING_SECONDS
    )
    yield aim(
        f"launcher under {LAUNCHER_BYTES // MB} MB resident", f"{resident / MB:.1f} MB", met=resident < LAUNCHER_BYTES
    )
