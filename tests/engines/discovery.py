#!/usr/bin/python3
"""How real engines find their GPUs: ``discovery.py MANNER`` prints the UUIDs that it would use, as a list in JSON.

The manners, each after an engine's own way from CUDA_VISIBLE_DEVICES to NVML:

int      vLLM until the middle of 2026: every entry is a number, and that number is NVML's index.
either   vLLM after that: an entry is a number, which is NVML's index, or a UUID.
torch    PyTorch: counts the valid entries by NVML, and leaves the rest to CUDA.
all      monitors and some launchers: every index that NVML counts, whatever the variable says.
cuda     llama.cpp: CUDA alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pynvml


def entries() -> list[str]:
    return [entry for entry in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if entry]


def by_cuda() -> list[str]:
    library = ctypes.CDLL("libfakecuda.so")
    uuids = ctypes.create_string_buffer(4096)
    library.fake_visible(uuids, ctypes.c_size_t(len(uuids)))
    return [uuid for uuid in uuids.value.decode().split(",") if uuid]


def uuid_of(handle: Any) -> str:
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    return uuid.decode() if isinstance(uuid, bytes) else str(uuid)


def as_numbers() -> Iterator[str]:
    for entry in entries():
        yield uuid_of(pynvml.nvmlDeviceGetHandleByIndex(int(entry)))


def as_either() -> Iterator[str]:
    for entry in entries():
        if entry.startswith(("GPU-", "MIG-")):
            yield uuid_of(pynvml.nvmlDeviceGetHandleByUUID(entry.encode()))
        else:
            yield uuid_of(pynvml.nvmlDeviceGetHandleByIndex(int(entry)))


def as_torch() -> list[str]:
    count = pynvml.nvmlDeviceGetCount()
    if any(entry.isdigit() for entry in entries()):
        valid = [entry for entry in entries() if int(entry) < count]
    else:
        known = [uuid_of(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
        valid = [entry for entry in entries() if any(uuid.startswith(entry) for uuid in known)]
    found = by_cuda()
    if len(valid) != len(found):
        raise SystemExit(f"torch counts {len(valid)} GPUs by NVML, and CUDA has {len(found)}")
    return found


def as_all() -> Iterator[str]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        yield uuid_of(pynvml.nvmlDeviceGetHandleByIndex(index))


MANNERS = {"int": as_numbers, "either": as_either, "torch": as_torch, "all": as_all, "cuda": by_cuda}


def main() -> None:
    pynvml.nvmlInit()
    try:
        print(json.dumps(list(MANNERS[sys.argv[1]]())))
    except (ValueError, pynvml.NVMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
