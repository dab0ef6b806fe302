"""ExecStart= of model@NAME.service: places the model, makes its scope, starts the engine in it, and stays its parent.

It may be killed at any moment. PID 1 then stops the scope, ExecStopPost= proves the release, and nothing is lost but
this process.
"""

from __future__ import annotations

import contextlib
import grp
import os
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gpusvc import names
from gpusvc.config.files import Isolation, load_host, load_startable_model
from gpusvc.errors import (
    EngineError,
    GpusvcError,
    IsolationError,
    NvmlError,
    PlacementError,
    SystemdError,
    UnansweredError,
    UnknownModelError,
    UsageError,
)
from gpusvc.gpu import nodes
from gpusvc.gpu.reading import total
from gpusvc.journal import events, lastwords, relay
from gpusvc.journal import units as unitlog
from gpusvc.journal.events import Kind
from gpusvc.launcher import caller, oom, readiness
from gpusvc.launcher.engine import Orders, ParkedEngine, environment
from gpusvc.launcher.progress import Reading, moved
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.linux.sockets import Listener
from gpusvc.linux.users import User
from gpusvc.log import log
from gpusvc.paths import Paths, is_user_instance
from gpusvc.placement.admission import Admission
from gpusvc.quantity import MIB, format_amount, format_duration, shown
from gpusvc.release import proof
from gpusvc.release.procedure import release
from gpusvc.state import footprints as footprint
from gpusvc.state import lease as leases
from gpusvc.state import use
from gpusvc.state.lease import Lease, LeasedGpu
from gpusvc.systemd.notify import ROPE_SECONDS, Notifier

if TYPE_CHECKING:
    from gpusvc.config.files import HostConfig, ModelConfig
    from gpusvc.gpu.nvml import Nvml
    from gpusvc.gpu.reading import Gpu
    from gpusvc.systemd.manager import Scope

_SCOPE_SECONDS = 30.0
_ABSENT_SECONDS = 10.0  # systemd or the bus, while either starts anew
_SHORTEST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.1
_READING_SECONDS = 1.0
_CHECK_SECONDS = 10.0
_HEALTH_ANSWER_SECONDS = 5.0

# A change of the peak that is worth a write.
_LEARNED_BYTES = 16 * MIB

# A GPU with less than this free while a model loads on it is full.
_FULL_BYTES = 64 * MIB

_USER_GROUP = "gpusvc"
_SECOND_TRY = "--second-try"

# A word to end that was swallowed costs a stop so long. It is far more than passes between it and _is_ending().
_SAID_AGAIN_SECONDS = 1.0

# How long this process waits for the driver to let go before it leaves that to ExecStopPost=.
_PATIENCE_SECONDS = 2.0

# Exit statuses that systemd does not retry, of sysexits.h; RestartPreventExitStatus= in model@.service names them too.
_EX_NOINPUT = 66  # no such model
_EX_TEMPFAIL = 75  # no room for it now: asking again at once would only ask again
_EX_CONFIG = 78  # somebody has to change something first


