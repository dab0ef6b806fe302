"""Device nodes of GPUs: the nodes that a model may open, and the nodes that the kernel must refuse it.

All nodes of NVIDIA share one major number, so a scope's device filter lists paths, never device groups.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

DEV = Path("/dev")
DEVICES = Path("/proc/devices")
PCI_DEVICES = Path("/sys/bus/pci/devices")

# The nodes that CUDA needs besides the card's. nvidia-modeset is for displays: models do not need it.
_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")

# Each of these nodes gives access to one card, or to all.
_CARDS = ("nvidia[0-9]*", "dri/card[0-9]*", "dri/renderD[0-9]*", "kfd")


def of_gpus(minors: Iterable[int], pci_bus_ids: Iterable[str], *, dev: Path = DEV) -> tuple[str, ...]:
    """Return the existing nodes that a model on these GPUs may open.

    Args:
        minors: NVML's minor numbers; N of /dev/nvidiaN. It is not the index.
        pci_bus_ids: as NVML spells them, to find the cards' render nodes (Vulkan, video).
        dev: where device nodes are.
    """
    cards = [f"nvidia{minor}" for minor in minors]
    if not cards:
        return ()
    renderers = [f"dri/{node.name}" for bus_id in pci_bus_ids for node in _drm(bus_id).glob("renderD[0-9]*")]
    nodes = [dev / name for name in (*_SHARED, *cards, *renderers)]
    return tuple(str(node) for node in nodes if node.is_char_device())


def foreign(allowed: Collection[str], *, dev: Path = DEV) -> tuple[str, ...]:
    """Return the existing nodes of GPUs that are not in ``allowed``."""
    nodes = sorted(str(node) for pattern in _CARDS for node in dev.glob(pattern) if node.is_char_device())
    return tuple(node for node in nodes if node not in allowed)


def _drm(pci_bus_id: str) -> Path:
    return PCI_DEVICES / pci_address(pci_bus_id) / "drm"


def pci_address(bus_id: str) -> str:
    """Return the kernel's name of a PCI device. NVML pads the domain to eight digits, the kernel to four or more."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest}"
    except ValueError:
        return bus_id


def problem(minors: Iterable[int | None], *, dev: Path = DEV, devices: Path = DEVICES) -> tuple[str, str] | None:
    """Return what is wrong with the nodes of these GPUs, and what helps; None: nothing.

    CUDA fails in many ways without its nodes, and with a node of nvidia-uvm from before the module was loaded anew: its
    major number is another one each time.

    Args:
        minors: NVML's minor numbers of the GPUs.
        dev: where device nodes are.
        devices: where the kernel tells the major numbers.
    """
    remedy = "`systemctl restart gpusvc-devices.service` has the driver make them; `nvidia-modprobe -u -c 0` does too."
    for minor in minors:
        if minor is None:
            return (
                "A GPU has no device node of its own, as under WSL2 and on older Jetsons: none can be filtered.",
                "gpusvc does not support such machines. A model with `count = 0` runs, without a GPU.",
            )
        if not (dev / f"nvidia{minor}").exists():
            return f"The device node {dev}/nvidia{minor} is missing.", remedy
    major = _major(devices, "nvidia-uvm")
    if major is None:
        return None  # the module is not loaded, or this is no machine of its own
    uvm = dev / "nvidia-uvm"
    try:
        found = os.major(uvm.stat().st_rdev)
    except OSError:
        return f"The device node {uvm} is missing.", remedy
    if found != major:
        return f"The device node {uvm} is stale: its major number is {found}, the module's is {major}.", remedy
    return None


def _major(devices: Path, name: str) -> int | None:
    try:
        lines = devices.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[0]) for line in lines if line.split()[1:] == [name]), None)


def is_of_a_gpu(node: str) -> bool:
    """Return whether a path is that of a GPU's own node, or of one that gives access to all GPUs."""
    return any(fnmatchcase(node, f"{DEV}/{pattern}") for pattern in (*_CARDS, "dri/*", "nvidia-caps/*"))
