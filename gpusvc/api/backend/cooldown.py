"""The time for which requests do not start a model again after its start failed. The caller brings the clock."""

from __future__ import annotations

import math

from gpusvc.backoff import Backoff
from gpusvc.errors import GpusvcError

FIRST_SECONDS = 10.0
LONGEST_SECONDS = 300.0


class CooldownError(GpusvcError):
    """A request came in the cooldown after a failed start."""

    http_status = 503

    def __init__(self, name: str, failure: GpusvcError, retry_after_seconds: int) -> None:
        super().__init__(
            f"Requests do not start {name} again for {retry_after_seconds} s, because its last start failed. "
            f"{failure.message}",
            hint=failure.hint,
        )
        self.retry_after_seconds = retry_after_seconds
        self.log = getattr(failure, "log", ())


class Cooldown:
    """The failures of one model in a row."""

    def __init__(self) -> None:
        self._backoff = Backoff(FIRST_SECONDS, LONGEST_SECONDS)
        self._failure: GpusvcError | None = None
        self._file: object = None

    def fail(self, failure: GpusvcError, now_seconds: float, file: object) -> int:
        """Begin a cooldown after ``failure``. Return its seconds.

        ``file`` identifies the version of the model's file: a changed file ends the cooldown.
        """
        self._backoff.postpone(now_seconds)
        self._failure, self._file = failure, file
        return math.ceil(self._backoff.left(now_seconds))

    def check(self, name: str, now_seconds: float, file: object) -> None:
        """Check that no cooldown of this version of the file is going on.

        Raises:
            CooldownError: there is one.
        """
        left = self._backoff.left(now_seconds)
        if self._failure is not None and left > 0 and file == self._file:
            raise CooldownError(name, self._failure, math.ceil(left))
