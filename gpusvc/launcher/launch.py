"""One launch of a model: place it, make its scope, start the engine in the scope, load, serve, end.

The launcher may be killed at any moment. PID 1 then stops the scope, and ExecStopPost= proves the release.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from gpusvc import files, names
from gpusvc.config import presets
from gpusvc.config.files import Isolation
from gpusvc.errors import EngineError, GpusvcError, PlacementError, UnknownModelError, UsageError
from gpusvc.gpu import nodes
from gpusvc.gpu.reading import total
from gpusvc.journal import events
from gpusvc.journal.events import EventType
from gpusvc.journal.relay import Relay
from gpusvc.launcher import termination
from gpusvc.launcher.loading import Load
from gpusvc.launcher.parked import Orders, ParkedEngine, environment
from gpusvc.launcher.run import USER_GROUP, Run
from gpusvc.launcher.supervision import Supervision
from gpusvc.launcher.termination import TerminatedError
from gpusvc.log import log
from gpusvc.paths import Paths, is_user_instance
from gpusvc.placement.admission import Admission
from gpusvc.placement.patience import LastRun
from gpusvc.quantity import shown
from gpusvc.record import replace
from gpusvc.release.procedure import release
from gpusvc.state import lease as leases
from gpusvc.state import readiness, use
from gpusvc.systemd.notify import Notifier

if TYPE_CHECKING:
    from gpusvc.gpu.driver import Driver
    from gpusvc.launcher.ending import End

_SECOND_TRY = "--second-try"

_DEVICES = "gpusvc-devices.service"
_DEVICES_SECONDS = 60.0

# How long a start waits for the driver, which has to wake up each GPU that nobody uses.
_DRIVER_SECONDS = 120.0

# How long the launcher waits for the driver to free VRAM before it leaves the proof to ExecStopPost=.
_PATIENCE_SECONDS = 2.0


def main() -> NoReturn:
    """ExecStart= of model@NAME.service."""
    # Before any file is opened, so that the engine inherits none.
    try:
        parked = ParkedEngine.fork()
        relay = Relay.fork(parked.output_fd)
    except OSError as error:
        _fail(Notifier(), error)
    notifier = Notifier()
    try:
        name, paths = _parse_name(sys.argv[1]), Paths.here()
        end = _hold_and_launch(name, paths, parked, relay, notifier)
    except OSError as error:
        _fail(notifier, error)
    except GpusvcError as error:
        _refuse(notifier, error)
    if end is None:
        termination.forgive(name)
        termination.end_as(0)
    if end.ran_out and _SECOND_TRY not in sys.argv:
        _try_again(notifier)
    termination.end_as(termination.unmistakable(end.status))


def _hold_and_launch(name: str, paths: Paths, parked: ParkedEngine, relay: Relay, notifier: Notifier) -> End | None:
    """Launch under the model's lock, and prove the release if that is quick. None: SIGTERM came."""
    driver: Driver | None = None
    with leases.hold(paths, name):
        signal.signal(signal.SIGTERM, termination.on_sigterm)
        try:
            driver = _start_driver(name, paths, notifier)
            run = Run(name, paths, parked, relay, notifier, is_second_try=_SECOND_TRY in sys.argv)
            if not run.config.gpu.count and driver is not None:
                driver.close()
                driver = None
            elif run.config.gpu.count and driver is None:
                driver = _new_driver(paths, notifier)
            run.driver = driver
            return launch(run)
        except TerminatedError:
            notifier.status("Stopping: its processes have been told to end.")
            return None
        finally:
            termination.end_quietly()
            parked.abandon()
            relay.abandon()
            _release(name, paths, notifier, driver)


def launch(run: Run) -> End:
    """Run the model through all phases, until its engine ends.

    The end's ``ran_out`` is only set where a second try may help: the need was guessed, and the model was not ready.
    """
    if run.config.caller is not None:
        from gpusvc.launcher import caller  # noqa: PLC0415  model servers have none

        run.caller = caller.attend(run.config.caller)
    _prove_last_run(run)
    _place(run)
    _check_nodes(run)

    from gpusvc.launcher import scope  # noqa: PLC0415  a refused start needs no bus

    cgroup = scope.enter(run)
    _start_engine(run)
    pidfd = os.pidfd_open(run.parked.pid)
    load = Load(run, cgroup, pidfd)
    where = load.wait() if run.caller is None else None
    if where is not None or run.caller is not None:
        Supervision(run, cgroup, pidfd, where).serve()

    from gpusvc.launcher import ending  # noqa: PLC0415  no start needs it

    if run.lease.ready:
        return ending.after_serving(run, cgroup)._replace(ran_out=False)
    end = ending.before_ready(run, cgroup, was_full=load.was_full)
    return end._replace(ran_out=end.ran_out and run.is_guess)


