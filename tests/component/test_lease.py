"""Who is at a lease, among real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpusvc.errors import UsageError
from gpusvc.paths import Paths
from gpusvc.state import lease as leases
from tests.component.conftest import ROOT, eventually

# Says "held", or why not, and holds until its input ends.
_HOLDER = """
import sys
from pathlib import Path
from gpusvc.state import lease
from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
runtime = Path(sys.argv[1])
try:
    with lease.hold(Paths(runtime, runtime, runtime), sys.argv[2]):
        print("held", flush=True)
        sys.stdin.read()
except GpusvcError as error:
    print(error.message, flush=True)
"""

Hold = Callable[..., "tuple[subprocess.Popen[str], str]"]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(config=tmp_path, runtime=tmp_path, state=tmp_path)


@pytest.fixture
def hold(paths: Paths) -> Iterator[Hold]:
    """Another process that tries to hold a lease, and what it says."""
    with ExitStack() as stack:

        def start(name: str = "qwen") -> tuple[subprocess.Popen[str], str]:
            command = [sys.executable, "-c", _HOLDER, str(paths.runtime), name]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, process.stdout.readline().rstrip()

        yield start


def test_a_lease_that_nobody_ever_held_is_not_held(paths: Paths) -> None:
    assert not leases.is_held(paths, "qwen")


def test_who_holds_it_is_seen_until_he_lets_go(paths: Paths, hold: Hold) -> None:
    process, said = hold()
    assert said == "held"
    assert leases.is_held(paths, "qwen")
    assert not leases.is_held(paths, "other")
    process.communicate()
    assert not leases.is_held(paths, "qwen")


def test_only_one_holds_it(paths: Paths, hold: Hold) -> None:
    hold()
    assert hold()[1] == "qwen is running, starting or stopping."
    with pytest.raises(UsageError, match="qwen is running"), leases.hold(paths, "qwen"):
        pass


def test_leases_of_different_models_are_held_side_by_side(hold: Hold) -> None:
    assert [hold("a")[1], hold("b")[1]] == ["held", "held"]


def test_the_kernel_lets_go_for_who_is_killed(paths: Paths, hold: Hold) -> None:
    process, _ = hold()
    process.kill()
    process.wait()
    assert not leases.is_held(paths, "qwen")
    assert hold()[1] == "held"


def test_who_only_looks_never_keeps_anybody_from_holding_it(paths: Paths, hold: Hold) -> None:
    hold()[0].communicate()
    looked = 0

    def look() -> bool:
        nonlocal looked
        looked += 1
        return leases.is_held(paths, "qwen")

    command = [sys.executable, "-c", _HOLDER, str(paths.runtime), "qwen"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert eventually(look)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
        finally:
            process.kill()
    assert looked > 0
