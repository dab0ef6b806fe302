"""``run``: runs any program as a model, with the caller's terminal and exit status."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpusvc import names
from gpusvc.cli.arguments import paths_of
from gpusvc.cli.commands.lifecycle import doing_of, why_not
from gpusvc.cli.commands.use import CommandError
from gpusvc.cli.progress import Progress
from gpusvc.errors import GpusvcError, PermissionDeniedError, UnreleasedError, UsageError
from gpusvc.paths import is_user_instance

if TYPE_CHECKING:
    from gpusvc.launcher.caller import Caller
    from gpusvc.paths import Paths
    from gpusvc.state.use import Use
    from gpusvc.systemd.manager import Manager

SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": True}

_TICK_SECONDS = 0.1
_TOUCH_SECONDS = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# The unit of a run is not restarted, and it sees the files that its caller sees.
_DROP_IN = """\
[Service]
Restart=no
PrivateTmp=no
ProtectSystem=no
"""

_GPUS: Any = typer.Option(1, "--gpus", min=0, metavar="N", help="How many GPUs it needs.")
_DEVICES: Any = typer.Option([], "--device", metavar="GPU", help="One that it may have, as `gpusvc gpus` shows it.")
_VRAM: Any = typer.Option("", "--vram", metavar="SIZE", help="VRAM that it needs on each; else as learned.")
_NAME: Any = typer.Option("", "--name", metavar="NAME", help="What to call it; else after the program.")
_USER: Any = typer.Option("", "--user", metavar="USER", help="Whom it runs as; else you, before sudo.")
_COMMAND: Any = typer.Argument(..., help="The program and its arguments.", metavar="-- COMMAND...")


def run(
    context: typer.Context,
    command: list[str] = _COMMAND,
    gpus: int = _GPUS,
    devices: list[str] = _DEVICES,
    vram: str = _VRAM,
    name: str = _NAME,
    user: str = _USER,
) -> int:
    """Run a program as a model, on GPUs of its own.

    Idle models make room for it, it sees only its GPUs, and at its end their VRAM is proven free.

    The program has this terminal, and this command returns its exit status. Ctrl-C interrupts the program; a second
    Ctrl-C, a hang-up or the end of this command stop it with all processes that it started.
    """
    paths = paths_of(context)
    command = command[1:] if command[0] == "--" else command
    if not command:
        raise UsageError("Name a program to run.")
    program = shutil.which(command[0])
    if program is None:
        raise CommandError(f"{command[0]} is no program that can be run.", 127)
    if os.geteuid() != 0 and not is_user_instance():
        raise PermissionDeniedError(
            "You may not run a program as a model of this machine.",
            hint="Say it with sudo, or `gpusvc --user run` to have it as a model of yours.",
        )
    name = _free_name(paths, names.parse_name(name) if name else None, Path(program).name)
    gpu = _gpu_table(gpus, devices, vram)
    text = _model_file(paths, name, Path(program).absolute(), command[1:], user or _caller_name(), gpu)
    with _prepared(paths, name, text) as going:
        return going.see_through()


def _caller_name() -> str:
    import pwd

    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def _free_name(paths: Paths, wanted: str | None, program: str) -> str:
    """Return the given name, or a free one made from the program's name."""
    from gpusvc.config import files as config
    from gpusvc.state import lease

    taken = {*config.model_names(paths), *lease.holders(paths)}
    if wanted is not None:
        if wanted in taken:
            raise UsageError(f"There is a model {wanted} already.", hint="Give it another --name.")
        return wanted
    stem = "".join(letter if names.is_name(letter) or letter in "_.-" else "-" for letter in program)[:100]
    stem = stem if names.is_name(stem) else "run"
    numbered = (stem if number == 1 else f"{stem}-{number}" for number in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken and not paths.run_file(name).exists())


def _model_file(paths: Paths, name: str, program: Path, arguments: list[str], user: str, gpu: dict[str, object]) -> str:
    from gpusvc.config import toml

    values: dict[str, object] = {
        "description": f"{program.name}, run by {user}",
        "command": [str(program)],
        "arguments": arguments,
        "user": user,
        "working_directory": str(Path.cwd()),
        "caller": str(_socket(paths, name)),
        "health": "",
        "health_timeout": 0,
        "idle_timeout": 0,
        "busy_timeout": 0,
        "gpu": gpu,
    }
    try:
        text = toml.document(values)
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("An argument of the program is not UTF-8 text.") from None
    return text


def _gpu_table(gpus: int, devices: list[str], vram: str) -> dict[str, object]:
    keys: dict[str, object] = {"count": gpus}
    if devices:
        keys["devices"] = devices
    if vram:
        keys["vram"] = vram
    return keys


def _socket(paths: Paths, name: str) -> Path:
    return paths.runs_directory / f"{name}.socket"


