"""Tests whether the kernel keeps a scope off a GPU, by opening a node in a temporary scope: only trying proves it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from gpusvc import names
from gpusvc.doctor.finding import Finding, error, note, ok
from gpusvc.errors import GpusvcError
from gpusvc.gpu import nodes
from gpusvc.paths import is_user_instance
from gpusvc.systemd.jobs import JobResult
from gpusvc.systemd.manager import Manager
from gpusvc.systemd.units import Scope

_SCOPE_SECONDS = 10.0
_DEV = Path("/dev")

# NVIDIA's number; where no driver is behind it an open that is allowed gives ENXIO, and one that is not EPERM.
_MAJOR, _UNUSED_MINOR = 195, 251


def finding() -> Finding:
    if is_user_instance():
        sentence = "Nothing but its environment keeps your model off other GPUs: a user's manager filters no devices."
        return note("isolation", sentence, fix="Run models that need isolation with the system's gpusvc.")
    if os.geteuid() != 0:
        return note("isolation", "The device filter was not tried.", fix="Run `gpusvc doctor` as root.")
    try:
        with _node() as node:
            outcome = _open_in_scope(node)
    except OSError as problem:
        return note("isolation", "The device filter could not be tried.", f"{problem.filename}: {problem.strerror}")
    except GpusvcError as problem:
        return error("isolation", "The device filter could not be tried.", problem.message, problem.hint)
    evidence = (
        f"open of {node} in a scope that may not: {errno.errorcode.get(outcome, outcome) if outcome else 'it opened'}"
    )
    if outcome == errno.EPERM:
        return ok("isolation", "The kernel keeps a model off GPUs that are not its own.", evidence)
    fix = (
        "The kernel has to attach BPF programs to control groups (CONFIG_CGROUP_BPF; in a container the manager must "
        'allow bpf(2)). `isolation = "best-effort"` in gpusvc.toml goes without.'
    )
    return error("isolation", "The kernel does not keep a model off other GPUs.", evidence, fix)


@contextlib.contextmanager
def _node() -> Iterator[str]:
    """A node of a GPU. If there is none, one is made for the test."""
    there = nodes.foreign(())
    if there:
        yield there[0]
        return
    made = _DEV / f"gpusvc-doctor-{os.getpid()}"
    os.mknod(made, stat.S_IFCHR | 0o600, os.makedev(_MAJOR, _UNUSED_MINOR))
    try:
        yield str(made)
    finally:
        made.unlink()


def _open_in_scope(node: str) -> int:
    """The errno of opening ``node`` in a scope whose filter is closed; 0: it opened."""
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try_and_exit(node, go_read, go_write)
    os.close(go_read)
    try:
        with Manager() as manager:
            scope = Scope(
                name=f"gpusvc-doctor-{os.getpid()}.scope",
                description="Trial of the device filter by gpusvc doctor",
                slice=names.SLICE,
                pids=(pid,),
                binds_to=names.SLICE,
                devices=(),
                stop_timeout_seconds=1.0,
            )
            result = manager.wait(manager.start_transient(scope), _SCOPE_SECONDS)
        if result is not JobResult.DONE:
            raise GpusvcError(f"systemd did not make {scope.name}: its job is {result or 'not done in time'}.")
        os.write(go_write, b"!")
    finally:
        os.close(go_write)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else errno.EIO


def _try_and_exit(node: str, go_read: int, go_write: int) -> NoReturn:
    """The child's side: its exit status is the errno. It must not run the parent's cleanup."""
    outcome = errno.ECANCELED
    try:
        os.close(go_write)
        if os.read(go_read, 1):
            os.close(os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            outcome = 0
    except OSError as problem:
        outcome = problem.errno or errno.EIO
    finally:
        os._exit(outcome)
