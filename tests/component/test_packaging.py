"""The Debian package as a file; what it does when installed is asked in tests/machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.xdist_group("package"),
    pytest.mark.skipif(shutil.which("dpkg-buildpackage") is None, reason="builds the package: needs Debian's tools"),
]


def run(*command: str | Path, **environment: str) -> str:
    """What the command says; an AssertionError with all that it said if it fails."""
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command[0]} exited with {result.returncode}:\n{result.stdout}{result.stderr}"
    return result.stdout


def build(tree: Path, directory: Path, **environment: str) -> Path:
    return Path(run(tree / "packaging/build-deb", directory, **environment).strip())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as it is now, so that nobody edits it between two builds."""
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", "dist")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "gpusvc", symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def package(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def contents(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("contents")
    run("dpkg-deb", "--extract", package, directory)
    return directory


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_lintian_has_nothing_to_say(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    assert run("lintian", "--allow-root", "--fail-on", "error,warning", package) == ""


def test_the_same_tree_gives_the_same_package_at_any_time_for_anyone(tree: Path, package: Path, tmp_path: Path) -> None:
    again = build(tree, tmp_path, HOME="/nonexistent", LANG="C", TZ="Asia/Tokyo", PYTHONPATH="/nonexistent")
    assert again.read_bytes() == package.read_bytes()


def test_one_package_suits_every_python_from_the_oldest_on(package: Path) -> None:
    depends = run("dpkg-deb", "--field", package, "Depends")
    assert "python3 (>= 3.11)" in depends
    assert "<<" not in depends


def test_the_generator_is_where_systemd_looks_for_it(contents: Path) -> None:
    for scope in ("system", "user"):
        assert os.access(contents / f"usr/lib/systemd/{scope}-generators/gpusvc-generator", os.X_OK)


def test_all_units_and_man_pages_are_in_the_package(tree: Path, contents: Path) -> None:
    assert names(contents / "usr/lib/systemd/system") == names(tree / "units") - {"user"}
    assert names(contents / "usr/lib/systemd/user") == names(tree / "units/user")
    pages = {f"{page.name}.gz" for page in (tree / "docs/man").iterdir()}
    assert {page.name for page in (contents / "usr/share/man").rglob("*.gz")} == pages


def test_dpkg_asks_before_it_replaces_the_host_file_and_nothing_else(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--control", package, tmp_path)
    assert (tmp_path / "conffiles").read_text().split() == ["/etc/gpusvc/gpusvc.toml"]


def test_the_package_carries_the_nvml_bindings(contents: Path) -> None:
    carried = contents / "usr/lib/python3/dist-packages/gpusvc/_vendor/pynvml.py"
    assert "def nvmlInit()" in carried.read_text()


def test_the_command_runs_on_the_system_python_without_the_users_packages(contents: Path) -> None:
    first_line = (contents / "usr/bin/gpusvc").read_text().splitlines()[0]
    assert first_line.removeprefix("#!").split() == ["/usr/bin/python3", "-I"]


def test_bash_completes_commands(tree: Path, contents: Path, tmp_path: Path) -> None:
    command = tmp_path / "gpusvc"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gpusvc.cli "$@"\n')
    command.chmod(0o755)
    script = 'source "$1"; COMP_WORDS=(gpusvc sta) COMP_CWORD=1; _gpusvc_completion gpusvc; echo "${COMPREPLY[@]}"'
    completions = contents / "usr/share/bash-completion/completions/gpusvc"
    search = f"{tmp_path}:{os.environ['PATH']}"
    said = run("bash", "-c", script, "bash", completions, PATH=search, PYTHONPATH=str(tree))
    assert said.split() == ["start", "status"]
