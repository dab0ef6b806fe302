"""Device nodes of GPUs: the nodes that a model may open, and the nodes that the kernel must refuse it.

All nodes of NVIDIA share one major number, so a scope's device filter lists paths, never device groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

DEV = Path("/dev")
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
