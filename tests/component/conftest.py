"""Simulated GPUs for components: the real pynvml on a fake libnvidia-ml.so.1, and processes that hold VRAM."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakegpu import FakeGpu, FakeGpus, Libraries, build

ROOT = Path(__file__).parents[2]

# Evaluates one expression a line, and answers with its value or its error.
_CLIENT = """
import base64, pickle, sys
from gpusvc.gpu import nvml
from gpusvc.errors import GpusvcError
client = None
def connect():
    global client
    client = nvml.Nvml()
def drive(start="fork", **options):
    global client
    from gpusvc.gpu import driver, reader_process
    client = driver.Driver(begin=getattr(reader_process, start), **options)
for line in sys.stdin:
    try:
        answer = eval(line)
    except GpusvcError as error:
        answer = error
    print(base64.b64encode(pickle.dumps(answer)).decode(), flush=True)
"""


class Machine:
    """A machine with simulated GPUs, on which programs run; what was started on it ends with it."""

    def __init__(self, libraries: Libraries, directory: Path) -> None:
        self.libraries = libraries
        self.gpus = FakeGpus(directory)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "FAKE"))},
            "FAKEGPU_DIR": str(directory),
            "LD_LIBRARY_PATH": str(libraries.directory),
            "PYTHONPATH": str(ROOT),
        }
        self._running: list[subprocess.Popen[str]] = []

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._running.append(process)
        return process

    def holder(self, vram: str, **environment: str) -> subprocess.Popen[str]:
        """A process that took ``vram`` of the first GPU, or of those that CUDA_VISIBLE_DEVICES names."""
        # "cat" has taken it by the time that it echoes.
        process = self.start("cat", LD_PRELOAD=str(self.libraries.cuda), FAKE_VRAM=vram, **environment)
        assert say(process, "ready") == "ready"
        return process

    def client(self, **environment: str) -> Client:
        return Client(self.start(sys.executable, "-c", _CLIENT, **environment))

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


class Client:
    """Another process's ``gpusvc.gpu.nvml``; ``ask("client.snapshot()")`` has the value, or raises what it raised."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, expression: str) -> object:
        answer: object = pickle.loads(base64.b64decode(say(self.process, expression)))
        if isinstance(answer, Exception):
            raise answer
        return answer


def say(process: subprocess.Popen[str], line: str) -> str:
    """The line that a process answers with."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().rstrip("\n")


def eventually(condition: Callable[[], bool], *, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
    return condition()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may enter; those of pytest are its user's alone."""
    with tempfile.TemporaryDirectory(prefix="gpusvc-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    return build(tmp_path_factory.mktemp("fakegpu"))


@pytest.fixture
def machine(libraries: Libraries, tmp_path: Path) -> Iterator[Machine]:
    """With one GPU of 24 GiB."""
    made = Machine(libraries, tmp_path / "gpus")
    made.gpus.configure([FakeGpu()])
    yield made
    made.close()
