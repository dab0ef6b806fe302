"""The parts of a model's VRAM, as an estimate tells them."""

from __future__ import annotations

from typing import NamedTuple

from gpusvc.quantity import MIB, format_size

# What CUDA takes on each GPU for a process: its context, its kernels, the workspace of cuBLAS. It is 250 to 500 MiB.
DRIVER_BYTES = 384 * MIB

# Of an engine or a model whose compute buffer cannot be computed.
USUAL_COMPUTE_BYTES = 128 * MIB


class Estimate(NamedTuple):
    """Bytes of VRAM by what they are for, on all GPUs of the model together unless a field says "each GPU"."""

    weights_bytes: int
    cache_bytes: int
    state_bytes: int  # of recurrent layers
    compute_bytes: int  # on each GPU
    tokens: int | None = None  # of context that the cache is for; None: the files do not tell its size
    gpus: int = 1  # that the command itself splits the model over
    gpu_share: float | None = None  # of each GPU's VRAM, if the command tells the engine to take that much

    @property
    def bytes(self) -> int:
        return self._shared_bytes + self._each_bytes * self.gpus

    @property
    def _shared_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.state_bytes

    @property
    def _each_bytes(self) -> int:
        return self.compute_bytes + DRIVER_BYTES

    @property
    def reason(self) -> str:
        """Return a sentence with the parts."""
        parts = [f"{format_size(self.weights_bytes)} of weights"]
        if self.cache_bytes:
            parts.append(f"{format_size(self.cache_bytes)} of KV cache for {self.tokens} tokens")
        if self.state_bytes:
            parts.append(f"{format_size(self.state_bytes)} of recurrent state")
        parts.append(f"{format_size(self.compute_bytes * self.gpus)} of compute buffers")
        unknown = " Its files do not tell the size of its KV cache." if self.tokens is None else ""
        return f"{', '.join(parts)}, and {format_size(DRIVER_BYTES * self.gpus)} for the driver.{unknown}"

    def bytes_on_gpu(self, total_bytes: int | None, count: int) -> int:
        """Return what the model needs on one of ``count`` GPUs that has ``total_bytes`` of VRAM; None: unknown."""
        if self.gpu_share is not None and total_bytes is not None:
            return int(total_bytes * self.gpu_share)
        return -(-self._shared_bytes // count) + self._each_bytes
