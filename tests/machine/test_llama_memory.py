"""VRAM estimates against the memory that the distribution's own llama-server says it allocates.

Caches are compared byte for byte, on the CPU. For what goes into VRAM and what stays in RAM, llama-server gets Mesa's
Vulkan device, which computes on the CPU, and tells what it would allocate there (--fit) without doing so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpusvc.quantity import MIB
from gpusvc.weights.estimate import estimate
from gpusvc.weights.parts import Estimate
from tests.engines import largegguf, tinyarchitectures
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.generations(Generation.FORKY)

# Runs llama-server until it has made its buffers or has given up, and prints what it says.
SCRIPT = """
: > /tmp/said
"$@" >> /tmp/said 2>&1 &
for turn in $(seq 600); do
    grep -q -e 'compute buffer size' -e 'failed to load' -e 'failed to create' /tmp/said && break
    kill -0 $! || break
    sleep 0.05
done
kill -KILL $!
wait $!
cat /tmp/said
"""

OPTIONS = (
    "-c 16384 -np 1",
    "-c 10000 -np 3",
    "-c 16384 -np 3 -kvu",
    "-c 16384 -np 2 -ub 4096",
    "-c 8192 -np 2 --swa-full -ctk f32 -ctv f32",
    "-c 8192",
)


def allocated(machine: Host, file: str, options: str) -> tuple[float, float]:
    """Return the MiB of KV cache and of recurrent state that a real llama-server makes."""
    serve = ["llama-server", "-m", file, "--port", "8099", "--fit", "off", "--no-warmup", "-t", "1", "-v"]
    said = machine.run("sh", "-c", SCRIPT, "sh", *serve, *options.split()).stdout
    assert "compute buffer size" in said, said
    cache, state = (re.findall(rf"{word} buffer size = *([0-9.]+) MiB", said) for word in ("KV", "RS"))
    return sum(map(float, cache)), sum(map(float, state))


def estimated(file: Path, options: str) -> Estimate:
    found = estimate(["llama-server", "-m", str(file), *options.split()], {})
    assert found is not None
    return found


@pytest.mark.parametrize("name", tinyarchitectures.NAMES)
def test_the_estimate_is_what_llama_server_allocates(machine: Host, tmp_path: Path, name: str) -> None:
    local, there = tmp_path / "model", f"/srv/models/{name}.gguf"
    tinyarchitectures.write(local, name)
    machine.inside(there).write_bytes(local.read_bytes())
    for options in OPTIONS:
        cache, state = allocated(machine, there, options)
        found = estimated(local, options)
        # Each of its figures is rounded to a hundredth.
        assert found.cache_bytes / MIB == pytest.approx(cache, abs=0.02), options
        assert found.state_bytes / MIB == pytest.approx(state, abs=0.01), options
    machine.remove(there)


# Prints what llama-server would allocate, and ends it before it does.
PROJECTION = """
: > /tmp/said
GGML_VK_VISIBLE_DEVICES=0 "$@" >> /tmp/said 2>&1 &
for turn in $(seq 600); do
    grep -q -e 'breakdown_print: .*- Host' -e 'failed to load' /tmp/said && break
    kill -0 $! || break
    sleep 0.05
done
kill -KILL $!
wait $!
grep -e breakdown_print -e 'compute buffer size' -e rror /tmp/said
"""

LARGE = {
    "dense": largegguf.dense(layers=4),
    "tied": largegguf.dense(layers=4, width=2048, inner=6144, heads=16, tied=True),
    "mixture": largegguf.mixture(layers=4),
    "windowed": largegguf.windowed(),
}
PLACES = ("", "-np 3 -ub 1024", "-ngl 3", "-nkvo")
PLACES_OF_DENSE = ("-ncffn 2", "-ot ffn_up=CPU")
PLACES_OF_MIXTURE = (
    "-cmoe",
    "-ncmoe 2",
    "-cmoe --no-op-offload",
    r"-ot blk\.(1|2)\..*_exps\.=CPU",
    "-ngl 0 -ot exps=Vulkan0",
    r"-ot blk\.[0-2]\.ffn_(up|down)_exps=CPU,blk\.3\.=CPU -ncmoe 1",
)


def projected(machine: Host, file: str, options: str) -> tuple[float, float, float]:
    """Return the MiB of weights, of caches and states, and of compute buffers on the GPU."""
    serve = ["llama-server", "-m", file, "--port", "8099", "-t", "1", "-v", "-c", "8192"]
    said = machine.run("sh", "-c", PROJECTION, "sh", *serve, *options.split()).stdout
    row = re.search(r"- Vulkan0 .*= +(\d+) \+ +(\d+) \+ +\d+\)", said)
    compute = re.search(r" Vulkan0 compute buffer size = *([0-9.]+) MiB", said)
    assert row is not None, said
    assert compute is not None, said
    return float(row[1]), float(row[2]), float(compute[1])


@pytest.mark.parametrize("name", LARGE)
def test_the_estimate_is_what_llama_server_would_take_of_a_gpu(machine: Host, tmp_path: Path, name: str) -> None:
    local, there = tmp_path / "model", f"/srv/models/{name}.gguf"
    for path in (local, machine.inside(there)):
        largegguf.write(path, LARGE[name])
    for options in PLACES + (PLACES_OF_MIXTURE if name == "mixture" else PLACES_OF_DENSE):
        weights, cache, compute = projected(machine, there, options)
        found = estimated(local, f"-c 8192 {options}")
        # The first two are whole MiB.
        assert found.weights_bytes / MIB == pytest.approx(weights, abs=1.5), options
        assert (found.cache_bytes + found.state_bytes) / MIB == pytest.approx(cache, abs=1.5), options
        whole = (found.weights_bytes + found.cache_bytes + found.state_bytes + found.compute_bytes) / MIB
        assert whole == pytest.approx(weights + cache + compute, rel=0.1), options


@pytest.mark.parametrize("name", [name for name in tinyarchitectures.NAMES if name != "mamba"])
def test_the_compute_buffer_is_within_a_tenth(machine: Host, tmp_path: Path, name: str) -> None:
    local, there = tmp_path / "model", f"/srv/models/{name}.gguf"
    tinyarchitectures.write(local, name)
    machine.inside(there).write_bytes(local.read_bytes())
    for options in ("-np 3", "-ub 4096 -b 4096"):
        _, _, compute = projected(machine, there, options)
        assert estimated(local, f"-c 8192 {options}").compute_bytes / MIB == pytest.approx(compute, rel=0.1), options
    machine.remove(there)
