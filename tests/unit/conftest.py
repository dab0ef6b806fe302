"""What holds for all unit tests, and what several of them need."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from gpusvc.paths import Paths

# Time is no question of a unit test, least of all on a busy machine.
# The same examples each time, on a machine of any speed: a test that fails now and then tells nobody anything.
settings.register_profile(
    "gpusvc", deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gpusvc")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Those of a machine of its own, with a directory for models."""
    made = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "lib")
    made.models_directory.mkdir(parents=True)
    return made


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """The test without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
