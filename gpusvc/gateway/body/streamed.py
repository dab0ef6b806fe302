"""A request's body that comes in pieces: read for the model's name, held back until that is known, edited, sent.

It knows nothing of connections: their owner feeds what came and takes what may go.
"""

from __future__ import annotations

import errno
from typing import Final

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.budget import Budget
from gpusvc.gateway.body.edits import Cut, edits, filters, spliced
from gpusvc.gateway.body.reading import cuts, make_scanner, no_model, too_large
from gpusvc.gateway.body.spool import Spool
from gpusvc.gateway.http.replies import HttpError

FULL_BYTES: Final = 256 << 10
"""How much waits to be taken before the client has to wait too."""


class StreamedBody:
    """As Body."""

    __slots__ = (
        "_begun",
        "_content_length",
        "_content_type",
        "_cuts",
        "_ended",
        "_limit_bytes",
        "_scanner",
        "_serving",
        "_spool",
        "ready",
        "received_bytes",
    )

    def __init__(
        self,
        content_type: bytes | None,
        content_length: int | None,
        *,
        limit_bytes: int,
        budget: Budget | None = None,
    ) -> None:
        """
        Args:
            content_type: as the client's head has it.
            content_length: None: the body comes in chunks.
            limit_bytes: how long it may be.
            budget: for the memory that it takes; None: one of its own, without a limit.

        Raises:
            HttpError: 413, it is longer.
        """
        if content_length is not None and content_length > limit_bytes:
            raise too_large(limit_bytes)
        self._content_type = content_type
        self._content_length = content_length
        self._limit_bytes = limit_bytes
        self._scanner = make_scanner(content_type)
        self._spool = Spool(budget or Budget())
        self._ended = False
        self._begun = False
        self._serving: Serving | None = None
        self._cuts: tuple[Cut, ...] = ()
        self.ready = False
        self.received_bytes = 0

    @property
    def model(self) -> str | None:
        """The name of the model; None: not known yet, or ``settled`` and there is none."""
        return self._scanner.model

    @property
    def settled(self) -> bool:
        """Whether more bytes cannot change ``model``."""
        return self._ended or self._scanner.settled

    @property
    def stream(self) -> bool:
        """Whether the client asks for its answer as a stream, by what has come up to now."""
        if self._spool.position == 0:
            self._catch_up(past_model=True)
        return bool(self._scanner.stream)

    @property
    def length(self) -> int | None:
        """How many bytes go to the engine, once ``ready``; None: not known, send them chunked."""
        length = self._spool.size if self._ended else self._content_length
        return None if length is None else length + sum(cut.growth for cut in self._cuts)

    @property
    def full(self) -> bool:
        """Whether so much waits to be taken that the client should wait too; look again after begin() and take()."""
        if not (self.ready if self._begun else self._scanner.settled):
            return False  # only more bytes can help
        return self._spool.size - self._spool.position >= FULL_BYTES

    @property
    def complete(self) -> bool:
        """Whether all of it came."""
        return self._ended

    @property
    def finished(self) -> bool:
        """Whether all of it came and was taken."""
        return self._ended and self.ready and self._spool.position == self._spool.size

    @property
    def awaited(self) -> bool:
        """Whether the rest of it should come before the request takes a slot of its model: it is short, or may be."""
        is_short = self._content_length is None or self._content_length <= FULL_BYTES
        return is_short and not self._ended and self._spool.size < FULL_BYTES

    def no_model(self) -> HttpError:
        """Why there is no model, once ``settled``."""
        return no_model(self._scanner, self._content_type)

    def feed(self, data: bytes) -> None:
        """Take what came from the client.

        Raises:
            HttpError: 413, the body is too large; 507, it has to be held back and there is no room; 400, it is to be
                filtered and is no JSON.
        """
        self.received_bytes += len(data)
        before = self._spool.size
        if before + len(data) > self._limit_bytes:
            raise too_large(self._limit_bytes)
        try:
            self._spool.append(data)
        except OSError as error:
            raise _no_room(error) from error
        scanner = self._scanner
        # One that has stopped earlier has learned what is wanted of it, and goes on only if that becomes more.
        if not self.ready and scanner.offset == before:
            scanner.feed(data, past_model=self._filters)
        if self._begun and not self.ready:
            self._judge()

    def end(self) -> None:
        """All of it has come.

        Raises:
            HttpError: 400, it is to be filtered and is no JSON.
        """
        self._ended = True
        if self._begun and not self.ready:
            self._judge()

    def begin(self, serving: Serving | None) -> None:
        """The model is chosen. Nothing may be taken before, and a model that is chosen stays.

        Args:
            serving: says what is to be changed; None: nothing.

        Raises:
            HttpError: 400, it is to be filtered and is no JSON.
        """
        self._begun = True
        self._serving = serving if serving is not None and edits(serving) else None
        if self._serving is not None:
            self._catch_up(past_model=self._filters)
        self._judge()

    def take(self) -> bytes:
        """The next bytes for the engine; empty: nothing now.

        Raises:
            HttpError: 500, what was held back cannot be read.
        """
        if not self.ready:
            return b""
        spool = self._spool
        while True:
            offset = spool.position
            try:
                data = spool.read()
            except OSError as error:
                raise HttpError(500, f"The request's body cannot be read again: {error.strerror or error}.") from error
            if not (data and self._cuts):
                return data
            data = spliced(data, offset, self._cuts)
            if data:
                return data

    def rewind(self) -> bool:
        """Have take() begin anew, for another connection; False: the first bytes are not held any more."""
        return self._spool.rewind()

    def close(self) -> None:
        """Give back what is held."""
        self._spool.close()

    @property
    def _filters(self) -> bool:
        return self._serving is not None and filters(self._serving)

    def _catch_up(self, *, past_model: bool) -> None:
        """Have the scanner read what is held and it has not seen."""
        scanner = self._scanner
        if scanner.done or (scanner.settled and not past_model):
            return
        for piece in self._spool.pieces(scanner.offset):
            scanner.feed(piece, past_model=past_model)

    def _judge(self) -> None:
        """See whether it is known by now what is to be changed."""
        if self._serving is not None:
            found = cuts(self._scanner, self._serving, is_ended=self._ended)
            if found is None:
                return
            self._cuts = found
        self.ready = True


def _no_room(error: OSError) -> HttpError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "there is no room for it on the disk" if full else (error.strerror or str(error))
    return HttpError(507 if full else 500, f"The request's body cannot be held back: {reason}.", close=True)
