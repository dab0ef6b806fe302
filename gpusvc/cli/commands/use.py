"""``use``: runs a command that uses a model."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import os
import select
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from gpusvc.cli.arguments import complete_model, paths_of
from gpusvc.cli.progress import Progress
from gpusvc.errors import EngineError, GpusvcError, PermissionDeniedError, UsageError

if TYPE_CHECKING:
    from gpusvc.paths import Paths
    from gpusvc.state.lease import Lease
    from gpusvc.state.use import Use

# How often a model may stop again before the command gives up.
_TRIES = 3

# How often progress is noted: gpusvc-use(7).
_TOUCH_SECONDS = 1.0

_NAME: Any = typer.Argument(..., metavar="NAME", help="The model, or an alias of it.", autocompletion=complete_model)
_COMMAND: Any = typer.Argument(..., metavar="-- COMMAND...", help="What is run, with its arguments.")

# Options after COMMAND belong to COMMAND, with or without "--" before it.
SETTINGS = {"allow_interspersed_args": False}


class CommandError(GpusvcError):
    """The command cannot be run. Exit status 127 or 126, as a shell has it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def use(context: typer.Context, name: str = _NAME, command: list[str] = _COMMAND) -> None:
    """Run a command that uses a model.

    The model is started if it does not run, and is not evicted before the command ends. It answers at $GPUSVC_URL.
    """
    import shutil

    from gpusvc.state import lease
    from gpusvc.status import inventory
    from gpusvc.status.models import url

    paths = paths_of(context)
    command = command[1:] if command[0] == "--" else command
    if not command:
        raise UsageError("Name a command to run.")
    if shutil.which(command[0]) is None:
        raise CommandError(f"{command[0]} is no command that can be run.", 127)
    name = inventory.resolve(paths, name, also=lease.holders(paths))
    held, entered = _enter_ready(paths, name)
    assert held.address is not None  # noqa: S101  it is ready
    environment = os.environ | {
        "GPUSVC_MODEL": name,
        "GPUSVC_PORT": str(held.port),
        "GPUSVC_URL": url(held.address, held.port),
    }
    _become(command, environment, entered)


def _enter_ready(paths: Paths, name: str) -> tuple[Lease, Use]:
    """Take the use lock, and start the model if it does not run. Return the lock and the lease.

    Raises:
        EngineError: the model could not be started, or stopped again.
        PermissionDeniedError: the caller may not use the model, or not start it.
    """
    from gpusvc.state.use import NoDoorError

    entered = None
    for _ in range(_TRIES):
        try:
            entered = entered or _enter(paths, name)
        except NoDoorError:
            pass  # it never started
        else:
            held = _ready(paths, name)
            if held is not None:
                return held, entered
        _start(name)
    raise EngineError(f"{name} was started, and ended again.", hint=f"`gpusvc logs {name}` shows why.")


def _enter(paths: Paths, name: str) -> Use:
    from gpusvc.state import use

    entered = use.try_enter(paths, name)
    if entered is not None:
        return entered
    with Progress(sys.stderr) as progress:
        progress.show({name: "Waiting until its eviction is over, or given up."})
        return use.enter(paths, name, timeout_seconds=None)


def _ready(paths: Paths, name: str) -> Lease | None:
    """Return the lease if the model is ready, else None."""
    from gpusvc.linux.cgroup import Cgroup
    from gpusvc.state import lease

    held = lease.read(paths, name)
    if held is None or not held.ready or held.cgroup is None or not Cgroup(held.cgroup).pids():
        return None
    return held


def _start(name: str) -> None:
    from gpusvc.cli.commands.lifecycle import bring_up
    from gpusvc.systemd.manager import Manager

    with Manager() as manager:
        try:
            # stdout belongs to the command.
            bring_up(manager, "Start", [name], "starting", announce=lambda _: None)
        except PermissionDeniedError:
            raise PermissionDeniedError(
                f"{name} is not ready, and you may not start it.",
                hint=f"`sudo gpusvc start {name}` starts it; then you may use it.",
            ) from None


def _become(command: list[str], environment: dict[str, str], entered: Use) -> NoReturn:
    """Replace this process by the command, so that signals and the exit status pass without help."""
    # Children inherit the lock. The keeper ends the use when the command itself ends, even if children are left.
    os.set_inheritable(entered.fileno(), True)
    _leave_keeper(entered)
    # Python ignores these signals, and the command would inherit that.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606
    except OSError as error:
        raise CommandError(f"{command[0]} cannot be run: {os.strerror(error.errno or 0)}.", 126) from None


def _leave_keeper(entered: Use) -> None:
    """Fork a process that touches the use lock every second and ends when this process ends.

    If it is killed, the use goes on: this process holds the lock.
    """
    user = os.pidfd_open(os.getpid())
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(user)
        return
    try:
        # A second fork, because the command may wait for its children; a new session, away from the terminal.
        if not os.fork():
            os.setsid()
            _keep(entered, user)
    finally:
        os._exit(0)


def _keep(entered: Use, user: int) -> None:
    # A reader of the command's output waits until every writer closed it.
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    kept = {entered.fileno(), user}
    for first, last in zip([2, *sorted(kept)], [*sorted(kept), os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(first + 1, last)
    os.chdir("/")
    poll = select.poll()
    poll.register(user, select.POLLIN)
    while not poll.poll(_TOUCH_SECONDS * 1000):
        entered.touch()
    entered.close()
