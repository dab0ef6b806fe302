"""Machines for tests, one Debian release (and systemd generation) after the other.

``machine`` is shared by a module's tests and put back in order after each; ``fresh_machine`` is a test's own, for what
reboots or breaks it; ``bare_machine`` has GPUs and engines but not gpusvc. All three follow from ``generation``.
"""

from __future__ import annotations

import fcntl
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.machine import tree
from tests.machine.container import MachineError
from tests.machine.host import Host, build_package, prepare
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "generations(*generations): the only Debian releases that this test is about")
    config.addinivalue_line("markers", "sampled(*generations): on the other Debian releases it runs with --all only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each generation, or what the test asks for with one of the marks above; a module stays with one worker."""
    if "generation" not in metafunc.fixturenames:
        return
    only = metafunc.definition.get_closest_marker("generations")
    sampled = metafunc.definition.get_closest_marker("sampled")
    module = metafunc.module.__name__
    chosen = []
    for one in only.args if only else tuple(Generation):
        marks = [pytest.mark.xdist_group(f"{module}-{one}")]
        if sampled and only is None and one not in sampled.args:
            marks.append(pytest.mark.slow)
        chosen.append(pytest.param(one, id=str(one), marks=marks))
    metafunc.parametrize("generation", chosen, indirect=True, scope="module")


@dataclass(slots=True)
class Layers:
    """What machines are booted from, made when first asked for and kept in memory until the tests end."""

    shared: Path  # a directory of all workers of this run
    _prepared: dict[tuple[Generation, bool], Host] = field(default_factory=dict)

    def package(self) -> Path:
        """The .deb under test, built once by whichever worker comes first."""
        with (self.shared / "package.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            built = [*(self.shared / "package").glob("*.deb")]
            return built[0] if built else build_package(self.shared / "package")

    def prepared(self, generation: Generation, *, installed: bool = True) -> Host:
        """Whose layer others are booted from."""
        key = (generation, installed)
        if key not in self._prepared:
            self._prepared[key] = prepare(generation, self.package() if installed else None)
        return self._prepared[key]

    def boot(self, generation: Generation, *, installed: bool = True, bpf: bool = True) -> Host:
        layer = self.prepared(generation, installed=installed).layer
        host = Host(layer, tree.ensure(generation), name=f"{generation}-test")
        if not bpf:
            host.system_calls = "~bpf"
        try:
            host.boot()
        except BaseException:
            host.close()
            raise
        return host

    def close(self) -> None:
        for host in self._prepared.values():
            host.close()


@pytest.fixture(scope="session")
def layers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Layers]:
    base = tmp_path_factory.getbasetemp()
    layers = Layers(base.parent if hasattr(request.config, "workerinput") else base)
    yield layers
    layers.close()


@pytest.fixture(scope="module")
def generation(request: pytest.FixtureRequest) -> Generation:
    """A Debian release whose tree is there. Only a release that moves may be skipped, and never silently."""
    generation: Generation = request.param
    try:
        tree.ensure(generation)
    except tree.TreeError as error:
        if generation.is_released():
            raise
        _shout(request.config, f"{generation} IS NOT TESTED: {error}")
        pytest.skip(f"{generation.upper()} IS NOT TESTED: {str(error).splitlines()[0]}")
    return generation


@pytest.fixture(scope="module")
def shared_machine(generation: Generation, layers: Layers) -> Iterator[Host]:
    with layers.boot(generation) as host:
        yield host


@pytest.fixture
def machine(shared_machine: Host) -> Iterator[Host]:
    """A machine with gpusvc and two simulated GPUs of 24 GiB; after the test it is put back in order."""
    if shared_machine.pid is None:
        shared_machine.boot()
    yield shared_machine
    try:
        shared_machine.reset()
    except (MachineError, OSError):
        shared_machine.cut_power()  # the next test gets it booted anew
        raise


@pytest.fixture
def fresh_machine(generation: Generation, layers: Layers) -> Iterator[Host]:
    """The same, for one test alone, which may break it."""
    with layers.boot(generation) as host:
        yield host


@pytest.fixture
def bare_machine(generation: Generation, layers: Layers) -> Iterator[Host]:
    """A machine with two simulated GPUs and the engines, without gpusvc, for one test alone."""
    with layers.boot(generation, installed=False) as host:
        yield host


def _shout(config: pytest.Config, text: str) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{'!' * 100}\n{text}\n{'!' * 100}", file=sys.stderr, flush=True)