class Launch:
    """One run of a model, from its placement to its end."""

    def __init__(
        self, name: str, paths: Paths, parked: ParkedEngine, notifier: Notifier, *, is_second_try: bool
    ) -> None:
        self._name = name
        self._paths = paths
        self._parked = parked
        self._notifier = notifier
        self._is_second_try = is_second_try
        self._is_guess = False
        self._ran_out = False
        self._was_full = False
        self._is_fenced = True
        self._peaks: dict[str, int] = {}
        self._host: HostConfig = load_host(paths)
        self._config: ModelConfig = load_startable_model(paths, name, self._host)
        self._user = User.named(self._config.user)
        self._nvml: Nvml | None = None
        self._lease = Lease(model=name, port=0, gpus=(), created=time.time())
        self._gpus: tuple[Gpu, ...] = ()
        self._began, self._since = time.monotonic(), time.time()
        self._caller: socket.socket | None = None

    @property
    def deserves_another_try(self) -> bool:
        """Whether it ran out of VRAM where nobody could know how much it takes, and others could still make room."""
        return self._ran_out and self._is_guess and not self._is_second_try and not self._lease.ready

    def run(self) -> int:
        """The engine's wait status, in the form of os.waitstatus_to_exitcode()."""
        if self._config.caller is not None:
            self._caller = caller.attend(self._config.caller)
        self._prove_last_run()
        if self._config.gpu.count:
            from gpusvc.gpu.nvml import Nvml  # noqa: PLC0415  a model without GPUs needs no driver

            self._nvml = Nvml()
        self._place()
        cgroup = self._enter_scope()
        self._start_engine()
        pidfd = os.pidfd_open(self._parked.pid)
        if self._caller is not None:
            return self._serve(cgroup, pidfd, None)
        where = self._load(cgroup, pidfd)
        return self._serve(cgroup, pidfd, where) if where is not None else self._fail_to_start(cgroup)

    def _prove_last_run(self) -> None:
        """Nothing starts over the remains of the last run; usually there are none."""
        released = release(self._paths, self._name, on_wait=self._notifier.waiting)
        if released is not None:
            released.tell()

    def _place(self) -> None:
        use.prepare(self._paths, self._name, _user_group())
        admitted = Admission(
            self._paths,
            self._host,
            self._config,
            self._nvml,
            user=self._user,
            on_wait=self._notifier.waiting,
            clears=self._is_second_try,
        ).run()
        self._lease, self._gpus, self._is_guess = admitted.lease, admitted.gpus, admitted.is_guess
        evicted = f", after {', '.join(self._lease.evicting)} made room" if self._lease.evicting else ""
        events.emit(
            Kind.START,
            f"{self._name} starts on {self._where()}{evicted}.",
            model=self._name,
            gpu=[gpu.index for gpu in self._gpus],
            bytes=total(gpu.reserved_bytes for gpu in self._lease.gpus),
        )

    def _enter_scope(self) -> Cgroup:
        from gpusvc.systemd import manager as systemd  # noqa: PLC0415  a refused start needs no bus

        config = self._config
        allowed = self._allowed_nodes()
        self._notifier.waiting(f"Making a scope for {self._where()}.")
        self._make(
            systemd.Scope(
                name=self._lease.scope,
                description=f"{config.description} (engine of {names.service(self._name)})",
                slice=names.SLICE,
                pids=(self._parked.pid,),
                binds_to=names.service(self._name),
                devices=None if is_user_instance() else allowed,
                stop_timeout_seconds=config.stop_timeout_seconds,
            )
        )
        if config.scope:
            systemd.set_properties(self._lease.scope, config.scope)
        cgroup = Cgroup.of_process(self._parked.pid)
        if cgroup is None or not self._is_its_scope(cgroup):
            raise IsolationError(f"The engine is in {cgroup and cgroup.path}, not in {self._lease.scope}.")
        if not cgroup.directory.is_dir():
            raise IsolationError(
                f"The control group {cgroup.path} is not to be seen in /sys/fs/cgroup.",
                hint="gpusvc needs the unified cgroup hierarchy: boot without systemd.unified_cgroup_hierarchy=0.",
            )
        self._lease = replace(
            self._lease,
            pid=self._parked.pid,
            cgroup=cgroup.path,
            processes=processes.identify_all([self._parked.pid]),
        )
        leases.write(self._paths, self._lease)
        return cgroup

    def _make(self, scope: Scope) -> None:
        """Have systemd make ``scope``. While it executes itself anew, or the bus restarts, nobody hears that it has."""
        from gpusvc.systemd import manager as systemd  # noqa: PLC0415  as above

        until = time.monotonic() + _ABSENT_SECONDS
        may_be_made = False
        while True:
            try:
                with systemd.Manager() as manager:
                    result = manager.wait(manager.start_scope(scope), _SCOPE_SECONDS)
                if result is systemd.JobResult.DONE:
                    return
                raise SystemdError(f"systemd did not make {scope.name}: its job is {result or 'not done in time'}.")
            except UnansweredError:
                if time.monotonic() >= until:
                    raise
                may_be_made = True
                time.sleep(_LONGEST_PAUSE_SECONDS)
            except SystemdError:
                cgroup = Cgroup.of_process(self._parked.pid)
                if not may_be_made or cgroup is None or not self._is_its_scope(cgroup):
                    raise
                return

    def _is_its_scope(self, cgroup: Cgroup) -> bool:
        return cgroup.path.endswith("/" + self._lease.scope)

    def _start_engine(self) -> None:
        config, port = self._config, str(self._lease.port)
        user = self._user
        required = self._host.isolation is Isolation.REQUIRED
        orders = Orders(
            command=config.command
            if config.caller is not None
            else tuple(argument.replace("{port}", port) for argument in config.command),
            environment=environment(
                os.environ,
                config.env,
                user,
                gpu_uuids=[gpu.uuid for gpu in self._gpus],
                port=self._lease.port,
                name=self._name,
            ),
            working_directory=str(config.working_directory),
            user=user,
            closed_nodes=nodes.foreign(self._allowed_nodes()),
            require_isolation=required,
            caller=None if config.caller is None else str(config.caller),
        )
        if config.caller is None:
            relay.start(self._parked.output_fd, self._identifier())
        for warning in self._parked.release(orders):
            self._is_fenced = False
            log(4, f"Isolation is not enforced: {warning}")

    def _load(self, cgroup: Cgroup, pidfd: int) -> Listener | None:
        """Wait until the engine serves; None if it ended before."""
        config = self._config
        began = last_moved = time.monotonic()
        reading: Reading | None = None
        while not _ended(pidfd, _pause(time.monotonic() - began)):
            where = self._listener(cgroup, pidfd)
            if where is not None and readiness.answers(where, config.health, _HEALTH_ANSWER_SECONDS):
                return where
            now = time.monotonic()
            if now - (began if reading is None else reading.at_seconds) < _READING_SECONDS:
                continue
            before, reading = reading, self._read(cgroup)
            if before is None or moved(before, reading) or cgroup.frozen():
                last_moved = now
            if now - last_moved > config.start_timeout_seconds:
                what = "nothing of it listens" if where is None else f"{config.health} does not answer"
                raise EngineError(
                    f"The engine made no progress for {format_duration(config.start_timeout_seconds)}, "
                    f"and {what} on port {self._lease.port}."
                )
            vram = "" if not self._gpus else f", {format_amount(reading.vram_bytes)} of VRAM so far"
            self._notifier.waiting(f"Loading on {self._where()}{vram}, {now - began:.0f} s.")
        return None

    def _listener(self, cgroup: Cgroup, pidfd: int) -> Listener | None:
        try:
            return readiness.listener(cgroup, self._lease.port, self._user)
        except EngineError:
            # The socket of a process that is just ending belongs to nobody for a moment.
            if _ended(pidfd, _LONGEST_PAUSE_SECONDS):
                return None
        return readiness.listener(cgroup, self._lease.port, self._user)

    def _serve(self, cgroup: Cgroup, pidfd: int, where: Listener | None) -> int:
        """Stay until the engine ends; its wait status. ``where`` is None for a program that serves its caller only."""
        config = self._config
        self._lease = replace(self._lease, ready=True, address=None if where is None else where.reachable_at)
        self._sample(cgroup)
        leases.write(self._paths, self._lease)
        written = self._lease
        use.touch(self._paths, self._name)
        self._notifier.set_watchdog(config.health_timeout_seconds)
        self._notifier.ready(self._ready_sentence())
        self._tell(Kind.READY, f"Ready after {time.monotonic() - self._began:.2f} s. {self._ready_sentence()}")
        last_answer = time.monotonic()
        every = min(_CHECK_SECONDS, config.health_timeout_seconds / 4 or _CHECK_SECONDS)
        while not self._is_over(pidfd, every):
            if where is None or readiness.answers(where, config.health, min(_HEALTH_ANSWER_SECONDS, every)):
                last_answer = time.monotonic()
                self._notifier.feed_watchdog()
                self._notifier.status(self._ready_sentence())
            elif cgroup.frozen():  # somebody wants it to stand still, which is not to hang
                last_answer = time.monotonic()
                self._notifier.feed_watchdog()
                self._notifier.status(f"Frozen: `systemctl thaw {self._lease.scope}` lets it go on.")
            else:
                silent = format_duration(round(time.monotonic() - last_answer))
                self._notifier.status(f"{config.health or 'The port'} has not answered for {silent}.")
            self._sample(cgroup)
            if self._lease != written:
                try:
                    leases.write(self._paths, self._lease)
                    written = self._lease
                except GpusvcError as error:
                    log(4, str(error))  # a full file system is no reason to end a model; the next time it may work
        self._notifier.stopping()  # what it leaves behind may take longer to go than the watchdog waits
        killed = self._killer(cgroup)
        ended = _wait_status(self._parked.pid)
        if self._caller is None:
            self._report_end(f"The engine ended {_manner(ended)}", killed)
            if killed is not None and ended in (0, -signal.SIGTERM):
                return -signal.SIGKILL  # of a part; systemd had the rest stopped, which must not look as if wanted
        else:
            if killed is not None:
                log(4, f"One of its processes was killed: {killed}.")
            log(6, f"The program ended {_manner(ended)}.")
            caller.tell(self._caller, ended)
        return ended

    def _is_over(self, pidfd: int, timeout_seconds: float) -> bool:
        """Whether the engine ended; asked by who waits for that. A program whose caller is gone has to end as well."""
        if self._caller is None:
            return _ended(pidfd, timeout_seconds)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._caller, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout_seconds * 1000)}
        if self._caller.fileno() in ready and pidfd not in ready:
            from gpusvc.systemd.manager import Manager  # noqa: PLC0415  for this end only

            log(4, "Who ran this program is gone, so it is stopped.")
            with Manager() as manager:
                manager.enqueue("Stop", names.service(self._name))
            return _ended(pidfd, ROPE_SECONDS)  # systemd's SIGTERM comes first
        return pidfd in ready

    def _fail_to_start(self, cgroup: Cgroup) -> int:
        killed = self._killer(cgroup)
        ended = _wait_status(self._parked.pid)
        self._report_end(f"The engine ended {_manner(ended)} before it was ready", killed)
        return ended or 1

    def _killer(self, cgroup: Cgroup) -> str | None:
        """Whom the kernel sent for want of memory; to be asked at once, as systemd is about to remove the group."""
        return oom.account(cgroup.memory_events(), self._config.scope.get("MemoryMax"))

    def _report_end(self, sentence: str, killed: str | None) -> None:
        words = lastwords.last_words(
            *unitlog.this_run(self._name, self._since), f"SYSLOG_IDENTIFIER={self._identifier()}"
        )
        # Some engines die of it without a word that anybody could recognise.
        died_full = self._was_full and not self._lease.ready
        self._ran_out = bool(self._gpus) and killed is None and (died_full or lastwords.tells_of_memory(words))
        if killed is not None:
            sentence += f": {killed}"
        if self._ran_out:
            sentence += ": it ran out of VRAM"
            if self._is_second_try:
                sentence += ", although all that was idle made room for it"
        line = f"{sentence}; its last words: {words[-1]}" if words else f"{sentence}; it left no word."
        self._notifier.status(line)
        self._tell(Kind.FAIL, line, level=3)

    def _read(self, cgroup: Cgroup) -> Reading:
        pids = cgroup.pids()
        vram: int | None = None
        if self._nvml is not None:
            with contextlib.suppress(NvmlError):
                own = [gpu for gpu in self._nvml.snapshot() if self._has(gpu)]
                vram = total(gpu.used_by(pids) for gpu in own)
                self._was_full = any(gpu.free_bytes is not None and gpu.free_bytes < _FULL_BYTES for gpu in own)
        with processes.acting_as(self._user.uid, self._user.gid):
            io = processes.io_bytes(pids)
        return Reading(time.monotonic(), cgroup.cpu_seconds(), io, vram)

    def _sample(self, cgroup: Cgroup) -> None:
        """Put down in the lease what the proof will ask for; what cannot be seen now stays as it was."""
        if self._nvml is None:
            return
        try:
            gpus = self._nvml.snapshot()
        except NvmlError as error:
            log(4, f"NVML cannot be read: {error}")
            return
        inside = set(cgroup.pids())
        listed = {process.pid for gpu in gpus for process in gpu.processes or ()}
        self._lease = self._lease.seen(processes.identify_all(inside & listed))
        # Of those who came and went, only they can be in the way of a proof whom the driver still lists.
        remembered = frozenset(p for p in self._lease.processes if p.pid in inside or p.pid in listed)
        self._lease = replace(self._lease, processes=remembered)
        mine = {process.pid for process in remembered}
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        self._lease = replace(
            self._lease, gpus=tuple(_resampled(leased, by_uuid.get(leased.uuid), mine) for leased in self._lease.gpus)
        )
        self._learn()

    def _learn(self) -> None:
        """Keep the most that it ever took, for its next placement."""
        names = {gpu.uuid: gpu.name for gpu in self._gpus}
        for leased in self._lease.gpus:
            if leased.used_bytes is not None and leased.used_bytes > self._peaks.get(leased.uuid, 0) + _LEARNED_BYTES:
                self._peaks[leased.uuid] = leased.used_bytes
                digest = self._lease.config_digest
                footprint.learn(self._paths, self._name, digest, names[leased.uuid], leased.used_bytes)

    def _tell(self, kind: Kind, sentence: str, *, level: int = 6) -> None:
        events.emit(
            kind,
            sentence,
            model=self._name,
            gpu=[gpu.index for gpu in self._lease.gpus],
            bytes=total(gpu.used_bytes for gpu in self._lease.gpus),
            level=level,
        )

    def _identifier(self) -> str:
        """What the journal calls the lines of the engine."""
        return Path(self._config.command[0]).name

    def _has(self, gpu: Gpu) -> bool:
        return any(own.uuid == gpu.uuid for own in self._gpus)

    def _allowed_nodes(self) -> tuple[str, ...]:
        minors = [gpu.minor for gpu in self._gpus if gpu.minor is not None]
        return nodes.of_gpus(minors, [gpu.pci_bus_id for gpu in self._gpus])

    def _where(self) -> str:
        if not self._gpus:
            return "no GPU"
        return " and ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in self._gpus)

    def _ready_sentence(self) -> str:
        fence = "" if self._is_fenced else " Nothing but its environment keeps it off other GPUs."
        if self._caller is not None:
            return f"Running on {self._where()}.{fence}"
        address = f"[{self._lease.address}]" if ":" in (self._lease.address or "") else self._lease.address
        sentence = f"Ready at http://{address}:{self._lease.port} on {self._where()}"
        used = [gpu.used_bytes for gpu in self._lease.gpus]
        if used:
            sentence += f" with {format_amount(total(used))} of VRAM"
        return f"{sentence}.{fence}"


