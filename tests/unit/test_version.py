"""The version stands in three places, because three tools each read their own."""

from __future__ import annotations

import re
from pathlib import Path

import gpusvc

ROOT = Path(__file__).parents[2]


def first(pattern: str, file: str) -> str | None:
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return match and match[1]


def test_the_debian_changelog_has_the_version_of_the_code() -> None:
    assert first(r"\Agpusvc \((.+?)\) ", "packaging/debian/changelog") == gpusvc.__version__


def test_the_newest_entry_of_the_changelog_is_the_version_of_the_code() -> None:
    assert first(r"^## (\S+)", "CHANGELOG.md") == gpusvc.__version__


def test_the_tests_run_the_nvml_bindings_that_the_package_carries() -> None:
    pin = r"^nvidia-ml-py==(\S+)"
    assert first(pin, "tests/constraints.txt") == first(pin, "packaging/vendor/requirements.txt") is not None
