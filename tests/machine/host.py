"""A machine with gpusvc, simulated GPUs and engines to run; and how such a machine is prepared once for many."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from tests import fakegpu
from tests.engines import tinygguf
from tests.machine import tree
from tests.machine.container import Machine, MachineError

REPOSITORY = Path(__file__).parents[2]

# A package to test instead of one built from this tree.
PACKAGE_VARIABLE = "GPUSVC_TEST_DEB"

PACKAGE_BUILD_TIMEOUT_SECONDS = 600
GPU_NAME = "NVIDIA GeForce RTX 4090 (simulated)"
GPU_COUNT = 2
GGUF = "/srv/models/tiny.gguf"

# The driver's state is in /run, and comes back at boot like the device nodes.
_GPU_DIRECTORY = "/run/fakegpu"
_SAVED_GPU_DIRECTORY = "/var/lib/fakegpu"
_SAVED_CONFIGURATION = "/var/lib/gpusvc-test-configuration"


class Host(Machine):
    """A booted machine with simulated GPUs: ``gpus`` changes them and plays faults."""

    def __init__(self, *layers: Path, name: str = "gpusvc-test") -> None:
        super().__init__(*layers, name=name)
        self.gpus = fakegpu.FakeGpus(Path("/nonexistent"))
        self.gpus.gpus = tuple(default_gpus(GPU_COUNT))  # those that prepare() gave to the layer
        self._put_in_order = 0.0  # seconds since the epoch

    def boot(self) -> Self:
        super().boot()
        self.gpus.directory = self.inside(_GPU_DIRECTORY)
        return self

    def shut_down(self) -> None:
        self.save_gpus()
        super().shut_down()

    def save_gpus(self) -> None:
        """Lets the GPUs be the same after the next boot, however this one ends."""
        script = 'rm -rf "$2" && if [ -d "$1" ]; then cp -a "$1" "$2"; fi'
        self.run("sh", "-c", script, "sh", _GPU_DIRECTORY, _SAVED_GPU_DIRECTORY)

    # Preparation

    def add_gpus(self, count: int = GPU_COUNT) -> None:
        """Gives the machine a driver: its library, its device nodes and some GPUs, as if there at boot."""
        libraries = fakegpu.build(tree.cache_directory() / "fakegpu")
        for library in (libraries.nvml, libraries.cuda):
            self.write(f"/usr/local/lib/{library.name}", library.read_bytes(), mode=0o755)
        self.run("ldconfig")
        self.make_gpu_nodes(count)
        self.write("/etc/tmpfiles.d/fake-gpu-state.conf", f"C {_GPU_DIRECTORY} - - - - {_SAVED_GPU_DIRECTORY}\n")
        self.gpus.configure(default_gpus(count))

    def add_engines(self) -> None:
        """Installs ``test-engine`` and a tiny model for the real llama-server."""
        self.write("/usr/local/bin/test-engine", (REPOSITORY / "tests/engines/engine.py").read_bytes(), mode=0o755)
        model = self.root.parent / "tiny.gguf"
        tinygguf.write(model)
        self.write(GGUF, model.read_bytes())
        model.unlink()

    def install(self, package: Path, *, timeout: float = 120) -> str:
        """Installs a .deb as ``apt install ./x.deb`` does, from what the tree has; returns what apt said."""
        path = f"/root/{package.name}"
        self.write(path, package.read_bytes())
        options = ("--yes", "--no-install-recommends", "--allow-downgrades", "-oDpkg::Use-Pty=0")
        result = self.run(
            "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options, "install", path, timeout=timeout
        )
        self.remove(path)
        return result.stdout + result.stderr

    # gpusvc

    def write_model(
        self,
        name: str,
        text: str = "",
        *,
        arguments: str = "",
        keys: str = "",
        gpu: str = "count = 0",
        scope: str = "",
    ) -> None:
        """A model file: ``text``, or else test-engine with these arguments, other keys, ``[gpu]`` and ``[scope]``."""
        if not text:
            command = json.dumps(["test-engine", "--model", name, "--port", "{port}", *arguments.split()])
            text = f"command = {command}\n{keys}\n[gpu]\n{gpu}\n[scope]\n{scope}\n"
        self.write(f"/etc/gpusvc/models/{name}.toml", text)

    def start(self, name: str, *, timeout: float = 60) -> None:
        """``systemctl start``; its failure shows the unit's journal."""
        result = self.run("systemctl", "start", f"model@{name}.service", check=False, timeout=timeout)
        if result.returncode != 0:
            raise MachineError(f"model@{name} did not start:\n{result.stderr}{self.journal(f'model@{name}.service')}")

    def fail_to_start(self, name: str, *, timeout: float = 60) -> str:
        """``systemctl start``, which must fail; what the journal has of the model since boot, messages only."""
        result = self.run("systemctl", "start", f"model@{name}.service", check=False, timeout=timeout)
        said = self.messages(name)
        assert result.returncode != 0, f"model@{name} started:\n{said}"
        return said

    def messages(self, name: str) -> str:
        """What the journal has of a model since boot, without times and names."""
        return self.journal(f"model@{name}.service", "-o", "cat")

    def stop(self, name: str, *, timeout: float = 60) -> None:
        self.run("systemctl", "stop", f"model@{name}.service", timeout=timeout)

    def ps(self, name: str) -> dict[str, Any] | None:
        """What ``gpusvc ps`` says of a model; None if it does not show it."""
        rows: list[dict[str, Any]] = json.loads(self.run("gpusvc", "ps", "--json").stdout)
        return next((row for row in rows if row["name"] == name), None)

    def url(self, name: str, path: str = "") -> str:
        row = self.ps(name)
        assert row is not None, f"gpusvc ps does not show {name}"
        return f"http://127.0.0.1:{row['port']}{path}"

    def engine_pids(self) -> list[int]:
        """Every process of a test engine or one of its children, in whatever cgroup."""
        script = "grep -lE '^(test-engine|engine-|llama-server)' /proc/[0-9]*/comm 2>/dev/null || :"
        return [int(path.split("/")[2]) for path in self.run("sh", "-c", script).stdout.split()]

    def remains(self, name: str) -> list[str]:
        """What is left of a model: engine processes wherever they are, its lease, its scope's processes, VRAM."""
        found = self.run("sh", "-c", _REMAINS, "sh", name).stdout.splitlines()
        found += [f"VRAM on GPU {index}: {held}" for index in range(GPU_COUNT) if (held := self.gpu_holders(index))]
        # For whoever reads that a test failed.
        return [*found, *self.journal(f"model@{name}.service").splitlines()] if found else []

    def override(self, name: str, *settings: str) -> None:
        """A drop-in for the [Service] section of a model's unit, until the next boot or ``reset``."""
        text = "".join(f"{line}\n" for line in ("[Service]", *settings))
        self.write(f"/run/systemd/system/model@{name}.service.d/test.conf", text)
        self.run("systemctl", "daemon-reload")

    def gpu_holders(self, index: int = 0) -> dict[int, int]:
        """PID → bytes of simulated VRAM held on a GPU, from the kernel's locks; PIDs as this process counts."""
        return self.gpus.holders(index)

    def journal(self, unit: str | None = None, *options: str) -> str:
        """The messages of a unit, or of all, since boot, or since the last ``reset``."""
        return super().journal(unit, f"--since=@{self._put_in_order:.6f}", *options)

    # Between tests

    def remember_configuration(self) -> None:
        """Keeps what the package installed under /etc/gpusvc, for ``reset``."""
        self.run("cp", "-a", "/etc/gpusvc", _SAVED_CONFIGURATION)

    def reset(self) -> None:
        """Stops every model, and makes the machine as it was when it was prepared.

        Raises:
            MachineError: an engine's process is left that belongs to no unit any more; it was killed.
        """
        self.gpus.configure(default_gpus(GPU_COUNT), **_no_faults())
        self.run("sh", "-c", _RESET, "sh", _SAVED_CONFIGURATION, timeout=120)
        left = self.engine_pids()
        if left:
            names = [line for pid, line in self.command_lines().items() if pid in left]
            self.run("kill", "-KILL", *map(str, left), check=False)
            raise MachineError(f"Left behind: {names}")
        self._put_in_order = time.time()


