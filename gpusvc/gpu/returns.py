"""NVML's return codes (nvmlReturn_t), and what they mean for a person."""

from __future__ import annotations

# nvmlReturn_t. Spelled out, since not every release of pynvml names all of them.
SUCCESS = 0
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
ARGUMENT_VERSION_MISMATCH = 25
UNKNOWN = 999

# The handles are invalid. A new client may succeed.
STALE = frozenset({UNINITIALIZED, GPU_IS_LOST, RESET_REQUIRED})
# This driver or this GPU does not support the call.
ABSENT = frozenset({NOT_SUPPORTED, FUNCTION_NOT_FOUND})
NO_MEMORY_V2 = ABSENT | {INVALID_ARGUMENT, ARGUMENT_VERSION_MISMATCH}

UNAVAILABLE = {
    LIBRARY_NOT_FOUND: (
        "There is no NVIDIA driver library (libnvidia-ml.so.1) on this machine.",
        "Install the NVIDIA driver; a model that needs no GPU says count = 0 under [gpu].",
    ),
    DRIVER_NOT_LOADED: (
        "The NVIDIA driver is not loaded.",
        "Try 'modprobe nvidia'; 'journalctl -k -g NVRM' tells why it does not load.",
    ),
    LIB_RM_VERSION_MISMATCH: (
        "The NVIDIA library and the loaded kernel module are of different versions.",
        "The driver was upgraded: reboot, or unload the old module. Models that run go on until then.",
    ),
    NO_PERMISSION: (
        "NVML may not be used by this user.",
        "Look at the mode of /dev/nvidiactl, and at the DeviceAllow= of the calling unit.",
    ),
    # NVML returns this where /dev/nvidiactl cannot be opened.
    UNKNOWN: (
        "NVML cannot be initialised, most likely since /dev/nvidiactl may not be opened.",
        "Look at the mode of /dev/nvidiactl, and at the DeviceAllow= of the calling unit; 'nvidia-smi' says more.",
    ),
    FUNCTION_NOT_FOUND: (
        "The NVIDIA driver library is too old for NVML's Python module.",
        "Install a driver of branch 510 or newer.",
    ),
}

PROBLEMS = {
    GPU_IS_LOST: "The GPU is lost: it fell off the bus, or was reset and is not back.",
    RESET_REQUIRED: "The GPU must be reset before it can be used again.",
    NO_PERMISSION: "The GPU's device node may not be opened.",
}