def _start_driver(name: str, paths: Paths, notifier: Notifier) -> Driver | None:
    """Have the driver opened while the configuration is read, unless the model's file says that it needs no GPU."""
    try:
        text = files.read(paths.model_file(name), follow_links=True)
    except (OSError, ValueError):
        return None  # the configuration says what is wrong
    return None if b"count = 0" in text else _new_driver(paths, notifier)


def _new_driver(paths: Paths, notifier: Notifier) -> Driver:
    from gpusvc.gpu.driver import Driver  # noqa: PLC0415  not for a model without GPUs
    from gpusvc.state import hung  # noqa: PLC0415

    driver = Driver(
        patience_seconds=_DRIVER_SECONDS,
        step_seconds=None,
        on_wait=notifier.waiting,
        hung=hung.read(paths),
    )
    return driver.start()


def _prove_last_run(run: Run) -> None:
    """Prove the release of the last run, if it left a lease. No engine starts over the remains of another."""
    released = release(run.paths, run.name, on_wait=run.notifier.waiting, driver=run.driver)
    if released is not None:
        released.tell()


def _place(run: Run) -> None:
    was_ready = readiness.since(run.paths, run.name) is not None
    last_run = LastRun(was_ready, use.last_use(run.paths, run.name))
    use.prepare(run.paths, run.name, _user_group())
    if run.driver is not None:
        run.driver.driver_version()  # if NVML cannot be opened, this was no run
    readiness.forget(run.paths, run.name)
    _pass_key_on(run)
    admitted = Admission(
        run.paths,
        run.host,
        run.config,
        run.driver,
        user=run.user,
        on_wait=run.notifier.waiting,
        clears=run.is_second_try,
        is_restart=lambda: _is_restart(run.name),
        last_run=last_run,
        on_victims=lambda: _read_ahead(run),
    ).run()
    run.lease, run.gpus, run.is_guess = admitted.lease, admitted.gpus, admitted.is_guess
    evicted = f", after {', '.join(run.lease.evicting)} made room" if run.lease.evicting else ""
    events.emit(
        EventType.START,
        f"{run.name} starts on {run.place()}{evicted}.",
        model=run.name,
        gpu=[gpu.index for gpu in run.gpus],
        bytes=total(gpu.reserved_bytes for gpu in run.lease.gpus),
    )


def _read_ahead(run: Run) -> None:
    """Have the weights read from the disk while victims leave; once."""
    if run.reads_ahead:
        return
    run.reads_ahead = True
    from gpusvc.linux import processes  # noqa: PLC0415  most starts evict nobody
    from gpusvc.weights.files import weight_files  # noqa: PLC0415

    with processes.acting_as(run.user.uid, run.user.gid):
        found = weight_files(run.config.command, run.config.env)
    if found:
        run.parked.read_ahead([str(file) for file in found], run.user)


def _pass_key_on(run: Run) -> None:
    """Give the engine's API key to those who send it requests, if it has one."""
    if run.config.upstream_key is None and not (run.paths.lease_directory(run.name) / "upstream-key").exists():
        return
    from gpusvc.launcher import upstream_key  # noqa: PLC0415  most models have none
    from gpusvc.state import upstream_key as copies  # noqa: PLC0415

    copies.forget(run.paths, run.name)
    if run.config.upstream_key is None:
        return
    run.upstream_key = upstream_key.find(run.config, os.environ)
    upstream_key.publish(run.paths, run.name, run.upstream_key)


