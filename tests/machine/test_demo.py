"""What the README promises of ``./demo``, in both of its places."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile

import pytest

from tests.machine.conftest import Layers
from tests.machine.host import PACKAGE_VARIABLE, REPOSITORY, Host
from tests.machine.tree import Generation

TIMEOUT_SECONDS = 300


def test_the_demo_works_in_a_container(layers: Layers) -> None:
    environment = {**os.environ, PACKAGE_VARIABLE: str(layers.package())}
    demo = subprocess.run(
        [REPOSITORY / "demo", "--container"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "SIMULATED" in demo.stdout
    assert demo.stdout.endswith("All of it worked.\n")
    assert "gpusvc-demo" not in subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout


@pytest.mark.generations(Generation.BOOKWORM)
def test_the_demo_works_on_a_machine_without_a_gpu_and_removes_its_model(bare_machine: Host, layers: Layers) -> None:
    bare_machine.run("sh", "-c", "rm -f /usr/local/lib/libnvidia-ml.so.1 && ldconfig")
    bare_machine.write("/root/gpusvc.deb", layers.package().read_bytes())
    bare_machine.write("/root/gpusvc.tar", _archive("demo", "packaging", "tests"))
    bare_machine.run("sh", "-c", "mkdir /root/gpusvc && tar -xf /root/gpusvc.tar -C /root/gpusvc")
    command = ("env", "--chdir=/root", f"{PACKAGE_VARIABLE}=/root/gpusvc.deb", "/root/gpusvc/demo")
    asked = bare_machine.run(*command, check=False)
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    demo = bare_machine.run(*command, "--yes", timeout=TIMEOUT_SECONDS)
    assert "./demo --container simulates some" in demo.stdout
    assert demo.stdout.endswith("All of it worked.\n")
    assert bare_machine.run("sh", "-c", "ls /etc/gpusvc/models /var/lib | grep demo", check=False).stdout == ""
    assert not bare_machine.is_active("model@demo.service")


def _archive(*paths: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in paths:
            archive.add(REPOSITORY / path, path, filter=lambda entry: None if "__pycache__" in entry.name else entry)
    return buffer.getvalue()
