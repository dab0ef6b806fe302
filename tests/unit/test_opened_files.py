"""Files are opened by gpusvc.files, which follows no link and waits for no FIFO, or there is a reason why not.

Daemons of gpusvc and members of its group may write to some directories. Whoever opens a file there, as root above all,
must not be led elsewhere by a link.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "gpusvc"

# Modules that open files by pathlib or open(), and why no stranger can have put a link there.
REASONS = {
    "files": "the helper itself",
    "linux/cgroup": "cgroupfs",
    "linux/memory": "/proc and cgroupfs",
    "linux/processes": "/proc",
    "linux/sockets": "/proc",
    "state/locks": "/proc/locks",
    "gpu/device": "/proc/driver",
    "gpu/nodes": "/proc/devices",
    "doctor/report": "/sys",
    "journal/background": "a descriptor",
    "journal/relay": "a descriptor",
    "doctor/driver": "/sys",
    "doctor/machine": "/sys",
    "config/directory": "a temporary directory of its own, and /etc/gpusvc, where links are the administrator's",
    "cli/commands/edit": "a temporary directory of its own, and /etc/gpusvc",
    "cli/commands/import_": "/etc/gpusvc",
    "cli/commands/run": "/run/gpusvc/runs and /run/systemd, where only root writes, or the user in a user's instance",
    "hub/outline": "a temporary directory of its own",
    "gateway/process/tls": "opened by the gateway's user: a link to a certificate is the administrator's",
}

READERS = {"read_text", "write_text", "read_bytes", "write_bytes"}
MODES = {"r", "rb", "w", "wb", "a", "ab", "x", "xb"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield str(file.relative_to(ROOT).with_suffix("")), ast.parse(file.read_text())


def opens_by_path(tree: ast.Module) -> list[int]:
    """The lines in which a file is opened by pathlib or open()."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, first = node.func, node.args[0] if node.args else None
        is_mode = isinstance(first, ast.Constant) and first.value in MODES
        if (
            (isinstance(function, ast.Name) and function.id == "open")
            or (isinstance(function, ast.Attribute) and function.attr in READERS)
            or (isinstance(function, ast.Attribute) and function.attr == "open" and is_mode)
        ):
            found.append(node.lineno)
    return found


def opens_by_flags(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The lines with os.open(), and its path and flags as they are written, names of flags resolved."""
    constants = {
        target.id: ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.open":
            path, flags, *_ = map(ast.unparse, node.args)
            yield node.lineno, f"{path}, {constants.get(flags.split(' ')[0], flags)} {flags}"


def test_only_named_modules_open_files_without_the_helper() -> None:
    found = {module: lines for module, tree in modules() if (lines := opens_by_path(tree))}
    assert {module: lines for module, lines in found.items() if module not in REASONS} == {}


# os.open() without O_NOFOLLOW: what it opens.
FOLLOWING = {
    "cli/__init__": "/dev/null",
    "cli/commands/use": "/dev/null",
    "gpu/reader": "/dev/null",
    "doctor/isolation": "device nodes, which root alone makes",
    "launcher/confinement": "device nodes, to see that they are closed",
    "linux/cgroup": "cgroupfs",
    "files": "a directory to be synchronised, and files that may be links",
    "hub/store": "the directory of downloads itself, which the administrator may link elsewhere",
}


@pytest.mark.parametrize(("module", "tree"), [pytest.param(*each, id=each[0]) for each in modules()])
def test_files_are_opened_without_following_links(module: str, tree: ast.Module) -> None:
    following = [line for line, said in opens_by_flags(tree) if "O_NOFOLLOW" not in said or "~os.O_NOFOLLOW" in said]
    assert following == [] or module in FOLLOWING


def test_the_reasons_are_those_of_modules_that_exist() -> None:
    names = {module for module, _ in modules()}
    assert names >= REASONS.keys() | FOLLOWING.keys()