def _check_nodes(run: Run) -> None:
    """Have missing and stale device nodes made anew, as the device filter can only name nodes that exist.

    Raises:
        EngineError: the nodes stay wrong.
    """
    minors = [gpu.minor for gpu in run.gpus]
    if not minors or is_user_instance() or nodes.problem(minors) is None:
        return
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  nodes are rarely wrong

    run.notifier.waiting("The driver makes its device nodes anew.")
    with Manager() as manager:
        manager.wait(manager.enqueue("Restart", _DEVICES), _DEVICES_SECONDS)
    found = nodes.problem(minors)
    if found is not None:
        raise EngineError(found[0], hint=found[1])


def _is_restart(name: str) -> bool:
    """Whether systemd started the model by itself, because its last run failed."""
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  most starts find room and need not know

    with Manager() as manager:
        unit = manager.unit(names.service(name))
        return unit is not None and manager.restarts(unit) > 0


def _start_engine(run: Run) -> None:
    """Turn the parked process into the engine."""
    config, port = run.config, str(run.lease.port)
    command = config.command
    if config.caller is None:
        command = tuple(argument.replace("{port}", port) for argument in command)
        totals = [gpu.total_bytes for gpu in run.gpus]
        command += presets.memory_arguments(run.preset, command, config.gpu.vram_bytes, totals)
        run.relay.start(run.identifier())
    orders = Orders(
        command=command,
        environment=environment(
            os.environ,
            {**(run.preset.environment if run.preset is not None else {}), **config.env},
            run.user,
            visible_devices=run.visible_devices(fenced=not is_user_instance()),
            port=run.lease.port,
            name=run.name,
        ),
        working_directory=str(config.working_directory),
        user=run.user,
        closed_nodes=nodes.foreign(run.allowed_nodes()),
        require_isolation=run.host.isolation is Isolation.REQUIRED,
        unfenced_devices=run.visible_devices(fenced=False),
        caller=None if config.caller is None else str(config.caller),
    )
    for warning in run.parked.release(orders):
        run.is_fenced = False
        log(4, f"Isolation is not enforced: {warning}")
    run.lease = replace(run.lease, fenced=run.is_fenced and not is_user_instance())  # the next sample writes it


def _user_group() -> int:
    """The group whose members may use models: root's if there is none, the user's own in a user's manager."""
    if is_user_instance():
        return os.getgid()
    import grp  # noqa: PLC0415  not for models of users

    try:
        return grp.getgrnam(USER_GROUP).gr_gid
    except KeyError:
        return 0


def _parse_name(text: str) -> str:
    # The instance of a unit: model@model@x is not another spelling of model@x.
    if names.is_name(text):
        return text
    try:
        names.parse_name(text)
    except UsageError as error:
        raise UnknownModelError(error.message, hint=error.hint) from None  # no retry can mend a name
    raise UnknownModelError(f"{shown(text)} cannot be a model's name.")


def _fail(notifier: Notifier, error: OSError) -> NoReturn:
    """The machine lacks processes, memory or files."""
    sentence = f"The launcher failed: {error}."
    notifier.status(sentence)
    events.emit(EventType.FAIL, sentence, model=sys.argv[1], reason="launcher", level=3)
    sys.exit(1)


def _refuse(notifier: Notifier, error: GpusvcError) -> NoReturn:
    notifier.status(error.message)
    kind = EventType.REFUSAL if isinstance(error, PlacementError) else EventType.FAIL
    events.emit(kind, str(error), model=sys.argv[1], reason=error.word(), level=3)
    status = termination.exit_status(error)
    if status != 1:
        termination.forgive(sys.argv[1])
    sys.exit(status)


def _try_again(notifier: Notifier) -> NoReturn:
    """Execute the launcher anew; its placement then has all idle models leave the GPUs that it gets."""
    notifier.status("Trying once more, with all idle models making room.")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # a SIGTERM that came meanwhile ends this process here
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the next engine must inherit no file of the driver
    os.execv(sys.executable, [*sys.orig_argv, _SECOND_TRY])  # noqa: S606


def _release(name: str, paths: Paths, notifier: Notifier, driver: Driver | None) -> None:
    """Prove the release at once, without the time that ExecStopPost= takes to load."""
    try:
        released = release(paths, name, on_wait=notifier.waiting, patience_seconds=_PATIENCE_SECONDS, driver=driver)
    except GpusvcError:
        return  # ExecStopPost= tries again for as long as it takes, and reports what is in the way
    if released is not None:
        released.tell()