@contextlib.contextmanager
def _prepared(paths: Paths, name: str, text: str) -> Iterator[_Run]:
    """Yield a run; its files exist during the block."""
    from gpusvc import files
    from gpusvc.config.files import load_host, load_startable_model
    from gpusvc.launcher.caller import Caller
    from gpusvc.systemd.manager import Manager

    drop_in = paths.unit_directory / f"{names.service(name)}.d" / "50-run.conf"
    with contextlib.ExitStack() as stack:
        try:
            files.make_directory(paths.runs_directory)
            stack.callback(paths.run_file(name).unlink, missing_ok=True)
            paths.run_file(name).write_text(text)
            load_startable_model(paths, name, load_host(paths))  # the error is printed here
            caller = stack.enter_context(contextlib.closing(Caller(_socket(paths, name), os.environ)))
            files.make_directory(drop_in.parent)
            stack.callback(shutil.rmtree, drop_in.parent, ignore_errors=True)
            drop_in.write_text(_DROP_IN)
        except OSError as error:
            raise GpusvcError(f"{error.filename} cannot be written: {os.strerror(error.errno or 0)}.") from error
        manager = stack.enter_context(Manager())
        manager.reload()
        yield _Run(paths, name, caller, manager)


class _Run:
    """One run, from its start to the proof of its release."""

    def __init__(self, paths: Paths, name: str, caller: Caller, manager: Manager) -> None:
        self._paths = paths
        self._name = name
        self._unit = names.service(name)
        self._caller = caller
        self._manager = manager
        self._use: Use | None = None
        self._touched = 0.0
        self._signals: list[signal.Signals] = []
        self._stop = False

    def see_through(self) -> int:
        """Run the program, wait for the proof, and return the exit status as a shell gives it."""
        with self._heard() as signals:
            began = time.time()
            job = self._manager.enqueue("Start", self._unit)
            with Progress(sys.stderr) as progress:
                while (result := self._manager.wait(job, 0)) is None:
                    self._attend(signals)
                    if self._caller.has_lent:
                        progress.clear()  # the program owns the terminal now
                    else:
                        progress.show({self._name: doing_of(self._manager, self._name)})
            if result != "done":
                error = why_not(self._manager, self._name, result, began)
                self._forget_failure()
                raise error
            while not self._caller.is_over:
                self._attend(signals)
            return self._end(signals)

    def _attend(self, signals: int) -> None:
        """Do one turn: serve the program's side, pass on signals, and touch the use lock."""
        poll = select.poll()
        for fd in (signals, *self._caller.fds()):
            poll.register(fd, select.POLLIN)
        poll.poll(_TICK_SECONDS * 1000)
        self._caller.serve()
        with contextlib.suppress(BlockingIOError):
            for number in os.read(signals, 64):
                self._pass_on(signal.Signals(number))
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            self._stay_inside()

    def _stay_inside(self) -> None:
        """Hold the use lock, so that the run is not evicted, and touch it, so that it is not judged stuck."""
        from gpusvc.state import use

        if self._use is not None:
            self._use.touch()
            return
        with contextlib.suppress(GpusvcError):
            self._use = use.try_enter(self._paths, self._name)

    def _pass_on(self, number: signal.Signals) -> None:
        self._signals.append(number)
        if number in {signal.SIGINT, signal.SIGQUIT} and len(self._signals) == 1:
            with contextlib.suppress(GpusvcError):  # it has not started, or has ended
                self._manager.kill(names.scope(self._name), number)
                return
        if not self._stop:
            self._stop = True
            self._manager.enqueue("Stop", self._unit)

    def _end(self, signals: int) -> int:
        """Wait for the proof after the launcher ended; return the exit status."""
        if self._use is not None:
            self._use.close()
        self._touched = math.inf
        unit = self._manager.unit(self._unit)
        ended = time.monotonic()
        with Progress(sys.stderr) as progress:
            while unit is not None and unit.active not in {"inactive", "failed"}:
                if time.monotonic() - ended > _TOUCH_SECONDS:
                    progress.show({self._name: doing_of(self._manager, self._name)})
                self._attend(signals)
                unit = self._manager.unit(self._unit)
        if unit is None:
            return self._shell_status(0)
        status = self._manager.service_status(unit)
        if self._paths.lease_file(self._name).exists():
            raise UnreleasedError(status.text, hint=f"`gpusvc release {self._name}` tries the proof again.")
        self._forget_failure()
        by_signal = status.result in {"signal", "core-dump"}
        return self._shell_status(status.exit_status + (128 if by_signal else 0))

    def _shell_status(self, status: int) -> int:
        """Return the exit status as a shell gives it; systemd's ``status`` if the launcher reported none."""
        ended = self._caller.status
        if self._stop:
            return 128 + self._signals[-1]
        if ended is None:
            return status
        return 128 - ended if ended < 0 else ended

    def _forget_failure(self) -> None:
        """Reset the failed unit: nobody looks for an ended run by its name."""
        unit = self._manager.unit(self._unit)
        if unit is not None and unit.active == "failed" and not self._paths.lease_file(self._name).exists():
            self._manager.reset_failed(self._unit)

    @contextlib.contextmanager
    def _heard(self) -> Iterator[int]:
        """Yield a file that gives the signals that would end this process, one byte each."""
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(writing)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reading)
            os.close(writing)
