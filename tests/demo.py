"""What ``./demo`` shows: one model from its file to the proof that its VRAM is free, as a transcript of a shell.

Every command is really run, and its output is what is printed. Standard library only: it runs on a bare machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.engines import tinygguf
from tests.machine import tree
from tests.machine.container import MachineError
from tests.machine.host import GGUF, REPOSITORY, Host, build_package
from tests.machine.tree import Generation

NAME = "demo"
UNIT = f"model@{NAME}"
QUESTION = "Where does the water go?"

# On this machine, while it lasts; the engine's user must be able to read it, and an own clone may be in /root.
ENGINE_DIRECTORY = Path("/var/lib/gpusvc-demo")
MODEL_FILE = Path(f"/etc/gpusvc/models/{NAME}.toml")
REAL_VRAM_BYTES = 1 << 30
_ENGINE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_COLOURFUL = sys.stdout.isatty() and "NO_COLOR" not in os.environ

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]


class DemoError(Exception):
    """A step did not do what it shows."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where the demo happens; its model's file is in place."""

    shell: Shell
    gpus: bool
    remarks: tuple[str, ...]  # what of it is not the real thing


# What is shown


def play(scene: Scene) -> None:
    """The transcript.

    Raises:
        DemoError: a command failed, or did not say what it should.
    """
    run = scene.shell
    _heading("A model is one file, and then it is a unit of systemd")
    _show(run, f"cat {MODEL_FILE}")
    _show(run, "gpusvc check")
    if scene.gpus:
        _show(run, "gpusvc gpus")

    _heading("Start: done when the engine itself answers on its port")
    _show(run, f"systemctl start {UNIT}")
    _show(run, "gpusvc ps", expect="ready")
    _show(run, f"systemctl status --lines=4 {UNIT}", expect="Ready at")

    _heading("Ask it")
    url = f"http://127.0.0.1:{_ps(run)['port']}/v1/chat/completions"
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24})
    answer = 'json.load(sys.stdin)["choices"][0]["message"]["content"]'
    pick = f"python3 -c 'import json, sys; print({answer})'"
    if not _show(run, f"curl -s {url} \\\n    -d '{body}' |\n    {pick}").strip():
        raise DemoError("The engine gave no answer.")

    _heading("Its processes are in a scope that the kernel keeps off everything else, and that is bound to the unit")
    _show(run, f"systemctl show model-{NAME}.scope -p BindsTo,KillMode,DevicePolicy,DeviceAllow", expect="closed")

    _heading("Kill the launcher: PID 1 ends the engine, the release is proven, and only then a new one starts")
    before = _ps(run)["pid"]
    _show(run, f"systemctl kill --signal=KILL --kill-whom=main {UNIT}")
    _await(lambda: _ps(run)["state"] == "ready" and _ps(run)["pid"] != before, "a new engine is ready")
    log = f"journalctl -u {UNIT} --no-hostname"
    told = "Main process exited|is released after|Scheduled restart|Ready after|Started"
    _show(run, f"{log} | grep -E '{told}' | tail -n 5", expect="is released after")

    _heading("Stop: done when nothing of it is left, and that is proven")
    _show(run, f"systemctl stop {UNIT}")
    _show(run, f"{log} | grep 'is released after' | tail -n 1", expect="is released after")
    _show(run, "gpusvc ps")
    if scene.gpus:
        _show(run, "gpusvc gpus")
    if any(model["name"] == NAME for model in json.loads(run("gpusvc ps --json").stdout)):
        raise DemoError(f"{NAME} is still there.")


def _show(run: Shell, command: str, *, expect: str = "") -> str:
    """Run a command and print both; its output."""
    print(f"{_style('2', '#')} {_style('1', command)}", flush=True)
    done = run(command)
    output = done.stdout + done.stderr
    print(output.rstrip("\n") + "\n" if output.strip() else "", flush=True)
    if done.returncode != 0:
        raise DemoError(f"`{command}` ended with exit status {done.returncode}.")
    if expect not in output:
        raise DemoError(f"`{command}` does not say {expect!r}.")
    return output


def _ps(run: Shell) -> dict[str, object]:
    """What gpusvc says of the model."""
    models: list[dict[str, object]] = json.loads(run("gpusvc ps --json").stdout)
    return next((model for model in models if model["name"] == NAME), {"state": "", "pid": None, "port": None})


def _await(condition: Callable[[], bool], what: str, *, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"Not within {timeout_seconds:.0f} s: {what}.")
        time.sleep(0.1)


def _heading(text: str) -> None:
    print(_style("1;36", f"── {text}."), flush=True)


def _say(text: str) -> None:
    print(_style("36", f"   {text}"), flush=True)


