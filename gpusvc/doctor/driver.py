"""Checks the GPU driver: its library, module and version, the device nodes, and other programs on the GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpusvc.doctor.finding import Finding, error, note, ok, warning
from gpusvc.errors import GpusvcError, NvmlError
from gpusvc.gpu import nodes
from gpusvc.gpu.reading import Gpu
from gpusvc.linux import processes
from gpusvc.paths import Paths, is_user_instance
from gpusvc.state import hung
from gpusvc.systemd.manager import Manager

_MODULE_VERSION = Path("/sys/module/nvidia/version")
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_DEV = Path("/dev")
_UNSUPPORTED = {"/dev/dxg": "WSL2", "/dev/nvmap": "this Jetson"}


def findings(paths: Paths) -> Iterator[Finding]:
    try:
        with hung.driver(paths) as driver:
            version, gpus = driver.driver_version(), driver.snapshot()
    except NvmlError as problem:
        yield _unsupported() or _unavailable(problem)
        return
    yield _version(version)
    yield from _gpus(gpus)
    yield from _nodes(gpus)
    yield from _persistence(gpus)
    yield from _sharing(gpus)


def _unavailable(problem: NvmlError) -> Finding:
    cards = [device.name for device in _PCI.glob("*") if _is_nvidia(device)]
    if cards:
        return error(
            "driver", problem.message, f"there is hardware of NVIDIA: {', '.join(sorted(cards))}", problem.hint
        )
    return note("driver", f"{problem.message} Models with count = 0 run all the same.", fix=problem.hint)


def _unsupported() -> Finding | None:
    for node, what in _UNSUPPORTED.items():
        if Path(node).exists() and not Path("/dev/nvidiactl").exists():
            sentence = f"gpusvc does not support the GPUs of {what}: they have no device nodes that it could filter."
            return note("driver", sentence, f"{node} exists", "Models with `count = 0` run.")
    return None


def _is_nvidia(device: Path) -> bool:
    try:
        vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
    except OSError:
        return False
    return vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASSES)


def _version(version: str) -> Finding:
    try:
        loaded = _MODULE_VERSION.read_text().strip()
    except OSError:
        return ok("driver", f"NVML answers; the driver is {version}.")
    if loaded != version:
        evidence = f"the library is {version}, the module in the kernel {loaded}"
        return error(
            "driver", "The driver was upgraded, but the old one is still loaded.", evidence, "Reboot the machine."
        )
    return ok("driver", f"NVML answers; the driver is {version}, in library and kernel.")


def _gpus(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    if not gpus:
        yield warning("gpus", "NVML counts no GPU.", fix="`nvidia-smi -L` and `journalctl -k -g NVRM` may tell why.")
    for gpu in gpus:
        what = f"GPU {gpu.index} ({gpu.name or 'unknown'})"
        if gpu.problem is not None:
            yield error("gpus", f"{what} cannot be read.", gpu.problem, _remedy(gpu))
        elif gpu.prohibited:
            sentence = f"{what} lets no program in: its compute mode is PROHIBITED."
            yield error("gpus", sentence, fix=f"`nvidia-smi -i {gpu.index} -c DEFAULT` opens it.")
        elif gpu.exclusive:
            sentence = f"{what} lets one process in only: no second model runs beside another there."
            fix = f"`nvidia-smi -i {gpu.index} -c DEFAULT` lets several in."
            yield note("gpus", sentence, "its compute mode is EXCLUSIVE_PROCESS", fix)
        elif gpu.mig:
            sentence = f"{what} is in MIG mode: gpusvc leaves it alone."
            yield note("gpus", sentence, fix=f"`nvidia-smi -i {gpu.index} -mig 0` makes it whole again.")
        elif gpu.total_bytes is None:
            yield note("gpus", f"{what} shares the CPU's memory: a release is proven by its processes alone.")
        elif gpu.processes is None:
            sentence = f"{what} does not list its processes: a release is proven by control group and bytes."
            yield warning("gpus", sentence, fix="A newer driver may list them.")
        else:
            yield ok("gpus", f"{what} can be read.", gpu.uuid)


def _remedy(gpu: Gpu) -> str:
    if "hangs" in (gpu.problem or ""):
        return "`journalctl -k -g NVRM` may tell why. Reboot if it stays so: until then no model on it can be released."
    return f"Stop its models, then `nvidia-smi --gpu-reset -i {gpu.index}`; if that fails, reboot."


def _nodes(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    wanted = ["/dev/nvidiactl", *(gpu.node for gpu in gpus if gpu.node)]
    missing = [node for node in wanted if not Path(node).exists()]
    if missing:
        fix = "`systemctl restart gpusvc-devices.service` has the driver make them; `nvidia-modprobe` does too."
        yield error("nodes", f"Device nodes are missing: {', '.join(missing)}.", fix=fix)
    elif gpus:
        yield ok("nodes", "Each GPU has its device node.")
    found = nodes.problem(
        [gpu.minor for gpu in gpus if gpu.problem is None and gpu.minor is not None and gpu.node not in missing]
    )
    if found is not None:
        yield error("nodes", found[0], fix=found[1])
    elif gpus and not (_DEV / "nvidia-uvm").exists():
        sentence = "/dev/nvidia-uvm is missing: CUDA cannot run in a model that starts now."
        yield error("nodes", sentence, fix="`nvidia-modprobe -u -c 0` loads the module and makes the node.")
    closed = [node for node in wanted if Path(node).exists() and not _is_open_to_all(node)]
    if closed:
        sentence = f"Only some users may open {', '.join(closed)}."
        fix = "The users of the models must be in that group: engines of gpusvc are in video and render."
        yield note("nodes", sentence, f"mode {Path(closed[0]).stat().st_mode & 0o777:o}", fix)


def _is_open_to_all(node: str) -> bool:
    return Path(node).stat().st_mode & 0o006 == 0o006


def _persistence(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    if not gpus or is_user_instance():  # his manager does not know
        return
    try:
        with Manager() as manager:
            daemon = manager.unit("nvidia-persistenced.service")
    except GpusvcError:
        return
    if daemon is None or daemon.active != "active":
        sentence = "The driver forgets the GPUs whenever nobody uses them: each first start takes seconds longer."
        evidence = "nvidia-persistenced.service does not run"
        yield note("persistence", sentence, evidence, "`systemctl enable --now nvidia-persistenced` keeps them.")
    else:
        yield ok("persistence", "nvidia-persistenced keeps the GPUs ready.")


def _sharing(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    servers = processes.named("nvidia-cuda-mps-server", "nvidia-cuda-mps-control")
    if servers and gpus:
        sentence = "NVIDIA's MPS runs: what a model holds may be listed under the MPS server, and outlive the model."
        evidence = "PID " + ", ".join(str(process.pid) for process in servers)
        yield warning("sharing", sentence, evidence, "`echo quit | nvidia-cuda-mps-control` ends it.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        sentence = "CUDA_VISIBLE_DEVICES is set in your shell; models do not see it, gpusvc sets it for each."
        yield note("sharing", sentence, f"CUDA_VISIBLE_DEVICES={visible}")
