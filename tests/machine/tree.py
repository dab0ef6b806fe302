"""Debian trees for the containers: made once by mmdebstrap, cached outside the repository, never written to afterwards.

The cache is ``${XDG_CACHE_HOME:-/var/cache}/gpusvc-tests``. An entry is named after its recipe, so that a changed
recipe makes a new tree and the old one is removed. It appears by one rename, complete; one builder at a time works on
a generation, and an entry that somebody still uses is not removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where the trees come from instead of Debian's own servers; a URL or a sources.list line, as for mmdebstrap.
MIRROR_VARIABLE = "GPUSVC_TEST_MIRROR"

BUILD_TIMEOUT_SECONDS = 900

_STAMP = "complete"

# What gpusvc's package depends on, and what a test needs to look around.
_PACKAGES = (
    "adduser",
    "curl",
    "dbus",
    "dbus-user-session",
    "iproute2",
    "libc-bin",
    "passwd",
    "polkitd",
    "procps",
    "python3",
    "python3-aiohttp",
    "python3-httptools",
    "python3-prometheus-client",
    "python3-psutil",
    "python3-pystemd",
    "python3-rich",
    "python3-sdnotify",
    "python3-typer",
    "python3-uvloop",
    "python3-yaml",
    "systemd",
    "systemd-sysv",
    "util-linux",
)

# Run in a shell with $1 = the tree. Masked is what cannot work in a container or only costs time at each boot.
_CUSTOMISATION = """
set -eu
printf '%032x\\n' 1 > "$1/etc/machine-id"
echo gpusvc-test > "$1/etc/hostname"
printf '127.0.0.1 localhost gpusvc-test\\n::1 localhost\\n' > "$1/etc/hosts"
chroot "$1" systemctl --quiet mask systemd-modules-load.service systemd-resolved.service systemd-timesyncd.service \
    systemd-networkd.service systemd-firstboot.service systemd-logind.service getty.target console-getty.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer man-db.timer
