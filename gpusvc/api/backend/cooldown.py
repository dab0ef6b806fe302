"""How long a model whose start failed is left alone by those who want it started on a request; it looks at no clock."""

from __future__ import annotations

import math

from gpusvc.errors import GpusvcError

FIRST_SECONDS = 10.0
LONGEST_SECONDS = 300.0


class CooldownError(GpusvcError):
    """The last start failed a moment ago, and the next is not tried yet."""

    http_status = 503

    def __init__(self, name: str, failure: GpusvcError, retry_after_seconds: int) -> None:
        super().__init__(
            f"The last start of {name} failed, and is not tried again for {retry_after_seconds} s. {failure.message}",
            hint=failure.hint,
        )
        self.retry_after_seconds = retry_after_seconds
        self.log = getattr(failure, "log", ())


class Cooldown:
    """The failures of one model in a row."""

    def __init__(self) -> None:
        self._pause_seconds = 0.0
        self._until_seconds = -math.inf
        self._failure: GpusvcError | None = None
        self._file: object = None

    def fail(self, failure: GpusvcError, now_seconds: float, file: object) -> int:
        """A start failed; in how many seconds the next is tried.

        ``file`` tells one version of the model's file from another: a new one is a new beginning.
        """
        self._pause_seconds = min(self._pause_seconds * 2 or FIRST_SECONDS, LONGEST_SECONDS)
        self._until_seconds = now_seconds + self._pause_seconds
        self._failure, self._file = failure, file
        return math.ceil(self._pause_seconds)

    def check(self, name: str, now_seconds: float, file: object) -> None:
        """
        Raises:
            CooldownError: it is too early.
        """
        left = self._until_seconds - now_seconds
        if self._failure is not None and left > 0 and file == self._file:
            raise CooldownError(name, self._failure, math.ceil(left))