# Zombies that PID 1 has not reaped yet hold nothing.
_REMAINS = """
ps -e -ww -o stat=,comm=,pid=,args= | grep -E '^[^Z][^ ]* +(test-engine|engine-|llama-server)'
ls /run/gpusvc/models/"$1"/lease.json 2> /dev/null
find /sys/fs/cgroup -path "*/model-$1.scope*" -name cgroup.events -exec grep -H 'populated 1' {} +
:
"""

# What may be there in $1 is what was in /etc/gpusvc; stopping a model whose release was not proven may fail once more.
_RESET = """
systemctl stop 'model@*.service' 'gpusvc-models.slice' || :
systemctl reset-failed
rm -rf /etc/systemd/system/model@* /etc/systemd/system/*/model@* /run/systemd/system/model@* /run/gpusvc/models/* \
    /run/gpusvc/pins/* /run/gpusvc/keep/*
rm -rf /etc/gpusvc /var/lib/gpusvc/footprints && if [ -d "$1" ]; then cp -a "$1" /etc/gpusvc; fi
systemctl daemon-reload
"""


def default_gpus(count: int) -> list[fakegpu.FakeGpu]:
    return [fakegpu.FakeGpu(name=GPU_NAME, total=24 * fakegpu.GIB) for _ in range(count)]


def build_package(directory: Path) -> Path:
    """The .deb of this tree, built into ``directory``, or the one that the environment names."""
    if named := os.environ.get(PACKAGE_VARIABLE):
        return Path(named)
    directory.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        [REPOSITORY / "packaging/build-deb", directory],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PACKAGE_BUILD_TIMEOUT_SECONDS,
        check=False,
    )
    packages = list(directory.glob("gpusvc_*_all.deb"))
    if result.returncode != 0 or len(packages) != 1:
        raise MachineError(
            f"packaging/build-deb: exit {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
        )
    return packages[0]


def prepare(generation: tree.Generation, package: Path | None) -> Host:
    """A machine with GPUs, engines and, if given, the package; shut down, to be the layer of others."""
    host = Host(tree.ensure(generation), name=f"{generation}-layer")
    try:
        host.boot()
        host.add_gpus()
        host.add_engines()
        if package is not None:
            host.install(package)
            host.remember_configuration()
        host.run("sh", "-c", "rm -rf /var/log/journal/*; mkdir -p /var/log/journal")
        host.shut_down()
    except BaseException:
        host.close()
        raise
    return host


def _no_faults() -> dict[str, object]:
    faults = fakegpu.Faults()
    return {name: getattr(faults, name) for name in fakegpu.Faults.__dataclass_fields__}
