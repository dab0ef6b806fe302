#!/usr/bin/python3 -I
"""The demo's engine where there is a real GPU and no real engine: takes VRAM, then serves as ``engine.py`` beside it.

Standard library and the driver's libcuda.so.1 only, no CUDA toolkit. ``cuda_engine.py BYTES [argument of engine.py]…``
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path

# CUDA Driver API; the numbered names are those that cuda.h maps the plain ones to.
_cuda = ctypes.CDLL("libcuda.so.1")


def call(function: str, *arguments: object) -> None:
    result = getattr(_cuda, function)(*arguments)
    if result != 0:
        text = ctypes.c_char_p()
        _cuda.cuGetErrorString(result, ctypes.byref(text))
        sys.exit(f"CUDA error: {(text.value or b'unknown').decode()} ({function} → {result})")


def allocate(amount: int) -> int:
    """Takes ``amount`` bytes on each GPU that CUDA shows; how many there are."""
    count, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    for ordinal in range(count.value):
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(amount))
    return count.value


if __name__ == "__main__":
    taken = int(sys.argv.pop(1))
    print(f"{allocate(taken)} GPU visible, {taken >> 20} MiB taken", file=sys.stderr, flush=True)
    runpy.run_path(str(Path(__file__).with_name("engine.py")), run_name="__main__")
