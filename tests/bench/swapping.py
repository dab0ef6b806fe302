"""What ``tests/bench/swap`` does: boots a machine, plays ``swap_inside.py`` in it, and prints what came out."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.bench import swap_inside as inside
from tests.bench.life import MS, Samples, need_tools
from tests.engines import tinygguf
from tests.machine import tree
from tests.machine.host import Host, build_package
from tests.machine.tree import Generation

# 1.3 GB each.
SHAPE = tinygguf.Shape(layers=5, width=2048, heads=16, feed_forward=8192)

PARTS = ("until its eviction", "stop and proof", "placement", "start until ready", "first byte")
SECONDS_PER_ROUND = 60.0

# What is aimed at.
OVER_HAND_SECONDS = 0.120

_KEYS = "idle_timeout = 0\nexclusive = ['bench']\n[gpu]\ncount = 1\ndevices = [0]\nvram = '1GiB'"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/swap", description="Measures swaps of models on one GPU.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", type=Path, help="a program with llama-swap's interface, to compare with")
    parser.add_argument("--without-llama", action="store_true", help="no real llama-server: faster, without its files")
    options = parser.parse_args()
    need_tools("swap")
    with tempfile.TemporaryDirectory() as scratch:
        package = build_package(Path(scratch))
        # The real llama-server is in forky only.
        with Host(tree.ensure(Generation.FORKY), name="gpusvc-bench") as machine:
            print("Preparing a container of Debian forky …", file=sys.stderr)
            _prepare(machine, package, llama=not options.without_llama, peer=options.peer)
            print(f"Playing {options.rounds} rounds …", file=sys.stderr)
            samples = _play(machine, options)
    print(f"{options.rounds} rounds; medians, in ms\n")
    print("\n".join(_report(samples)))


def _prepare(machine: Host, package: Path, *, llama: bool, peer: Path | None) -> None:
    machine.boot()
    machine.add_gpus()
    machine.add_engines()
    machine.install(package)
    kinds = [*inside.ENGINES, *(inside.LLAMAS if llama else ())]
    for kind in kinds:
        for name in (f"{kind}-a", f"{kind}-b"):
            command = json.dumps(inside.command_of(kind, name, "{port}").split())
            machine.write_model(name, f"command = {command}\n{_KEYS}\n")
    machine.write("/root/swap_inside.py", Path(inside.__file__).read_bytes())
    if llama:
        first = machine.inside("/srv/models/llama.gguf")
        tinygguf.write(first, shape=SHAPE)
        for kind in inside.LLAMAS:
            for side in "ab":
                # Files of their own: the cache of one must not be that of the other.
                machine.run("cp", "/srv/models/llama.gguf", f"/srv/models/{kind}-{side}.gguf", timeout=120)
        first.unlink()
    if peer is not None:
        _add_peer(machine, peer, kinds)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "gpusvc-gateway.service")


def _add_peer(machine: Host, program: Path, kinds: list[str]) -> None:
    models = {
        name: {"cmd": inside.command_of(kind, name, "${PORT}"), "ttl": 0}
        for kind in kinds
        for name in (f"{kind}-a", f"{kind}-b")
    }
    machine.write("/usr/local/bin/peer", program.read_bytes(), mode=0o755)
    machine.write("/root/peer.yaml", json.dumps({"models": models}))
    listen = f"127.0.0.1:{inside.PEER_PORT}"
    machine.run("systemd-run", "--quiet", "--unit=peer", "peer", "--config", "/root/peer.yaml", "--listen", listen)


def _play(machine: Host, options: argparse.Namespace) -> Samples:
    samples = Samples()
    peer = "none" if options.peer is None else "peer"
    llama = "none" if options.without_llama else "llama"
    command = ("python3", "/root/swap_inside.py", str(options.rounds), peer, llama)
    for line in machine.run(*command, timeout=120 + options.rounds * SECONDS_PER_ROUND).stdout.splitlines():
        what, value = json.loads(line)
        if what == "begin":
            samples = Samples()
        else:
            samples.add(what, value)
    return samples


def _report(samples: Samples) -> Iterator[str]:
    kinds = [what.removeprefix("hand ") for what in samples.values if what.startswith("hand ")]
    columns = "".join(f"{part:>20}" for part in PARTS)
    yield f"{'engine':14}{'gpusvc':>8}{'by hand':>9}{'over':>8}{'ratio':>7}{'peer':>8}{columns}"
    for kind in sorted(kinds):
        ours, hand = f"gpusvc {kind}", f"hand {kind}"
        peer = samples.values.get(f"peer {kind}")
        parts = "".join(f"{samples.median(f'{part} {kind}') / MS:20.1f}" for part in PARTS)
        yield (
            f"{kind:14}{samples.median(ours) / MS:8.0f}{samples.median(hand) / MS:9.0f}"
            f"{samples.over(ours, hand) / MS:+8.0f}{samples.ratio(ours, hand):7.2f}"
            f"{'-' if peer is None else f'{median(peer) / MS:.0f}':>8}{parts}"
        )
    worst = max(samples.over(f"gpusvc {kind}", f"hand {kind}") for kind in kinds)
    verdict = "met" if worst <= OVER_HAND_SECONDS else "NOT MET"
    aim = f"at most {OVER_HAND_SECONDS / MS:.0f} ms over engines swapped by hand"
    yield f"\nAim: {aim}: {worst / MS:.0f} ms   {verdict}"
