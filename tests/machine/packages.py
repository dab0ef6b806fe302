"""Packages other than the one under test: a next version, and one of an earlier commit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = "usr/lib/python3/dist-packages/gpusvc"


def newer(package: Path, directory: Path, *, version: str, changes: dict[str, tuple[str, str]] | None = None) -> Path:
    """The same package with a higher version.

    Args:
        package: a .deb.
        directory: where the other one goes.
        version: that it has.
        changes: of files in it: what stands there once, and what is to stand there instead.
    """
    contents = directory / "contents"
    _run("dpkg-deb", "--raw-extract", package, contents)
    control = contents / "DEBIAN/control"
    lines = control.read_text().splitlines()
    control.write_text(
        "".join(f"Version: {version}\n" if line.startswith("Version: ") else f"{line}\n" for line in lines)
    )
    for name, (old, new) in (changes or {}).items():
        file = contents / name
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} is not once in {name}"
        file.write_text(text.replace(old, new))
    target = directory / f"gpusvc_{version}_all.deb"
    _run("dpkg-deb", "--root-owner-group", "--build", contents, target)
    return target


def of_commit(commit: str, directory: Path) -> Path | None:
    """The package of an earlier commit of this repository; None where its history does not reach back so far.

    Args:
        commit: its full hash.
        directory: an absent one, for its sources and the package.
    """
    git = ("git", "-c", "safe.directory=*")
    known = subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    if known.returncode:
        return None
    _run(*git, "clone", "--quiet", "--no-checkout", "--shared", ROOT, directory)
    _run(*git, "-C", directory, "checkout", "--quiet", "--detach", commit)
    vendored = ROOT / "build/vendor"
    if vendored.is_dir():  # the same wheel, so that the network is not needed again
        shutil.copytree(vendored, directory / "build/vendor")
    _run(directory / "packaging/build-deb", directory / "dist", timeout=300)
    return next((directory / "dist").glob("*.deb"))


def _run(*command: str | Path, timeout: float = 60) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=timeout)
