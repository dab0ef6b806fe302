"""pystemd's D-Bus calls, with gpusvc's errors; the only importer of pystemd.

A manager that does not answer gives another error than a manager that refuses, so that callers can ask again. Calls
that must not be repeated are made with signals blocked.
"""

from __future__ import annotations

import errno
import importlib.util
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gpusvc.errors import JobConflictError, PermissionDeniedError, SystemdError, UnansweredError
from gpusvc.systemd import jobs
from gpusvc.systemd.jobs import Absence

# The connection itself is broken: neither systemd nor the bus sends these.
_DISCONNECTED = frozenset({errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED, errno.EPIPE})

_T = TypeVar("_T")


class _AwayError(UnansweredError):
    """The connection works, but systemd does not answer, as while it executes itself anew."""


class _InterruptedError(UnansweredError):
    """A signal interrupted the call. Its handler has run."""


class AlreadySubscribedError(SystemdError):
    """The manager sends this connection its signals already: it heard an earlier call whose answer was lost."""


_NO_ANSWER = {errno.ETIMEDOUT: _AwayError, errno.EINTR: _InterruptedError}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Block all signals until the block ends.

    A handler that raises, as that of Ctrl-C does, must not run in a callback: pystemd turns its exception into a
    SystemError. Nor may it run while Cython sets up a module, which can swallow the exception. And a call that must not
    be repeated must not be interrupted.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _import_pystemd() -> tuple[Any, Any, Any, Any]:
    # pystemd's __init__ imports lxml and proxies of units: 7 MB and half of a launcher's start-up time, for an
    # introspection that gpusvc does not use. pystemd.dbuslib needs none of it. But an import of a submodule runs the
    # package's __init__ first, and pystemd offers no way around that. So an empty package takes its place.
    spec = importlib.util.find_spec("pystemd") if "pystemd" not in sys.modules else None
    if spec is not None and spec.submodule_search_locations is not None:
        package = types.ModuleType("pystemd")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["pystemd"] = package
    with undisturbed():
        from pystemd.dbusexc import DBusBaseError  # noqa: PLC0415
        from pystemd.dbuslib import DBus, DBusAddress, apply_signature  # noqa: PLC0415

    return DBus, DBusAddress, apply_signature, DBusBaseError


DBus, DBusAddress, apply_signature, DBusBaseError = _import_pystemd()


def patiently(doing: str, question: Callable[[], _T], *, patience_seconds: float) -> _T:
    """Return the answer to ``question``, which is asked again while systemd does not answer. It must be repeatable.

    Args:
        doing: what the caller does, for messages: "Could not {doing}".
        question: makes the call.
        patience_seconds: for how long it is asked again.

    Raises:
        UnansweredError: there was no answer in this time, or the connection is broken.
        SystemdError, PermissionDeniedError: systemd refuses.
    """
    absence = Absence(patience_seconds)
    while True:
        try:
            with translated(doing):
                return question()
        except _InterruptedError:
            continue
        except _AwayError as error:
            absence.bear(error)
        time.sleep(jobs.PAUSE_SECONDS)


def code_of(error: Any) -> int:
    """Return the errno of a DBusBaseError. pystemd 0.11 sets none for calls that a signal interrupted."""
    return errno.EINTR if error.errno is None else abs(error.errno)


def encode(value: object) -> Any:
    """Return ``value`` with each string in it as bytes, as pystemd wants them."""
    match value:
        case str():
            return value.encode()
        case tuple():
            return tuple(encode(item) for item in value)
        case list():
            return [encode(item) for item in value]
        case _:
            return value


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise pystemd's errors as errors of gpusvc. ``doing`` is what the block does, for messages."""
    try:
        yield
    except DBusBaseError as error:
        code = code_of(error)
        # sd-bus gives EACCES for a refusal, and also where polkit would ask for a password (sd-bus-errors(3)).
        if code in {errno.EACCES, errno.EPERM}:
            raise PermissionDeniedError(f"You may not {doing}.", hint="Try again as root, or with sudo.") from None
        said = error.err_message
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        # libsystemd has no errno for systemd's own errors. They can be told apart by name.
        if "TransactionIsDestructive" in str(error.err_name):
            raise JobConflictError(f"Could not {doing}: {said.rstrip('.')}.") from None
        if "AlreadySubscribed" in str(error.err_name):
            raise AlreadySubscribedError(f"Could not {doing}: {said.rstrip('.')}.") from None
        hint = None
        if code in {errno.ENOENT, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.ENOTCONN} and "reach" in doing:
            hint = "gpusvc needs systemd as PID 1, and the D-Bus system bus."
        kind = _NO_ANSWER.get(code, UnansweredError if code in _DISCONNECTED else SystemdError)
        raise kind(
            f"Could not {doing}: {(said or errno.errorcode.get(code, str(code))).rstrip('.')}.", hint=hint
        ) from None