def _resampled(leased: LeasedGpu, gpu: Gpu | None, pids: set[int]) -> LeasedGpu:
    if gpu is None or gpu.problem is not None or gpu.processes is None:
        return leased
    baseline = proof.baseline_bytes(gpu, processes.identify, pids)
    return replace(
        leased,
        baseline_bytes=leased.baseline_bytes if baseline is None else baseline,
        used_bytes=gpu.used_by(pids),
    )


def _pause(elapsed_seconds: float) -> float:
    """How long to look away from an engine that loads: a small part of the time it has taken so far."""
    return min(max(elapsed_seconds / 20, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)


def _ended(pidfd: int, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def _wait_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _manner(ended: int) -> str:
    if ended >= 0:
        return f"with exit status {ended}"
    try:
        return f"by {signal.Signals(-ended).name}"
    except ValueError:
        return f"by signal {-ended}"


def _exit_status(error: GpusvcError) -> int:
    if isinstance(error, UnknownModelError):
        return _EX_NOINPUT
    if error.permanent:
        return _EX_CONFIG
    return _EX_TEMPFAIL if error.http_status == 503 and not isinstance(error, EngineError | NvmlError) else 1


def _end_as(ended: int) -> NoReturn:
    """End like the engine did, so that systemd shows its exit status or signal as the unit's own."""
    if ended < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's own core tells more than this process's would
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-ended, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-ended})
        with contextlib.suppress(ValueError):  # one of those that the C library keeps for itself
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-ended})
        os.kill(os.getpid(), -ended)
        ended = 1
    os._exit(ended)  # nothing is left to write, and the interpreter's own tidying up would take 10 ms of every stop


