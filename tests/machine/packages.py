"""Packages made of packages: the next version of one, with something in it that can be seen to be another."""

from __future__ import annotations

import subprocess
from pathlib import Path

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


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
