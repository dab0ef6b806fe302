"""The engine's scope: made over D-Bus around the parked process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gpusvc import names
from gpusvc.errors import IsolationError, SystemdError, UnansweredError
from gpusvc.linux import processes
from gpusvc.linux.cgroup import Cgroup
from gpusvc.paths import is_user_instance
from gpusvc.record import replace
from gpusvc.systemd.jobs import PAUSE_SECONDS, Absence, JobResult
from gpusvc.systemd.manager import Manager
from gpusvc.systemd.units import Scope, set_properties

if TYPE_CHECKING:
    from gpusvc.launcher.run import Run

_JOB_SECONDS = 30.0


def enter(run: Run) -> Cgroup:
    """Have systemd make the scope with the parked process in it, write that to the lease, and return its control group.

    Raises:
        IsolationError: the process is not in the control group of the scope.
        SystemdError: systemd did not make the scope.
    """
    config, pid = run.config, run.parked.pid
    run.notifier.waiting(f"Making a scope for {run.place()}.")
    _make(
        Scope(
            name=run.lease.scope,
            description=f"{config.description} (engine of {names.service(run.name)})",
            slice=names.SLICE,
            pids=(pid,),
            binds_to=names.service(run.name),
            devices=None if is_user_instance() else run.allowed_nodes(),
            stop_timeout_seconds=config.stop_timeout_seconds,
        ),
        pid,
    )
    if config.scope:
        set_properties(run.lease.scope, config.scope)
    cgroup = Cgroup.of_process(pid)
    if cgroup is None or not _is_of(cgroup, run.lease.scope):
        raise IsolationError(f"The engine is in {cgroup and cgroup.path}, not in {run.lease.scope}.")
    if not cgroup.directory.is_dir():
        raise IsolationError(
            f"The control group {cgroup.path} does not exist in /sys/fs/cgroup.",
            hint="gpusvc needs the unified cgroup hierarchy: boot without systemd.unified_cgroup_hierarchy=0.",
        )
    run.lease = replace(run.lease, pid=pid, cgroup=cgroup.path, processes=processes.identify_all([pid]))
    run.write_lease()
    return cgroup


def _make(scope: Scope, pid: int) -> None:
    """Have systemd make ``scope``.

    While systemd executes itself anew, or the bus restarts, the answer is lost. Then the process's control group tells
    whether the scope was made.
    """
    absence = Absence()
    may_be_made = False
    while True:
        try:
            with Manager() as manager:
                result = manager.wait(manager.start_transient(scope), _JOB_SECONDS)
            if result is JobResult.DONE:
                return
            raise SystemdError(f"systemd did not make {scope.name}: its job is {result or 'not done in time'}.")
        except UnansweredError as error:
            absence.bear(error)
            may_be_made = True
            time.sleep(PAUSE_SECONDS)
        except SystemdError:
            cgroup = Cgroup.of_process(pid)
            if not may_be_made or cgroup is None or not _is_of(cgroup, scope.name):
                raise
            return


def _is_of(cgroup: Cgroup, scope: str) -> bool:
    return cgroup.path.endswith("/" + scope)
