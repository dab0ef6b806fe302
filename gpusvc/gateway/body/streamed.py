"""A request's body that comes in pieces: it is scanned for the model's name, held until that is known, and edited.

It handles no connections: the caller feeds the client's bytes and takes the bytes for the engine.
"""

from __future__ import annotations

import errno
from typing import Final

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.edits import Cut, edits, filters, spliced
from gpusvc.gateway.body.reading import cuts, make_scanner, no_model, too_large
from gpusvc.gateway.body.spool import Spool
from gpusvc.gateway.budget import Budget
from gpusvc.gateway.http.replies import HttpError

FULL_BYTES: Final = 256 << 10
"""If so much waits to be taken, the caller should stop reading from the client."""


class StreamedBody:
    """A Body whose bytes come after the head."""

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
            content_type: the client's Content-Type.
            content_length: in bytes; None: the body is chunked.
            limit_bytes: the length that the body may have.
            budget: the memory that it may take together with others; None: without a limit.

        Raises:
            HttpError: 413, the body is longer.
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
        """Whether the client asks for its response as a stream, by the bytes received up to now."""
        if self._spool.position == 0:
            self._catch_up(past_model=True)
        return bool(self._scanner.stream)

    @property
    def length(self) -> int | None:
        """The number of bytes that go to the engine, once ``ready``; None: not known, send the body chunked."""
        length = self._spool.size if self._ended else self._content_length
        return None if length is None else length + sum(cut.growth for cut in self._cuts)

    @property
    def full(self) -> bool:
        """Whether the caller should stop reading from the client. Ask again after begin() and take()."""
        if not (self.ready if self._begun else self._scanner.settled):
            return False  # nothing can be taken before more bytes come
        return self._spool.size - self._spool.position >= FULL_BYTES

    @property
    def complete(self) -> bool:
        """Whether all of the body was received."""
        return self._ended

    @property
    def finished(self) -> bool:
        """Whether all of the body was received and taken."""
        return self._ended and self.ready and self._spool.position == self._spool.size

    @property
    def awaited(self) -> bool:
        """Whether the request should wait for the rest of the body before it takes a slot: it is short, or may be."""
        is_short = self._content_length is None or self._content_length <= FULL_BYTES
        return is_short and not self._ended and self._spool.size < FULL_BYTES

    def no_model(self) -> HttpError:
        """Return the error that says why there is no model. Call it when ``settled``."""
        return no_model(self._scanner, self._content_type)

    def feed(self, data: bytes) -> None:
        """Add bytes from the client.

        Raises:
            HttpError: 413, the body is too large; 507, the disk has no room to hold it; 500, it cannot be held for
                another reason; 400, the model's filter applies, but the body is not valid JSON.
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
        # A scanner that stopped before the end knows what it was asked for; _catch_up() has it go on if more is needed.
        if not self.ready and scanner.offset == before:
            scanner.feed(data, past_model=self._filters)
        if self._begun and not self.ready:
            self._judge()

    def end(self) -> None:
        """Note that the body is complete.

        Raises:
            HttpError: 400, the model's filter applies, but the body is not valid JSON.
        """
        self._ended = True
        if self._begun and not self.ready:
            self._judge()

    def begin(self, serving: Serving | None) -> None:
        """Note that the model is chosen, for good. Bytes can be taken only after this.

        Args:
            serving: the model's changes to the body; None: no changes.

        Raises:
            HttpError: 400, the model's filter applies, but the body is not valid JSON.
        """
        self._begun = True
        self._serving = serving if serving is not None and edits(serving) else None
        if self._serving is not None:
            self._catch_up(past_model=self._filters)
        self._judge()

    def take(self) -> bytes:
        """Return the next bytes for the engine; empty if there are none now.

        Raises:
            HttpError: 500, the held bytes cannot be read.
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
        """Let take() start again, for another connection. Return False if the first bytes are no longer held."""
        return self._spool.rewind()

    def close(self) -> None:
        """Free the memory and the file. Safe to call twice."""
        self._spool.close()

    @property
    def _filters(self) -> bool:
        return self._serving is not None and filters(self._serving)

    def _catch_up(self, *, past_model: bool) -> None:
        """Let the scanner read the held bytes that it has not read yet."""
        scanner = self._scanner
        if scanner.done or (scanner.settled and not past_model):
            return
        for piece in self._spool.pieces(scanner.offset):
            scanner.feed(piece, past_model=past_model)

    def _judge(self) -> None:
        """Become ready if the changes to the body are known now."""
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