def _user_group() -> int:
    """The group whose members may use models; root's own where the package did not make it, and a user's in his."""
    if is_user_instance():
        return os.getgid()
    try:
        return grp.getgrnam(_USER_GROUP).gr_gid
    except KeyError:
        return 0


class _TerminatedError(BaseException):
    """systemd wants this process to end; the engine gets its own signal from its scope."""


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Code of others may swallow it, wherever it happens to be raised. So it is said again until it is heard.
    signal.signal(signal.SIGALRM, _terminate)
    signal.setitimer(signal.ITIMER_REAL, _SAID_AGAIN_SECONDS)
    raise _TerminatedError


def _is_ending() -> None:
    """It was heard, or the end has come without it: no signal disturbs it from here on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, 0)


def _parse_name(text: str) -> str:
    # Of a unit: model@model@x is no other way to say model@x.
    if names.is_name(text):
        return text
    try:
        names.parse_name(text)
    except UsageError as error:
        raise UnknownModelError(error.message, hint=error.hint) from None  # and never will there be one
    raise UnknownModelError(f"{shown(text)} cannot be a model's name.")


def main() -> NoReturn:
    # Before anything is opened, so that the engine has nothing to inherit.
    try:
        parked = ParkedEngine.fork()
    except OSError as error:
        _fail(Notifier(), error)
    notifier = Notifier()
    launch: Launch | None = None
    wanted = True
    try:
        name, paths = _parse_name(sys.argv[1]), Paths.here()
        with leases.hold(paths, name):
            signal.signal(signal.SIGTERM, _terminate)
            try:
                launch = Launch(name, paths, parked, notifier, is_second_try=_SECOND_TRY in sys.argv)
                ended = launch.run()
            except _TerminatedError:
                notifier.status("Stopping: its processes have been told to end.")
                ended = 0
                wanted = False
            finally:
                _is_ending()
                parked.abandon()
                _release(name, paths, notifier)
        if not wanted:
            _forgive(name)
    except OSError as error:
        _fail(notifier, error)
    except GpusvcError as error:
        notifier.status(error.message)
        refused = isinstance(error, PlacementError)
        kind = Kind.REFUSAL if refused else Kind.FAIL
        events.emit(kind, str(error), model=sys.argv[1], reason=error.word(), level=3)
        status = _exit_status(error)
        if status != 1:
            _forgive(sys.argv[1])
        sys.exit(status)
    if launch is not None and launch.deserves_another_try:
        notifier.status("Trying once more, with all that is idle making room.")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # who asked it to end meanwhile is heard here
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # of the driver's files none may reach the next engine
        os.execv(sys.executable, [*sys.orig_argv, _SECOND_TRY])  # noqa: S606
    _end_as(ended)


def _fail(notifier: Notifier, error: OSError) -> NoReturn:
    """The machine has not enough of something."""
    sentence = f"The launcher failed: {error}."
    notifier.status(sentence)
    events.emit(Kind.FAIL, sentence, model=sys.argv[1], reason="launcher", level=3)
    sys.exit(1)


def _forgive(name: str) -> None:
    """Take this start off the count of StartLimitBurst=, which is for what fails over and over by itself."""
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  a refused start has not needed it yet

    with contextlib.suppress(GpusvcError), Manager() as manager:
        unit = manager.unit(names.service(name))
        # Not what the watchdog ends, by SIGTERM too: a failure that is forgotten is not restarted.
        if unit is not None and manager.service_status(unit).result == "success":
            manager.reset_failed(unit.name)


def _release(name: str, paths: Paths, notifier: Notifier) -> None:
    """What ExecStopPost= does in any case, done at once by whom it takes no time to load."""
    try:
        released = release(paths, name, on_wait=notifier.waiting, patience_seconds=_PATIENCE_SECONDS)
    except GpusvcError:
        return  # it tries again, for as long as it takes, and says what is in the way
    if released is not None:
        released.tell()
