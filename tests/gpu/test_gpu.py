"""gpusvc's NVML adapter on a real GPU, with real CUDA: run by pytest, or alone by ``python3 tests/gpu/test_gpu.py``.

Needs an NVIDIA GPU, Python 3.11, PyTorch, and pynvml (nvidia-ml-py; its one file on PYTHONPATH will do). It needs no
network and no systemd, and says what it leaves out and why.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpusvc.errors import NvmlError, NvmlUnavailableError  # noqa: E402  # the path is set for runs without pytest
from gpusvc.gpu.nvml import Nvml  # noqa: E402
from gpusvc.gpu.reading import Gpu  # noqa: E402

MIB = 1 << 20
SIZE = 2048 * MIB
# What other users of the GPU may take or give back meanwhile, and what the driver keeps for itself.
TOLERANCE = 256 * MIB

# Takes as many bytes as it is told to, and then works for as many seconds as each line says. Ends with its input.
CUDA = """
import sys, time, torch
held = torch.zeros(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("ready", flush=True)
for line in sys.stdin:
    matrix = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + float(line)
    while time.monotonic() < end:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()
    print("done", flush=True)
"""

# Says what comes of opening the node, of NVML, and of CUDA, where the node is denied.
DENIED = """
import os, sys
try:
    os.close(os.open(sys.argv[1], os.O_RDWR))
    print("node: opened")
except OSError as error:
    print("node:", error.errno)
from gpusvc.errors import GpusvcError
from gpusvc.gpu.nvml import Nvml
try:
    print("NVML:", [(gpu.index, gpu.problem) for gpu in Nvml().snapshot()])
except GpusvcError as error:
    print("NVML:", error)
import torch
try:
    torch.zeros(1, device="cuda")
    print("CUDA: allowed")
except Exception as error:
    print("CUDA: denied:", str(error).splitlines()[0])
"""

T = TypeVar("T")


class RealGpu(unittest.TestCase):
    nvml: ClassVar[Nvml]
    gpu: Gpu

    @classmethod
    def setUpClass(cls) -> None:
        try:
            cls.nvml = Nvml()
        except ImportError:
            raise unittest.SkipTest("pynvml is missing: install nvidia-ml-py, or put pynvml.py on PYTHONPATH") from None
        except NvmlUnavailableError as error:
            raise unittest.SkipTest(f"no GPU here: {error}") from None
        cls.addClassCleanup(cls.nvml.close)

    def setUp(self) -> None:
        readable = [gpu for gpu in self.nvml.snapshot() if gpu.problem is None and not gpu.mig]
        if not readable:
            self.skipTest("no GPU can be read, or all are in MIG mode")
        self.gpu = max(readable, key=lambda gpu: gpu.free_bytes or 0)
        if self.gpu.free_bytes is not None and self.gpu.free_bytes < 2 * SIZE:
            self.skipTest(f"GPU {self.gpu.index} has no {2 * SIZE // MIB} MiB free to try with")

    # ---- readings ----

    def test_every_gpu_is_read_completely(self) -> None:
        print(f"\ndriver {self.nvml.driver_version()}")
        for gpu in self.nvml.snapshot(utilisation=True):
            print(f"  {gpu}")
            assert gpu.uuid.startswith("GPU-")
            assert gpu.node is not None
            assert Path(gpu.node).exists()
            if gpu.total_bytes is None or gpu.used_bytes is None or gpu.free_bytes is None:
                print("  its memory is not told (unified with the CPU's?)")
                continue
            assert gpu.used_bytes + gpu.free_bytes <= gpu.total_bytes

    def test_readings_are_those_of_nvidia_smi(self) -> None:
        if shutil.which("nvidia-smi") is None:
            self.skipTest("there is no nvidia-smi to compare with")
        query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
        told = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
        ours = [f"{gpu.index}, {gpu.uuid}, {gpu.pci_bus_id}" for gpu in self.nvml.snapshot()]
        assert told == ours

    def test_snapshots_agree_on_the_gpus_and_list_processes_only_if_asked_to(self) -> None:
        known = {(gpu.index, gpu.uuid, gpu.total_bytes) for gpu in self.nvml.snapshot()}
        assert known
        for processes in (False, True):
            began = time.perf_counter()
            snapshots = [self.nvml.snapshot(processes=processes) for _ in range(20)]
            print(f"\na snapshot, processes={processes}: {(time.perf_counter() - began) / 20 * 1000:.2f} ms")
            for gpus in snapshots:
                assert {(gpu.index, gpu.uuid, gpu.total_bytes) for gpu in gpus} == known
                if not processes:
                    assert {gpu.processes for gpu in gpus} == {None}

    def test_a_gpu_that_does_not_exist_is_an_error(self) -> None:
        try:
            self.nvml.process_utilisation("GPU-00000000-0000-0000-0000-000000000000", 0)
        except NvmlError as error:
            print(f"\n{error}")
        else:
            self.fail("it has samples")

    # ---- a process's memory ----

    def test_an_allocation_is_seen_as_that_of_its_process(self) -> None:
        with self.cuda_process() as process:
            gpu = self.attributed(process)
            used = gpu.used_by({process.pid})
            print(f"\n{SIZE // MIB} MiB are told as {(used or 0) / MIB:.0f} MiB of process {process.pid}")
            if used is not None:
                assert used >= SIZE

    def test_memory_comes_back_after_a_kill(self) -> None:
        before = self.read().used_bytes
        with self.cuda_process() as process:
            during = self.read().used_bytes
            process.kill()
            began = time.monotonic()
            process.wait()
            reaped = time.monotonic() - began
            pid = process.pid
            self.eventually(lambda: not self.lists(pid))
            unlisted = time.monotonic() - began
            if before is None or during is None:
                print(f"\nafter SIGKILL: reaped in {reaped * 1000:.1f} ms, unlisted in {unlisted * 1000:.1f} ms")
                self.skipTest("this GPU does not tell its used bytes")
            assert during - before >= SIZE - TOLERANCE
            self.eventually(lambda: (self.read(processes=False).used_bytes or 0) <= before + TOLERANCE)
            returned = time.monotonic() - began
        print(
            f"\nafter SIGKILL: reaped in {reaped * 1000:.1f} ms, unlisted in {unlisted * 1000:.1f} ms, "
            f"{(during - before) / MIB:.0f} MiB back in {returned * 1000:.1f} ms"
        )

    def test_work_is_seen_as_that_of_its_process(self) -> None:
        with self.cuda_process() as process:
            self.attributed(process)
            _, since = self.nvml.process_utilisation(self.gpu.uuid, 0)
            assert process.stdin is not None
            process.stdin.write("5\n")
            process.stdin.flush()

            def busiest() -> int | None:
                nonlocal since
                samples, since = self.nvml.process_utilisation(self.gpu.uuid, since)
                if samples is None:
                    self.skipTest("this GPU does not tell the utilisation of processes")
                return max((sample.sm_percent for sample in samples if sample.pid == process.pid), default=None)

            share = self.eventually(busiest)
            total = self.read(utilisation=True).utilisation_percent
            print(f"\nprocess {process.pid} has {share} % of the SMs' time; the GPU is busy for {total} %")

    # ---- isolation ----

    def test_cuda_fails_where_systemd_denies_the_node(self) -> None:
        if not Path("/run/systemd/system").is_dir() or os.geteuid() != 0:
            self.skipTest("this machine does not run systemd, or this is not root")
        self.need_torch()
        allowed = [
            node for node in ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools") if Path(node).exists()
        ]
        environment = {"PYTHONPATH": self.environment()["PYTHONPATH"], "CUDA_VISIBLE_DEVICES": self.gpu.uuid}
        command = [
            *("systemd-run", "--quiet", "--wait", "--pipe", "--collect"),
            *(f"--property=DeviceAllow={node} rw" for node in allowed),
            "--property=DevicePolicy=closed",
            *(f"--setenv={key}={value}" for key, value in environment.items()),
            *(sys.executable, "-c", DENIED, self.node()),
        ]
        self.check_denied(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def test_cuda_fails_where_a_cgroups_device_program_denies_the_node(self) -> None:
        self.need_torch()
        minor = os.minor(Path(self.node()).stat().st_rdev)
        with denying_cgroup(self, 195, minor) as cgroup:
            # The shell moves itself: a function between fork and exec would not be safe beside NVML's threads.
            command = ["sh", "-c", 'echo 0 >"$0"/cgroup.procs && exec "$@"', str(cgroup)]
            command += [sys.executable, "-c", DENIED, self.node()]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment())
        self.check_denied(done.stdout)

    def check_denied(self, said: str) -> None:
        print("\n" + said.rstrip())
        assert f"node: {errno.EPERM}" in said
        assert "CUDA: denied" in said

    # ---- what they share ----

    def node(self) -> str:
        node = self.gpu.node
        if node is None or not Path(node).exists():
            self.skipTest(f"GPU {self.gpu.index} has no device node here")
        return node

    def read(self, *, processes: bool = True, utilisation: bool = False) -> Gpu:
        gpus = self.nvml.snapshot(processes=processes, utilisation=utilisation)
        (gpu,) = [gpu for gpu in gpus if gpu.uuid == self.gpu.uuid]
        assert gpu.problem is None
        return gpu

    def need_torch(self) -> None:
        if subprocess.run([sys.executable, "-c", "import torch"], check=False, capture_output=True).returncode:
            self.skipTest("PyTorch cannot be imported")

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": self.gpu.uuid}

    @contextmanager
    def cuda_process(self) -> Iterator[subprocess.Popen[str]]:
        """A process that holds SIZE bytes of the GPU."""
        self.need_torch()
        command = [sys.executable, "-c", CUDA, str(SIZE)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    process.wait()
                    errors.seek(0)
                    self.fail(f"CUDA does not work here:\n{errors.read()}")
                yield process
            finally:
                process.kill()

    def lists(self, pid: int) -> bool:
        processes = self.read().processes
        if processes is None:
            self.skipTest("NVML does not tell the processes here")
        return pid in {process.pid for process in processes}

    def attributed(self, process: subprocess.Popen[str]) -> Gpu:
        """The GPU as it is read while the process is listed; skips where NVML knows other pids than we do."""
        listed = self.lists(process.pid)
        gpu = self.read()
        if not listed:
            # In the first PID namespace, 2 is the kernel's.
            comm = Path("/proc/2/comm")
            if comm.exists() and comm.read_text() == "kthreadd\n":
                self.fail(f"process {process.pid} is not among {gpu.processes}")
            self.skipTest(f"in this container NVML tells {gpu.processes}, which is not of its PID namespace")
        return gpu

    def eventually(self, condition: Callable[[], T | None], *, seconds: float = 30) -> T:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
        raise AssertionError(f"not within {seconds} s")


@contextmanager
def denying_cgroup(test: unittest.TestCase, major: int, minor: int) -> Iterator[Path]:
    """A cgroup (v2) whose processes may open every device but this one; skips where it can't be made."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None:
        test.skipTest("no cgroup v2 hierarchy is mounted")
    cgroup = root / f"gpusvc-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        test.skipTest(f"no cgroup can be made here: {error}")
    try:
        try:
            attach_device_program(cgroup, major, minor)
        except OSError as error:
            test.skipTest(f"no BPF device program can be attached here: {error}")
        yield cgroup
    finally:
        cgroup.rmdir()


def attach_device_program(cgroup: Path, major: int, minor: int) -> None:
    """What systemd does for DevicePolicy=, for one device: bpf(2) with BPF_PROG_LOAD and BPF_PROG_ATTACH.

    Raises:
        OSError: it is not permitted, or the kernel can't.
    """

    def instruction(code: int, destination: int, source: int, offset: int, value: int) -> bytes:
        return struct.pack("=BBhi", code, source << 4 | destination, offset, value)

    load, jump_if_not, move, leave = 0x61, 0x55, 0xB7, 0x95
    program = b"".join(
        (
            instruction(load, 2, 1, 4, 0),  # r2 = struct bpf_cgroup_dev_ctx's major
            instruction(load, 3, 1, 8, 0),  # r3 = its minor
            instruction(jump_if_not, 2, 0, 3, major),
            instruction(jump_if_not, 3, 0, 2, minor),
            instruction(move, 0, 0, 0, 0),
            instruction(leave, 0, 0, 0, 0),
            instruction(move, 0, 0, 0, 1),
            instruction(leave, 0, 0, 0, 0),
        )
    )
    instructions, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"Apache-2.0")
    # union bpf_attr: prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, insn_cnt, insns, license, and nothing else.
    loaded = bpf(
        5, struct.pack("=IIQQ", 15, len(program) // 8, ctypes.addressof(instructions), ctypes.addressof(licence))
    )
    target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # target_fd, attach_bpf_fd, attach_type = BPF_CGROUP_DEVICE, attach_flags = BPF_F_ALLOW_MULTI
        bpf(8, struct.pack("=IIII", target, loaded, 6, 2))
    finally:
        os.close(target)
        os.close(loaded)


def bpf(command: int, attributes: bytes) -> int:
    number = {"x86_64": 321, "aarch64": 280}.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) has an unknown number on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    outcome: int = ctypes.CDLL(None, use_errno=True).syscall(number, command, buffer, 128)
    if outcome < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return outcome


if __name__ == "__main__":
    unittest.main(verbosity=2)