def _style(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if _COLOURFUL else text


# Where it happens


@contextmanager
def container() -> Iterator[Scene]:
    """A machine that is gone afterwards: with the newest systemd and the real llama-server if there can be one."""
    generation = Generation.FORKY
    _say("Making a Debian tree for the container, unless it is there from an earlier time …")
    try:
        lower = tree.ensure(generation)
    except tree.TreeError as error:
        generation = Generation.TRIXIE
        _say(f"Debian forky, which has llama-server, cannot be made here now: {str(error).splitlines()[0]}")
        lower = tree.ensure(generation)
    with tempfile.TemporaryDirectory() as scratch:
        _say("Building the package …")
        package = build_package(Path(scratch))
        with Host(lower, name="gpusvc-demo") as machine:
            _say(f"Booting Debian {generation}, and installing {package.name} in it …")
            machine.boot()
            machine.add_gpus()
            machine.add_engines()
            machine.install(package)
            real = generation.has_llama_server()
            if real:
                text = _llama_server("llama-server", GGUF, gpu='vram = "8GiB"', env=_SIMULATED)
            else:
                text = _stand_in(["test-engine", "--vram", "6GiB"], gpu='vram = "8GiB"')
            machine.write(str(MODEL_FILE), text)
            version = machine.run("systemctl", "--version").stdout.split()[1]
            remarks = (
                f"a container with systemd {version} as PID 1; kernel, control groups and device filter are real",
                "the GPUs are SIMULATED: a libnvidia-ml.so.1 whose VRAM the kernel frees when a process ends",
                "the engine is the real llama-server; its model has random weights, and talks nonsense"
                if real
                else "the engine is a SIMULATED one, tests/engines/engine.py",
            )
            # With a directory to be in: the one that this process is in does not exist there.
            shell = ("env", "--chdir=/", *(f"{name}={value}" for name, value in _settings().items()), "sh", "-c")
            yield Scene(
                shell=lambda command: machine.run(*shell, command, check=False, timeout=120),
                gpus=True,
                remarks=remarks,
            )


@contextmanager
def host() -> Iterator[Scene]:
    """This machine. The package stays, the model goes."""
    if MODEL_FILE.exists():
        raise DemoError(f"{MODEL_FILE} exists already; the demo would use that name.")
    _say("Building the package …")
    package = build_package(REPOSITORY / "dist")
    _say(f"Installing it: apt-get install {package}")
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qqy -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0"
    install = f"{apt} --allow-downgrades install '{package}'"
    done = _here(f"{install} || {{ {apt} update && {install}; }}")
    if done.returncode != 0:
        raise DemoError(f"apt-get failed:\n{done.stdout}{done.stderr}")
    gpus = bool(json.loads(_here("gpusvc gpus --json").stdout or "[]"))
    try:
        text, remark = _engine_here(gpus=gpus)
        MODEL_FILE.write_text(text)
        remarks = [f"this machine; {remark}"]
        if not gpus:
            remarks.append("there is no NVIDIA GPU, so the model asks for none: ./demo --container simulates some")
        yield Scene(shell=_here, gpus=gpus, remarks=tuple(remarks))
    finally:
        _here(f"systemctl stop {UNIT}; systemctl reset-failed {UNIT}")
        MODEL_FILE.unlink(missing_ok=True)
        shutil.rmtree(ENGINE_DIRECTORY, ignore_errors=True)
    _say("gpusvc stays installed; apt purge gpusvc removes it.")


def _engine_here(*, gpus: bool) -> tuple[str, str]:
    """The model's file for this machine, and what its engine is."""
    ENGINE_DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    program = shutil.which("llama-server", path=_ENGINE_PATH)
    if program is not None and (not gpus or "CUDA" in _here(f"{program} --list-devices").stdout):
        gguf = ENGINE_DIRECTORY / "tiny.gguf"
        tinygguf.write(gguf)
        gguf.chmod(0o644)
        remark = f"the engine is {program}; its model has random weights, and talks nonsense"
        return _llama_server(program, str(gguf), gpu='vram = "2GiB"' if gpus else "count = 0"), remark
    for name in ("engine.py", "cuda_engine.py"):
        shutil.copy(REPOSITORY / "tests/engines" / name, ENGINE_DIRECTORY)
        (ENGINE_DIRECTORY / name).chmod(0o755)
    if not gpus:
        command = ["/usr/bin/python3", "-I", str(ENGINE_DIRECTORY / "engine.py")]
        return _stand_in(command, gpu="count = 0"), "the engine only echoes: there is no llama-server"
    command = ["/usr/bin/python3", "-I", str(ENGINE_DIRECTORY / "cuda_engine.py"), str(REAL_VRAM_BYTES)]
    remark = f"the engine takes {REAL_VRAM_BYTES >> 20} MiB of VRAM and only echoes: there is no llama-server with CUDA"
    return _stand_in(command, gpu='vram = "2GiB"'), remark


def _here(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **_settings()}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    return subprocess.run(
        ["sh", "-c", command],
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )


def _settings() -> dict[str, str]:
    colours = {"SYSTEMD_COLORS": "1", "SYSTEMD_URLIFY": "0"} if _COLOURFUL else {}
    return {"SYSTEMD_PAGER": "", "LC_ALL": "C.UTF-8", **colours}


# The model files


def _llama_server(program: str, gguf: str, *, gpu: str, env: str = "") -> str:
    command = json.dumps([program, "-m", gguf, "--host", "127.0.0.1", "--port", "{port}", "-c", "512"])
    return f'description = "A tiny model with random weights"\ncommand = {command}\n{env}\n[gpu]\n{gpu}\n'


def _stand_in(command: list[str], *, gpu: str) -> str:
    arguments = json.dumps([*command, "--model", NAME, "--port", "{port}"])
    return f'description = "A stand-in for a model server"\ncommand = {arguments}\n\n[gpu]\n{gpu}\n'


# The first library takes the simulated VRAM for an engine that knows nothing of it.
_SIMULATED = 'env = { LD_PRELOAD = "/usr/local/lib/libfakecuda.so", FAKE_VRAM = "6GiB" }\n'


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stage = {"container": container, "host": host}[sys.argv[1]]
    print(_style("1", "gpusvc: a model starts, answers, stops, and its VRAM is proven free.\n"))
    try:
        with stage() as scene:
            for remark in scene.remarks:
                _say(f"This is {remark}." if remark is scene.remarks[0] else f"{remark[0].upper()}{remark[1:]}.")
            print()
            play(scene)
    except (DemoError, MachineError, tree.TreeError, OSError, subprocess.SubprocessError) as error:
        print(f"{_style('1;31', 'demo: it failed.')} {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(_style("1;32", "All of it worked."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
