"""``start``, ``stop``, ``restart``, ``release``: systemd does the work, and continues if the command is interrupted."""
# ruff: noqa: PLC0415 - a command loads only what it needs

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

from gpusvc.cli.arguments import NAMES, SOME_NAMES, paths_of
from gpusvc.cli.progress import Progress
from gpusvc.errors import EngineError, GpusvcError, SystemdError, UnreleasedError, UsageError
from gpusvc.names import service
from gpusvc.paths import is_user_instance

if TYPE_CHECKING:
    from gpusvc.paths import Paths
    from gpusvc.systemd.jobs import JobResult
    from gpusvc.systemd.manager import Manager

_TICK_SECONDS = 0.2
_PAUSE_SECONDS = 0.02
_END_SECONDS = 5.0

_ALL_CONFIGURED: Any = typer.Option(False, "--all", help="Every model that has a file.")
_FORGET: Any = typer.Option(
    False, "--forget", help="If the proof fails: give the VRAM to others on your word. Refused while a process is left."
)
_ALL_RUNNING: Any = typer.Option(False, "--all", help="Every model that runs.")


class StillGoingError(GpusvcError):
    """The user interrupted the command; systemd continues."""

    exit_code = 130


def start(context: typer.Context, names: list[str] = NAMES, *, everything: bool = _ALL_CONFIGURED) -> None:
    """Start models, and wait until they are ready."""
    from gpusvc.config import files as config
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager

    paths = paths_of(context)
    chosen = choose(
        names, lambda text: inventory.resolve(paths, text), config.model_names(paths) if everything else None
    )
    with Manager() as manager:
        bring_up(manager, "Start", chosen, "starting")


def restart(context: typer.Context, names: list[str] = NAMES, *, everything: bool = _ALL_RUNNING) -> None:
    """Stop models, prove their VRAM free, and start them again.

    It returns when they are ready.
    """
    from gpusvc.status import inventory
    from gpusvc.systemd.manager import Manager

    paths = paths_of(context)
    with Manager() as manager:
        # A model without a file would stop and could not start again.
        chosen = choose(names, lambda text: inventory.resolve(paths, text), _up(manager) if everything else None)
        bring_up(manager, "Restart", chosen, "restarting")


def stop(context: typer.Context, names: list[str] = NAMES, *, everything: bool = _ALL_RUNNING) -> None:
    """Stop models, and wait until their VRAM is proven free."""
    from gpusvc.state import lease
    from gpusvc.status import inventory
    from gpusvc.status.models import ModelState
    from gpusvc.systemd.manager import Manager

    paths = paths_of(context)
    with Manager() as manager:
        up = _up(manager)
        known = {*inventory.units(manager), *lease.holders(paths)}
        chosen = choose(names, lambda text: inventory.resolve(paths, text, also=known), up if everything else None)
        if not chosen:
            typer.echo("No model is running.")
        pending = {name: manager.enqueue("Stop", service(name)) for name in chosen if name in up}
        enqueued = frozenset(pending)
        with going_on(pending, "stopping", "`gpusvc ps` shows how far it is."):
            for name, _ in _follow(manager, pending):
                _wait_for_end(manager, name)
        failures: list[GpusvcError] = []
        statuses = {model.name: model for model in inventory.models(paths, manager, lambda: None, more=chosen)}
        for name in chosen:
            model = statuses[name]
            match model.state:
                case ModelState.FAILED if model.vram_bytes is None:
                    text = f"{name} ended, and you may not see whether its VRAM is free. {model.text}"
                    failures.append(UnreleasedError(text, hint=f"`gpusvc status {name}` shows it to root."))
                case ModelState.STOPPED | ModelState.FAILED if name in enqueued:
                    typer.echo(f"{name} is stopped, and nothing of it is left.")
                case ModelState.FAILED:
                    systemctl = "systemctl --user" if is_user_instance() else "systemctl"
                    typer.echo(
                        f"{name} is not running; it failed. `{systemctl} reset-failed {service(name)}` forgets that."
                    )
                case ModelState.STOPPED:
                    typer.echo(f"{name} is not running.")
                case ModelState.STUCK:
                    text = model.text if model.text.startswith(name) else f"{name} is stuck. {model.text}"
                    failures.append(UnreleasedError(text, hint=f"`gpusvc release {name}` tries the proof again."))
                case _:
                    failures.append(EngineError(f"{name} is {model.state}: somebody started it again meanwhile."))
    raise_all(failures)


def release(context: typer.Context, names: list[str] = SOME_NAMES, forget: bool = _FORGET) -> None:
    """Prove the VRAM of stuck models free, and let others have it."""
    from gpusvc.state import lease
    from gpusvc.status import inventory

    paths = paths_of(context)
    known = lease.holders(paths)
    failures: list[GpusvcError] = []
    with Progress(sys.stderr) as progress:
        for name in choose(names, lambda text: inventory.resolve(paths, text, also=known), None):
            try:
                sentence = _release(paths, name, progress)
            except UnreleasedError as error:
                if forget and _forget(paths, name):
                    typer.echo(f"Warning: {error.message}", err=True)
                    typer.echo(f"{name} is forgotten. Nothing says that its VRAM is free.", err=True)
                else:
                    failures.append(error)
            except GpusvcError as error:
                failures.append(error)
            else:
                progress.clear()
                typer.echo(sentence)
    raise_all(failures)