mkdir -p "$1/var/log/journal"
rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/*.log "$1"/var/log/apt
"""

# For a machine that is no container; besides the kernel, an initrd with no more than what finds the disk.
_KERNEL_PACKAGES = ("linux-image-cloud-amd64",)
_KERNEL_CUSTOMISATION = """
echo MODULES=list > "$1/etc/initramfs-tools/conf.d/test"
printf '%s\\n' virtio_pci virtio_blk ext4 >> "$1/etc/initramfs-tools/modules"
chroot "$1" update-initramfs -u
"""

# A tree without one of these was damaged after it was made.
_ESSENTIALS = (
    "etc/os-release",
    "etc/machine-id",
    "usr/bin/python3",
    "usr/bin/dpkg",
    "usr/bin/systemctl",
    "usr/bin/curl",
)

# The trees that this process uses, each with a shared lock that it holds for as long as it lives.
_in_use: dict[Path, int] = {}


class TreeError(Exception):
    """A Debian tree could not be made; the message ends with the builder's last words."""


class Generation(StrEnum):
    """A Debian release, and with it a generation of systemd."""

    BOOKWORM = "bookworm"  # Debian 12, systemd 252
    TRIXIE = "trixie"  # Debian 13, systemd 257
    FORKY = "forky"  # Debian's testing: moves

    def is_released(self) -> bool:
        """Whether this release stands still, so that a tree of it can be made at any time."""
        return self is not Generation.FORKY

    @property
    def packages(self) -> tuple[str, ...]:
        return (*_PACKAGES, *_MORE_PACKAGES.get(self, ()))

    def has_llama_server(self) -> bool:
        """Whether Debian has the real llama-server in this release."""
        return self is Generation.FORKY


# llama-server, and a GPU for it that Mesa computes on the CPU.
_LLAMA = ("llama.cpp-tools", "libggml0-backend-vulkan", "mesa-vulkan-drivers")

# What one test needs, on one generation.
_MORE_PACKAGES = {Generation.TRIXIE: ("haproxy",), Generation.FORKY: _LLAMA}


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what is in a tree."""

    generation: Generation
    mirror: str | None
    kernel: bool = False
    """Whether it has a kernel of its own."""

    @property
    def name(self) -> str:
        return f"whole-{self.generation}" if self.kernel else str(self.generation)

    @property
    def packages(self) -> tuple[str, ...]:
        return (*self.generation.packages, *_KERNEL_PACKAGES) if self.kernel else self.generation.packages

    @property
    def customisation(self) -> str:
        return _CUSTOMISATION + _KERNEL_CUSTOMISATION if self.kernel else _CUSTOMISATION

    def key(self) -> str:
        text = "\0".join((self.generation, self.mirror or "", self.customisation, *self.packages))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def command(self, target: Path) -> list[str]:
        """The mmdebstrap call. What this machine's apt was told about reaching mirrors holds for it too."""
        return [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(self.packages)}",
            *(f"--aptopt={line}" for line in _apt_settings()),
            f"--customize-hook={self.customisation}",
            str(self.generation),
            str(target),
            *([self.mirror] if self.mirror else []),
        ]


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "gpusvc-tests"


def ensure(generation: Generation, *, kernel: bool = False) -> Path:
    """The tree of a generation, made if it is missing or damaged; it stays for as long as this process lives.

    Args:
        generation: the Debian release.
        kernel: whether it is to have a kernel, and so all that a machine of its own boots from.

    Raises:
        TreeError: it could not be made.
    """
    recipe = Recipe(generation, os.environ.get(MIRROR_VARIABLE) or None, kernel)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    entry = cache / f"{recipe.name}-{recipe.key()}"
    if entry in _in_use:
        return entry / "tree"
    with _locked(cache / f"{recipe.name}.lock"):
        if not _is_whole(entry):
            _build(recipe, entry)
        _remove_others(recipe, entry)
        _in_use[entry] = os.open(entry / _STAMP, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(_in_use[entry], fcntl.LOCK_SH)
    return entry / "tree"


def _build(recipe: Recipe, entry: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise TreeError("There is no mmdebstrap on this machine: apt-get install mmdebstrap.")
    _remove(entry)
    scratch = Path(tempfile.mkdtemp(prefix=f"{recipe.name}-building-", dir=entry.parent))
    scratch.chmod(0o755)
    try:
        result = subprocess.run(
            recipe.command(scratch / "tree"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=BUILD_TIMEOUT_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            last = "\n".join(result.stdout.splitlines()[-15:])
            raise TreeError(
                f"mmdebstrap could not make a tree of {recipe.generation} (exit {result.returncode}):\n{last}"
            )
        (scratch / _STAMP).write_text(f"{recipe}\n")
        scratch.rename(entry)
    except subprocess.TimeoutExpired as error:
        raise TreeError(
            f"mmdebstrap took longer than {error.timeout:.0f} s to make a tree of {recipe.generation}."
        ) from error
    finally:
        if scratch.exists():
            _remove(scratch)


def _is_whole(entry: Path) -> bool:
    return (entry / _STAMP).exists() and all((entry / "tree" / path).exists() for path in _ESSENTIALS)


def _remove_others(recipe: Recipe, entry: Path) -> None:
    """Removes trees of older recipes and what an interrupted builder left, but nothing that is in use."""
    for other in entry.parent.glob(f"{recipe.name}-*"):
        if other == entry:
            continue
        stamp = other / _STAMP
        if stamp.exists():
            with stamp.open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                _remove(other)
        else:
            _remove(other)


def _remove(directory: Path) -> None:
    # One file system: should anything ever be left mounted in there, it is not emptied.
    subprocess.run(["rm", "-rf", "--one-file-system", str(directory)], check=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _apt_settings() -> list[str]:
    """This machine's apt settings on proxies, and on whether a mirror's index may be older than its stated life."""
    names = ("Acquire::http", "Acquire::https", "Acquire::Check-Valid-Until", "Acquire::Check-Date")
    result = subprocess.run(["apt-config", "dump", *names], stdout=subprocess.PIPE, text=True, check=False)
    return [line.removesuffix(";") for line in result.stdout.splitlines() if not line.rstrip(";").endswith('""')]
