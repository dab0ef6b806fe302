"""VRAM estimates against the memory that the distribution's own llama-server says it allocates, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpusvc.quantity import MIB
from gpusvc.weights.estimate import Estimate, estimate
from tests.engines import tinyarchitectures
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
cat /tmp/said
"""

OPTIONS = (
    "-c 16384 -np 1",
    "-c 10000 -np 3",
    "-c 16384 -np 3 -kvu",
    "-c 16384 -np 2 -ub 4096",
    "-c 8192 -np 2 --swa-full -ctk f32 -ctv f32",
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
