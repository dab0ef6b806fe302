"""ExecStart= of model@NAME.service: places the model, makes its scope, starts the engine in it, and stays its parent.

It may be killed at any moment. PID 1 then stops the scope, ExecStopPost= proves the release, and nothing is lost but
this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import select
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gpusvc import lastwords, names, nodes, placement, processes, proof, readiness, relay, survey
from gpusvc import lease as leases
from gpusvc.cgroup import Cgroup
from gpusvc.config import Isolation, load_host, load_model
from gpusvc.engine import Orders, ParkedEngine, User, environment
from gpusvc.errors import EngineError, GpusvcError, IsolationError, NvmlError, SystemdError, UnknownModelError
from gpusvc.gpu import total
from gpusvc.lease import Lease, LeasedGpu
from gpusvc.log import log
from gpusvc.notify import Notifier
from gpusvc.paths import Paths
from gpusvc.progress import Reading, moved
from gpusvc.quantity import format_duration, format_size
from gpusvc.release import release
from gpusvc.sockets import Listener, listeners

if TYPE_CHECKING:
    from gpusvc.config import HostConfig, ModelConfig
    from gpusvc.gpu import Gpu
    from gpusvc.nvml import Nvml

# Ports for models that name none: below those that the kernel hands out for outgoing connections (ip(7)).
_PORTS = range(20000, 30000)

# While anything happens, systemd is asked for this much more time; what is a failure is decided here, with a reason.
_ROPE_SECONDS = 60.0

_SCOPE_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.1
_READING_SECONDS = 1.0
_CHECK_SECONDS = 10.0
_HEALTH_ANSWER_SECONDS = 5.0

# How long this process waits for the driver to let go before it leaves that to ExecStopPost=.
_PATIENCE_SECONDS = 2.0

# Exit statuses that systemd does not retry, of sysexits.h; RestartPreventExitStatus= in model@.service names them too.
_EX_NOINPUT = 66  # no such model
_EX_TEMPFAIL = 75  # no room for it now: asking again at once would only ask again
_EX_CONFIG = 78  # somebody has to change something first


class Launch:
    """One run of a model, from its placement to its end."""

    def __init__(self, name: str, paths: Paths, parked: ParkedEngine, notifier: Notifier) -> None:
        self._name = name
        self._paths = paths
        self._parked = parked
        self._notifier = notifier
        self._host: HostConfig = load_host(paths)
        self._config: ModelConfig = load_model(paths, name, self._host)
        self._user = User.named(self._config.user)
        self._nvml: Nvml | None = None
        self._lease = Lease(model=name, port=0, gpus=(), created=time.time())
        self._gpus: tuple[Gpu, ...] = ()
        self._began = time.monotonic()

    def run(self) -> int:
        """The engine's wait status, in the form of os.waitstatus_to_exitcode()."""
        self._prove_last_run()
        if self._config.gpu.count:
            from gpusvc.nvml import Nvml  # noqa: PLC0415  a model without GPUs needs no driver

            self._nvml = Nvml()
        self._place()
        cgroup = self._enter_scope()
        self._start_engine()
        pidfd = os.pidfd_open(self._parked.pid)
        where = self._load(cgroup, pidfd)
        return self._serve(cgroup, pidfd, where) if where is not None else self._fail_to_start()

    def _prove_last_run(self) -> None:
        """Nothing starts over the remains of the last run; usually there are none."""
        released = release(self._paths, self._name, on_wait=self._wait_for)
        if released is not None:
            log(6, f"From the last run: {released}")

    def _place(self) -> None:
        config = self._config
        deadline = time.monotonic() + config.start_timeout_seconds
        while True:
            with self._placement_lock():
                gpus = self._nvml.snapshot() if self._nvml is not None else ()
                held = survey.holdings(self._paths, but=self._name)
                claims = [claim for holding in held for claim in holding.claims(gpus)]
                offered = placement.offers(gpus, claims, config.gpu, self._host.gpu)
                chosen = placement.choose(offered, config.gpu)
                if chosen is not None:
                    self._take(chosen, held)
                    return
                loading = placement.waits_for(offered, config.gpu)
                if not loading or time.monotonic() > deadline:
                    raise placement.refusal(self._name, offered, config.gpu, survey.in_words(gpus, held))
            self._wait_for(f"Waiting for {', '.join(loading)} to finish loading: what it leaves free is not known yet.")
            time.sleep(_LONGEST_PAUSE_SECONDS)

    def _take(self, chosen: tuple[Gpu, ...], held: Sequence[survey.Holding]) -> None:
        config = self._config
        self._gpus = chosen
        self._lease = replace(
            self._lease,
            port=_choose_port(self._name, config.port, {holding.lease.port for holding in held}),
            gpus=tuple(
                LeasedGpu(
                    index=gpu.index,
                    uuid=gpu.uuid,
                    reserved_bytes=config.gpu.vram_bytes,
                    baseline_bytes=proof.unattributed_bytes(gpu, processes.identify),
                )
                for gpu in chosen
            ),
            config_digest=config.digest(),
            stop_timeout_seconds=config.stop_timeout_seconds,
            release_timeout_seconds=config.release_timeout_seconds,
        )
        leases.write(self._paths, self._lease)

    @contextlib.contextmanager
    def _placement_lock(self) -> Iterator[None]:
        """One placement at a time on this machine, so that no two count the same free bytes."""
        with self._paths.placement_lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _enter_scope(self) -> Cgroup:
        from gpusvc import systemd  # noqa: PLC0415  a refused start needs no bus

        config = self._config
        allowed = self._allowed_nodes()
        self._wait_for(f"Making a scope for {self._where()}.")
        with systemd.Manager() as manager:
            job = manager.start_scope(
                systemd.Scope(
                    name=self._lease.scope,
                    description=f"{config.description} (engine of {names.service(self._name)})",
                    slice=names.SLICE,
                    pids=(self._parked.pid,),
                    binds_to=names.service(self._name),
                    devices=allowed,
                    stop_timeout_seconds=config.stop_timeout_seconds,
                )
            )
            result = manager.wait(job, _SCOPE_SECONDS)
        if result is not systemd.JobResult.DONE:
            raise SystemdError(f"systemd did not make {self._lease.scope}: its job is {result or 'not done in time'}.")
        if config.scope:
            systemd.set_properties(self._lease.scope, config.scope)
        cgroup = Cgroup.of_process(self._parked.pid)
        if cgroup is None or not cgroup.path.endswith("/" + self._lease.scope):
            raise IsolationError(f"The engine is in {cgroup and cgroup.path}, not in {self._lease.scope}.")
        self._lease = replace(
            self._lease,
            pid=self._parked.pid,
            cgroup=cgroup.path,
            processes=processes.identify_all([self._parked.pid]),
        )
        leases.write(self._paths, self._lease)
        return cgroup

    def _start_engine(self) -> None:
        config, port = self._config, str(self._lease.port)
        user = self._user
        required = self._host.isolation is Isolation.REQUIRED
        orders = Orders(
            command=tuple(argument.replace("{port}", port) for argument in config.command),
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
        )
        relay.start(self._parked.output_fd, self._identifier())
        for warning in self._parked.release(orders):
            log(4, f"Isolation is not enforced: {warning}")

    def _load(self, cgroup: Cgroup, pidfd: int) -> Listener | None:
        """Wait until the engine serves; None if it ended before."""
        config = self._config
        began = last_moved = time.monotonic()
        reading = self._read(cgroup)
        pause = _FIRST_PAUSE_SECONDS
        while not _ended(pidfd, pause):
            where = readiness.listener(cgroup, self._lease.port, self._user)
            if where is not None and readiness.answers(where, config.health, _HEALTH_ANSWER_SECONDS):
                return where
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            now = time.monotonic()
            if now - reading.at_seconds < _READING_SECONDS:
                continue
            latest = self._read(cgroup)
            if moved(reading, latest):
                last_moved = now
            reading = latest
            if now - last_moved > config.start_timeout_seconds:
                what = "nothing of it listens" if where is None else f"{config.health} does not answer"
                raise EngineError(
                    f"The engine made no progress for {format_duration(config.start_timeout_seconds)}, "
                    f"and {what} on port {self._lease.port}."
                )
            vram = "" if not self._gpus else f", {_size(reading.vram_bytes)} of VRAM so far"
            self._wait_for(f"Loading on {self._where()}{vram}, {now - began:.0f} s.")
        return None

    def _serve(self, cgroup: Cgroup, pidfd: int, where: Listener) -> int:
        config = self._config
        self._lease = replace(self._lease, ready=True, address=where.reachable_at)
        self._sample(cgroup)
        leases.write(self._paths, self._lease)
        self._notifier.set_watchdog(config.health_timeout_seconds)
        self._notifier.ready(self._ready_sentence())
        log(6, f"Ready after {time.monotonic() - self._began:.2f} s. {self._ready_sentence()}")
        last_answer = time.monotonic()
        every = min(_CHECK_SECONDS, config.health_timeout_seconds / 4 or _CHECK_SECONDS)
        while not _ended(pidfd, every):
            if readiness.answers(where, config.health, min(_HEALTH_ANSWER_SECONDS, every)):
                last_answer = time.monotonic()
                self._notifier.feed_watchdog()
                self._notifier.status(self._ready_sentence())
            else:
                silent = format_duration(round(time.monotonic() - last_answer))
                self._notifier.status(f"{config.health or 'The port'} has not answered for {silent}.")
            before = self._lease
            self._sample(cgroup)
            if self._lease != before:
                leases.write(self._paths, self._lease)
        self._notifier.stopping()  # what it leaves behind may take longer to go than the watchdog waits
        ended = _wait_status(self._parked.pid)
        self._report_end(f"The engine ended {_manner(ended)}")
        return ended

    def _fail_to_start(self) -> int:
        ended = _wait_status(self._parked.pid)
        self._report_end(f"The engine ended {_manner(ended)} before it was ready")
        return ended or 1

    def _report_end(self, sentence: str) -> None:
        words = lastwords.last_words(
            f"_SYSTEMD_INVOCATION_ID={os.environ.get('INVOCATION_ID', '')}", f"SYSLOG_IDENTIFIER={self._identifier()}"
        )
        if self._gpus and lastwords.tells_of_memory(words):
            sentence += ": it ran out of VRAM"
        line = f"{sentence}; its last words: {words[-1]}" if words else f"{sentence}; it left no word."
        self._notifier.status(line)
        log(3, line)

    def _read(self, cgroup: Cgroup) -> Reading:
        pids = cgroup.pids()
        vram: int | None = None
        if self._nvml is not None:
            with contextlib.suppress(NvmlError):
                used = [gpu.used_by(pids) for gpu in self._nvml.snapshot() if self._has(gpu)]
                vram = total(used)
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
        mine = {process.pid for process in self._lease.processes}
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        self._lease = replace(
            self._lease, gpus=tuple(_resampled(leased, by_uuid.get(leased.uuid), mine) for leased in self._lease.gpus)
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
        address = f"[{self._lease.address}]" if ":" in (self._lease.address or "") else self._lease.address
        sentence = f"Ready at http://{address}:{self._lease.port} on {self._where()}"
        used = [gpu.used_bytes for gpu in self._lease.gpus]
        if used:
            sentence += f" with {_size(total(used))} of VRAM"
        return sentence + "."

    def _wait_for(self, sentence: str) -> None:
        self._notifier.status(sentence)
        self._notifier.extend_timeout(_ROPE_SECONDS)


def _resampled(leased: LeasedGpu, gpu: Gpu | None, pids: set[int]) -> LeasedGpu:
    if gpu is None or gpu.problem is not None or gpu.processes is None:
        return leased
    baseline = proof.unattributed_bytes(gpu, processes.identify, pids)
    return replace(
        leased,
        baseline_bytes=leased.baseline_bytes if baseline is None else baseline,
        used_bytes=gpu.used_by(pids),
    )


def _choose_port(name: str, wanted: int, leased: set[int]) -> int:
    taken = {found.port: found for found in listeners()}
    if wanted:
        stranger = taken.get(wanted)
        if stranger is not None:
            raise EngineError(f"Port {wanted} is taken by another program: {readiness.holder(stranger)}.")
        return wanted
    # The same one every time unless it is taken, so that what was written down yesterday is right today.
    first = zlib.crc32(name.encode()) % len(_PORTS)
    for port in itertools.chain(_PORTS[first:], _PORTS[:first]):
        if port not in taken and port not in leased:
            return port
    raise EngineError(f"All ports from {_PORTS.start} to {_PORTS.stop - 1} are taken.")


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


def _size(used: int | None) -> str:
    return "an unknown amount" if used is None else format_size(used)


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
        os.kill(os.getpid(), -ended)
        ended = 1
    sys.exit(ended)


class _TerminatedError(BaseException):
    """systemd wants this process to end; the engine gets its own signal from its scope."""


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError


def main() -> NoReturn:
    # Before anything is opened, so that the engine has nothing to inherit.
    parked = ParkedEngine.fork()
    notifier = Notifier()
    try:
        name, paths = names.parse_name(sys.argv[1]), Paths.system()
        with leases.hold(paths, name):
            signal.signal(signal.SIGTERM, _terminate)
            try:
                ended = Launch(name, paths, parked, notifier).run()
            except _TerminatedError:
                ended = 0
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
                parked.abandon()
                _release(name, paths, notifier)
    except GpusvcError as error:
        notifier.status(error.message)
        log(3, str(error))
        sys.exit(_exit_status(error))
    _end_as(ended)


def _release(name: str, paths: Paths, notifier: Notifier) -> None:
    """What ExecStopPost= does in any case, done at once by whom it takes no time to load."""

    def on_wait(sentence: str) -> None:
        notifier.status(sentence)
        notifier.extend_timeout(_ROPE_SECONDS)

    try:
        released = release(paths, name, on_wait=on_wait, patience_seconds=_PATIENCE_SECONDS)
    except GpusvcError:
        return  # it tries again, for as long as it takes, and says what is in the way
    if released is not None:
        log(6, str(released))


if __name__ == "__main__":
    main()
