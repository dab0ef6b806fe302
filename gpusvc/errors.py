"""The errors of gpusvc, as one tree. This module does not know where an error is shown.

Each error has a sentence for a person, a hint on what to do, and the exit code and HTTP status that report it:

    GpusvcError                 exit 1, HTTP 500
    ├── UsageError              exit 2, HTTP 400   the request makes no sense
    ├── UnknownModelError       exit 3, HTTP 404   permanent
    ├── PermissionDeniedError   exit 4, HTTP 403   permanent
    ├── ConfigError             exit 1, HTTP 500   permanent; a file or key is wrong
    ├── PlacementError          exit 1, HTTP 503   no GPU fits the model now
    │   ├── BusyError                              one would, but other models are in use
    │   └── NeverFitsError                         permanent; no GPU would fit it, even if nothing else ran
    ├── IsolationError          exit 1, HTTP 500   permanent; the kernel does not keep the model off other GPUs
    ├── EngineError             exit 1, HTTP 503   the engine could not be started, or it ended
    ├── NvmlError               exit 1, HTTP 503   NVML failed, so that its reading is unknown
    │   ├── NvmlUnavailableError                   there is no library or no driver
    │   └── NvmlSilentError                        no answer in time: a GPU may hang
    ├── SystemdError            exit 1, HTTP 502   the service manager refused, or could not be reached
    │   ├── UnansweredError                        no answer: the manager re-executes, or the bus restarts
    │   └── JobConflictError                       a job of the other kind is queued, and may not be cancelled
    └── UnreleasedError         exit 1, HTTP 503   a model's VRAM could not be proven free

``permanent``: another try fails too, until somebody changes something. systemd does not retry such a start.
"""

from __future__ import annotations

import re

# The launcher's exit status where there is no room for the model now: EX_TEMPFAIL of sysexits.h.
NO_ROOM_STATUS = 75


class GpusvcError(Exception):
    """An error with one sentence for a person, and optionally a hint on what to do next."""

    exit_code = 1
    http_status = 500
    permanent = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @classmethod
    def word(cls) -> str:
        """Return the error's word for programs, such as ``unknown_model`` for UnknownModelError."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.strip("_").removesuffix("Error")).lower()

    def __str__(self) -> str:
        if self.hint is None:
            return self.message
        return self.message + ("\n" if "\n" in self.message else " ") + self.hint


class UsageError(GpusvcError):
    exit_code = 2
    http_status = 400


class UnknownModelError(GpusvcError):
    exit_code = 3
    http_status = 404
    permanent = True


class PermissionDeniedError(GpusvcError):
    exit_code = 4
    http_status = 403
    permanent = True


class ConfigError(GpusvcError):
    permanent = True


class PlacementError(GpusvcError):
    http_status = 503


class BusyError(PlacementError):
    pass


class NeverFitsError(PlacementError):
    permanent = True


class IsolationError(GpusvcError):
    permanent = True


class EngineError(GpusvcError):
    http_status = 503


class NvmlError(GpusvcError):
    http_status = 503


class NvmlUnavailableError(NvmlError):
    pass


class NvmlSilentError(NvmlError):
    pass


class SystemdError(GpusvcError):
    http_status = 502


class UnansweredError(SystemdError):
    pass


class JobConflictError(SystemdError):
    pass


class UnreleasedError(GpusvcError):
    http_status = 503
