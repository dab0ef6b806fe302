"""A model's beginning and end on a machine: added, edited, imported from elsewhere, and removed with proof."""

from __future__ import annotations

import hashlib
import json
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.fakegpu import GIB, NEVER
from tests.machine.host import GGUF
from tests.machine.tree import Generation

if TYPE_CHECKING:
    import subprocess

    from tests.machine.host import Host

pytestmark = pytest.mark.generations(Generation.FORKY)

STORE = "/srv/ollama/models"
MEDIA = "application/vnd.ollama.image."

SWAP = f"""
macros:
  ctx: 256
  server: llama-server --host 127.0.0.1 --port ${{PORT}} -c ${{ctx}}
models:
  lab/small:
    macros: {{ctx: 512}}
    cmd: |
      # A tiny one.
      ${{server}}
      -m {GGUF}
    env: [CUDA_VISIBLE_DEVICES=1]
    ttl: 60
"""


def add(machine: Host, name: str, *arguments: str, vram: str = "5GiB") -> subprocess.CompletedProcess[str]:
    """A model of the real llama-server's, which takes simulated VRAM."""
    done = machine.run("gpusvc", "add", name, GGUF, *arguments, "--", "-c", "512", check=False, timeout=60)
    if done.returncode == 0 and "--start" not in arguments:
        text = machine.read(f"/etc/gpusvc/models/{name}.toml")
        env = f'\n[env]\nLD_PRELOAD = "libfakecuda.so"\nFAKE_VRAM = "{vram}"\n'
        machine.write(f"/etc/gpusvc/models/{name}.toml", text + env)
    return done


def chat(machine: Host, name: str) -> str:
    question = {"messages": [{"role": "user", "content": "the water"}], "max_tokens": 4}
    answer = json.loads(machine.curl(machine.url(name, "/v1/chat/completions"), "-d", json.dumps(question)))
    return str(answer["choices"][0]["finish_reason"])


def exists(machine: Host, path: str) -> bool:
    return machine.run("test", "-e", path, check=False).returncode == 0


def test_a_gguf_file_serves_after_one_command(machine: Host) -> None:
    done = add(machine, "first", "--start")
    assert (done.returncode, "Warning" in done.stderr) == (0, False), done.stderr
    assert "made for a context of 4096 tokens" in done.stdout
    assert "first: " in done.stdout
    assert chat(machine, "first") == "length"


def test_a_model_that_is_removed_is_proven_gone(machine: Host) -> None:
    assert add(machine, "gone").returncode == 0
    machine.start("gone")
    assert sum(sum(machine.gpu_holders(index).values()) for index in range(2)) == 5 * GIB
    done = machine.run("gpusvc", "rm", "--yes", "gone")
    assert done.stdout.splitlines() == [
        "gone is stopped, and nothing of it is left.",
        "/etc/gpusvc/models/gone.toml is removed.",
    ]
    assert "5.0 GiB of VRAM" in machine.messages("gone")
    assert machine.remains("gone") == []
    assert not exists(machine, "/etc/gpusvc/models/gone.toml")
    assert machine.run("gpusvc", "start", "gone", check=False).returncode == 3


def test_a_model_whose_release_is_not_proven_keeps_its_file(machine: Host) -> None:
    assert add(machine, "ghost").returncode == 0
    text = machine.read("/etc/gpusvc/models/ghost.toml")
    machine.write("/etc/gpusvc/models/ghost.toml", f'release_timeout = "1s"\n{text}')
    machine.start("ghost")
    machine.gpus.configure(release_delay_ms=NEVER)
    done = machine.run("gpusvc", "rm", "--yes", "ghost", check=False, timeout=60)
    assert done.returncode == 1
    assert "/etc/gpusvc/models/ghost.toml is kept." in done.stderr
    assert exists(machine, "/etc/gpusvc/models/ghost.toml")
    machine.gpus.configure(release_delay_ms=0)
    assert machine.run("gpusvc", "rm", "--yes", "ghost").returncode == 0
    assert not exists(machine, "/etc/gpusvc/models/ghost.toml")


def test_an_edit_tells_whether_the_model_has_to_be_restarted(machine: Host) -> None:
    assert add(machine, "edited").returncode == 0
    machine.start("edited")

    def edit(script: str) -> str:
        machine.write("/usr/local/bin/test-editor", f'#!/bin/sh\nsed -i "{script}" "$1"\n', mode=0o755)
        return machine.run("env", "EDITOR=test-editor", "gpusvc", "edit", "edited", check=False).stdout

    assert edit("1i idle_timeout = '1h'").endswith("idle_timeout: it holds at once.\n")
    assert "command waits for its next start: `gpusvc restart edited`" in edit("s/512/1024/")
    assert edit("1i nonsense = 1") == ""
    assert "nonsense" not in machine.read("/etc/gpusvc/models/edited.toml")
    machine.run("gpusvc", "restart", "edited")
    assert chat(machine, "edited") == "length"


def test_a_store_of_ollama_is_served_as_it_lies(machine: Host) -> None:
    weights = machine.run("sha256sum", GGUF).stdout.split()[0]
    parameters = json.dumps({"num_ctx": 512, "temperature": 0.5}).encode()
    digest = hashlib.sha256(parameters).hexdigest()
    machine.run("sh", "-c", f"mkdir -p {STORE}/blobs && cp {GGUF} {STORE}/blobs/sha256-{weights}")
    machine.write(f"{STORE}/blobs/sha256-{digest}", parameters)
    layers = [{"mediaType": f"{MEDIA}model", "digest": f"sha256:{weights}"}]
    layers += [{"mediaType": f"{MEDIA}params", "digest": f"sha256:{digest}"}]
    manifest = json.dumps({"schemaVersion": 2, "layers": layers})
    machine.write(f"{STORE}/manifests/registry.ollama.ai/library/tiny/latest", manifest)

    shown = machine.run("gpusvc", "import", "ollama", STORE)
    assert tomllib.loads(shown.stdout)["args"] == ["-c", "512", "--temp", "0.5"]
    assert not exists(machine, "/etc/gpusvc/models/tiny.toml")
    machine.run("gpusvc", "import", "ollama", STORE, "--write")
    assert machine.run("gpusvc", "check").stdout == "1 model is fine.\n"
    machine.start("tiny")
    assert chat(machine, "tiny") == "length"
    assert machine.run("gpusvc", "rm", "--yes", "tiny:latest").returncode == 0
    assert machine.remains("tiny") == []


def test_a_configuration_of_llama_swap_is_served(machine: Host) -> None:
    machine.write("/srv/config.yaml", SWAP)
    done = machine.run("gpusvc", "import", "llama-swap", "/srv/config.yaml", "--write", check=False)
    assert done.returncode == 0, done.stderr
    machine.start("small")
    row = machine.ps("small")
    assert row is not None
    assert [gpu["index"] for gpu in row["gpus"]] == [1]
    assert chat(machine, "small") == "length"
    assert machine.run("gpusvc", "stop", "lab/small").stdout == "small is stopped, and nothing of it is left.\n"
