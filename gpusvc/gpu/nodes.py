"""Device nodes of GPUs: which ones a model may open, and which ones it must not be able to.

NVIDIA's nodes share one major number, so a scope is given paths, never groups of devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

DEV = Path("/dev")
PCI_DEVICES = Path("/sys/bus/pci/devices")

# What CUDA needs besides the card itself. nvidia-modeset is for displays, and none of a model's business.
_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")

# Each of these is a card of its own, or a door to all of them.
_CARDS = ("nvidia[0-9]*", "dri/card[0-9]*", "dri/renderD[0-9]*", "kfd")


def of_gpus(minors: Iterable[int], pci_bus_ids: Iterable[str], *, dev: Path = DEV) -> tuple[str, ...]:
    """The nodes that a model on these GPUs may open; only those that exist.

    Args:
        minors: NVML's minor numbers; N of /dev/nvidiaN. It is not the index.
        pci_bus_ids: as NVML spells them; for the cards' render nodes (Vulkan, video).
        dev: where device nodes are.
    """
    cards = [f"nvidia{minor}" for minor in minors]
    if not cards:
        return ()
    renderers = [f"dri/{node.name}" for bus_id in pci_bus_ids for node in _drm(bus_id).glob("renderD[0-9]*")]
    nodes = [dev / name for name in (*_SHARED, *cards, *renderers)]
    return tuple(str(node) for node in nodes if node.is_char_device())


def foreign(allowed: Collection[str], *, dev: Path = DEV) -> tuple[str, ...]:
    """The nodes of GPUs that are there and are not ``allowed``."""
    nodes = sorted(str(node) for pattern in _CARDS for node in dev.glob(pattern) if node.is_char_device())
    return tuple(node for node in nodes if node not in allowed)


def _drm(pci_bus_id: str) -> Path:
    # NVML pads the PCI domain to eight digits, the kernel to four.
    domain, _, rest = pci_bus_id.lower().partition(":")
    return PCI_DEVICES / f"{domain[-4:]}:{rest}" / "drm"
