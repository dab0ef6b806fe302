"""How the launcher's own process ends: on SIGTERM, with a refusal, or the way its engine did."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

from gpusvc import names
from gpusvc.errors import NO_ROOM_STATUS, EngineError, GpusvcError, NvmlError, NvmlSilentError, UnknownModelError

# A SIGTERM whose exception was swallowed delays a stop by this time. It is far longer than a normal unwinding takes.
_REPEAT_SECONDS = 1.0

# Exit statuses of sysexits.h that systemd does not retry, as it does not retry NO_ROOM_STATUS: a retry at once would be
# refused again. RestartPreventExitStatus= in model@.service names them too.
_EX_NOINPUT = 66  # no such model
_EX_CONFIG = 78  # the administrator has to change something first


class TerminatedError(BaseException):
    """systemd asked this process to end. The engine gets its own SIGTERM from its scope."""


def on_sigterm(*_: object) -> NoReturn:
    """The handler of SIGTERM. It repeats itself until end_quietly(), as foreign code may swallow the exception."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, on_sigterm)
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
    sys.unraisablehook = _tell_others
    raise TerminatedError


def _tell_others(unraisable: sys.UnraisableHookArgs) -> None:
    """Print what Python cannot raise, such as errors in callbacks of weak references, which every import makes.

    A TerminatedError is not printed: the handler repeats itself.
    """
    if unraisable.exc_type is not TerminatedError:
        sys.__unraisablehook__(unraisable)


def end_quietly() -> None:
    """From here on no signal disturbs the end of this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, 0)


def exit_status(error: GpusvcError) -> int:
    """The launcher's exit status for an error: 1, or one that systemd does not retry."""
    if isinstance(error, UnknownModelError):
        return _EX_NOINPUT
    if error.permanent:
        return _EX_CONFIG
    if isinstance(error, NvmlSilentError):
        return NO_ROOM_STATUS
    return NO_ROOM_STATUS if error.http_status == 503 and not isinstance(error, EngineError | NvmlError) else 1


def unmistakable(status: int) -> int:
    """Return the exit status for an engine that ended with ``status``: 1 in place of one by which gpusvc refuses."""
    return 1 if status in {_EX_NOINPUT, NO_ROOM_STATUS, _EX_CONFIG} else status


def end_as(status: int) -> NoReturn:
    """End with the engine's exit status or signal, so that systemd shows it as the unit's own."""
    if status < 0:
        import resource  # noqa: PLC0415  only for this end

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the engine's core dump is the useful one
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-status, signal.SIG_DFL)
        with contextlib.suppress(ValueError):  # the C library keeps some real-time signals for itself
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
        status = 1
    os._exit(status)  # there is nothing left to write, and the interpreter's own cleanup takes 10 ms of every stop


def forgive(name: str) -> None:
    """Take this start off StartLimitBurst=, which counts starts that fail by themselves."""
    from gpusvc.systemd.manager import Manager  # noqa: PLC0415  a refused start has not needed it yet

    with contextlib.suppress(GpusvcError), Manager() as manager:
        unit = manager.unit(names.service(name))
        # Not a unit whose result is a failure, as after the watchdog's SIGTERM: forgotten, it would not be restarted.
        if unit is not None and manager.service_status(unit).result == "success":
            manager.reset_failed(unit.name)
