"""D-Bus as pystemd has it, mended where that or libsystemd leaves a gap; the only importer of pystemd.

What fails is an error of ours, with a sentence; nobody there is another one than a refusal, and is sat out. No signal
arrives where it would be lost, or cut off what cannot be said twice.
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

_PAUSE_SECONDS = 0.05

# Neither systemd nor the bus answers with one of these.
_DISCONNECTED = frozenset({errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED, errno.EPIPE})

_T = TypeVar("_T")


class _AwayError(UnansweredError):
    """The connection is whole: it is the other end that nobody is at."""


class _InterruptedError(UnansweredError):
    """A signal came first; its handler has run by now."""


_NO_ANSWER = {errno.ETIMEDOUT: _AwayError, errno.EINTR: _InterruptedError}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until this is over. One whose handler raises, as that of Ctrl-C does, must not arrive in a callback:
    pystemd cannot pass that on, and what becomes of it is a SystemError; nor while Cython sets up a module, which may
    swallow it. Nor may it cut off what cannot be said twice.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _import_pystemd() -> tuple[Any, Any, Any, Any]:
    # pystemd's own __init__ brings lxml and its unit proxies: 7 MB and half the start-up time of every launcher, for
    # an introspection that is not used here. Its D-Bus part is whole without them, so the package is entered past it.
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
    """The answer to ``question``, asked again while nobody is at the other end of a connection that is whole.

    Raises:
        UnansweredError: nobody answered for so long, or the connection is gone.
        SystemdError, PermissionDeniedError: that is the answer.
    """
    until = time.monotonic() + patience_seconds
    while True:
        try:
            with translated(doing):
                return question()
        except _InterruptedError:
            continue
        except _AwayError:
            if time.monotonic() >= until:
                raise
        time.sleep(_PAUSE_SECONDS)


def code_of(error: Any) -> int:
    """The errno of a DBusBaseError. pystemd 0.11 leaves it out of one class, of those that a signal cut off."""
    return errno.EINTR if error.errno is None else abs(error.errno)


def encode(value: object) -> Any:
    """``value`` with each string in it as the bytes that pystemd wants."""
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
    try:
        yield
    except DBusBaseError as error:
        code = code_of(error)
        # sd-bus gives EACCES both for a flat refusal and for "would have to ask for a password" (sd-bus-errors(3)).
        if code in {errno.EACCES, errno.EPERM}:
            raise PermissionDeniedError(f"You may not {doing}.", hint="Try again as root, or with sudo.") from None
        said = error.err_message
        said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        # libsystemd has no errno for systemd's own errors: they are told by name.
        if "TransactionIsDestructive" in str(error.err_name):
            raise JobConflictError(f"Could not {doing}: {said.rstrip('.')}.") from None
        hint = None
        if code in {errno.ENOENT, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.ENOTCONN} and "reach" in doing:
            hint = "gpusvc needs systemd as PID 1, and the D-Bus system bus."
        kind = _NO_ANSWER.get(code, UnansweredError if code in _DISCONNECTED else SystemdError)
        raise kind(
            f"Could not {doing}: {(said or errno.errorcode.get(code, str(code))).rstrip('.')}.", hint=hint
        ) from None
