"""GPUs as NVML might show them, for tests of what is decided about them."""

from __future__ import annotations

from collections.abc import Mapping

from gpusvc.gpu.reading import Gpu, GpuProcess

GIB = 1 << 30
MIB = 1 << 20


def uuid_of(index: int) -> str:
    return f"GPU-{index:08d}-0000-4000-8000-000000000000"


def a_gpu(
    index: int = 0,
    *,
    total: int | None = 24 * GIB,
    uncounted: int = 0,
    processes: Mapping[int, int | None] | None = None,
    name: str = "NVIDIA Imaginary 4090",
    mig: bool = False,
) -> Gpu:
    """One that can be read. ``total`` None: its memory is unified with the CPU's, so that no bytes are told."""
    held = processes or {}
    used = uncounted + sum(size or 0 for size in held.values())
    return Gpu(
        index=index,
        uuid=uuid_of(index),
        name=name,
        minor=index,
        pci_bus_id=f"00000000:0{index}:00.0",
        total_bytes=total,
        used_bytes=None if total is None else used,
        free_bytes=None if total is None else total - used,
        processes=tuple(GpuProcess(pid, size) for pid, size in sorted(held.items())),
        mig=mig,
    )


def a_lost_gpu(index: int = 0, *, problem: str = "The GPU is lost.") -> Gpu:
    return Gpu(
        index=index,
        uuid=uuid_of(index),
        name="NVIDIA Imaginary 4090",
        minor=index,
        pci_bus_id=f"00000000:0{index}:00.0",
        problem=problem,
    )