def _forget(paths: Paths, name: str) -> bool:
    """Drop the lease of ``name`` without a proof. Return False if a process of it is alive."""
    from gpusvc.journal import events
    from gpusvc.linux.cgroup import Cgroup
    from gpusvc.state import lease

    with lease.hold(paths, name):
        held = lease.read(paths, name)
        if held is None or (held.cgroup is not None and Cgroup(held.cgroup).populated()):
            return False
        lease.set_aside(paths, name)
    gpus = [gpu.index for gpu in held.gpus]
    events.emit(
        events.EventType.LEAK, f"{name} is forgotten without proof.", model=name, gpu=gpus, reason="told to", level=4
    )
    forget_failure(name)
    return True


def _release(paths: Paths, name: str, progress: Progress) -> str:
    from gpusvc.release.procedure import release
    from gpusvc.state import lease

    with lease.hold(paths, name):
        released = release(paths, name, on_wait=lambda sentence: progress.show({name: sentence}))
    if released is not None:
        forget_failure(name)
    return f"{name} holds nothing." if released is None else str(released)


def forget_failure(name: str) -> None:
    """Have systemd forget that the model's unit failed, if it did. An error of systemd is ignored."""
    from gpusvc.names import service
    from gpusvc.systemd.manager import Manager
    from gpusvc.systemd.units import ActiveState

    with contextlib.suppress(SystemdError), Manager() as manager:
        unit = manager.unit(service(name))
        if unit is not None and unit.active is ActiveState.FAILED:
            manager.reset_failed(unit.name)


def choose(names: Sequence[str] | None, resolve: Callable[[str], str], everything: Iterable[str] | None) -> list[str]:
    """Return the chosen models, each once, in the order given. ``everything`` is None if --all was not given."""
    if everything is not None:
        if names:
            raise UsageError("Name models or say --all, not both.")
        return sorted(everything)
    if not names:
        raise UsageError("Name a model, or say --all.")
    return list(dict.fromkeys(resolve(name) for name in names))


def _up(manager: Manager) -> set[str]:
    """Return the models that run, start or stop."""
    from gpusvc.status import inventory

    return {name for name, unit in inventory.units(manager).items() if unit.active != "failed"}


def bring_up(
    manager: Manager, verb: str, chosen: Sequence[str], doing: str, *, announce: Callable[[str], object] = typer.echo
) -> None:
    """Start or restart models side by side, and announce each as soon as it is ready.

    Raises:
        EngineError: a model could not be started; an ExceptionGroup for several models.
    """
    from gpusvc.systemd.jobs import JobResult

    failures: list[GpusvcError] = []
    pending: dict[str, str] = {}
    began = time.time()
    with going_on(pending, doing, "`gpusvc stop {names}` ends it."):
        for name in chosen:
            pending[name] = manager.enqueue(verb, service(name))
        for name, result in _follow(manager, pending):
            if result is JobResult.DONE:
                announce(f"{name}: {_said(manager, name) or 'Ready.'}")
            else:
                failures.append(why_not(manager, name, result, began))
    raise_all(failures)


def _follow(manager: Manager, pending: dict[str, str]) -> Iterator[tuple[str, JobResult]]:
    """Wait for the jobs of the ``pending`` models and show their progress. A model is taken out when its job ends."""
    with Progress(sys.stderr) as progress:
        while pending:
            timeout = _TICK_SECONDS
            for name, job in list(pending.items()):
                result = manager.wait(job, timeout)
                timeout = 0
                if result is not None:
                    progress.clear()
                    del pending[name]
                    yield name, result
            progress.show({name: doing_of(manager, name) for name in pending})


def _wait_for_end(manager: Manager, name: str) -> None:
    """Wait until the service has ended: the release proof cancels the stop's job if it fails, and ends after that."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        unit = manager.unit(service(name))
        if unit is None or unit.active != "deactivating":
            return
        time.sleep(_PAUSE_SECONDS)


def _said(manager: Manager, name: str) -> str:
    """Return the status text of the model's service, or an empty string."""
    unit = manager.unit(service(name))
    return "" if unit is None else manager.service_status(unit).text


def doing_of(manager: Manager, name: str) -> str:
    """Return a sentence on a model whose job is not done."""
    from gpusvc.status.models import ModelState, derive_state, describe

    unit = manager.unit(service(name))
    state = derive_state(unit, leased=False)
    if unit is None or state in {ModelState.STOPPED, ModelState.FAILED}:
        return "Waiting for systemd."
    return describe(state, unit, manager.service_status(unit))


def why_not(manager: Manager, name: str, result: JobResult, began: float) -> GpusvcError:
    """Return the error of a failed start: the reason, and the last lines of the log."""
    from gpusvc.journal import lastwords
    from gpusvc.journal import units as unitlog
    from gpusvc.status import failure

    unit = manager.unit(service(name))
    said = None if unit is None else manager.service_status(unit)
    lines = lastwords.last_words(*unitlog.own_lines(name), lines=failure.LOG_LINES, since=began)
    error = failure.why_not(name, result, unit, said, lines, in_lines=True)
    log = error.log if isinstance(error, failure.StartError) else ()
    return EngineError("\n".join([error.message, *log]), hint=error.hint)


@contextlib.contextmanager
def going_on(pending: Collection[str], doing: str, hint: str) -> Iterator[None]:
    """Turn Ctrl-C into a message that systemd continues."""
    try:
        yield
    except KeyboardInterrupt:
        if not pending:
            raise
        verb = "goes" if len(pending) == 1 else "go"
        raise StillGoingError(
            f"{', '.join(pending)} {verb} on {doing}.", hint=hint.format(names=" ".join(pending))
        ) from None


def raise_all(failures: Sequence[GpusvcError]) -> None:
    """Raise the failure, or an ExceptionGroup of several; do nothing without one."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("several models", failures)
