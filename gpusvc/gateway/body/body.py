"""One request's body on its way to an engine: read for the model's name, held back until that is known, edited, sent.

It knows nothing of connections: whoever owns them feeds what came and takes what may go.

Most requests come whole in one piece, and need no object at all:

    find_model(content_type, data) -> str | None        the name, or None: take the long way, which knows why
    edits.edits(serving) -> bool                        whether this model's requests are changed
    edited(content_type, data, serving) -> bytes        the changed body; raises Refusal
    wants_stream(content_type, data) -> bool            only asked for while a client has to wait

All others go through a Body:

    body = Body(content_type, content_length, limit_bytes=…)     raises Refusal 413
    body.feed(data); body.end()              as the client's bytes come; raise Refusal 413 and 507
    body.settled                             True: the name is known, or it is known that there is none
    body.model                               the name, or None
    body.no_model() -> Refusal               why there is none, if nothing else (path, query, the only model) gives one
    body.stream                              whether the client asked for a stream, by what is known up to now
    body.begin(serving | None)               the model is chosen; None: nothing is to be changed. Also before `settled`
    body.ready                               True: may be taken (and `length` is final). False only before begin(), and
                                             while an edit still waits for what it changes. feed() and end() change it,
                                             and raise Refusal 400 if what is to be filtered is no JSON
    body.length                              of what goes upstream, in bytes, when ready; None: unknown, send it chunked
    body.take() -> bytes                     the next bytes for the engine; b"": nothing now
    body.finished                            True: end() came and everything was taken
    body.full                                True: stop reading from the client until some was taken
    body.rewind() -> bool                    take from the start again, on another connection; False: it is not all held
    body.close()                             memory and file are gone; may be called twice
"""

from __future__ import annotations

import errno
import json
from typing import Final

from gpusvc.config.serving import Serving
from gpusvc.gateway.body import fields
from gpusvc.gateway.body.edits import Cut, edits, filters, object_cuts, rename_cut, spliced
from gpusvc.gateway.body.fields import FieldScanner
from gpusvc.gateway.body.multipart import FormScanner, boundary_of, is_form
from gpusvc.gateway.body.spool import Spool
from gpusvc.gateway.http.replies import Refusal
from gpusvc.quantity import format_size

__all__ = ["Body", "edited", "edits", "find_model", "wants_stream"]

FULL_BYTES: Final = 256 << 10
"""How much waits to be taken before the client has to wait too."""

_JSON: Final = b"application/json"


def find_model(content_type: bytes | None, data: bytes) -> str | None:
    """The name of the model in a whole body; None: take the long way, which knows why."""
    if content_type != _JSON and is_form(content_type):
        return None
    return fields.find_model(data)


def edited(content_type: bytes | None, data: bytes, serving: Serving) -> bytes:
    """A whole body as the model's engine shall get it.

    Raises:
        Refusal: 400, it cannot be filtered.
    """
    if serving.served_name is not None and not filters(serving) and not is_form(content_type):
        span = fields.find_model_span(data)
        if span is not None:
            return b"".join((data[: span[0] - 1], json.dumps(serving.served_name).encode(), data[span[1] + 1 :]))
    body = Body(content_type, len(data), limit_bytes=len(data))
    try:
        body.begin(serving)
        body.feed(data)
        body.end()
        return b"".join(iter(body.take, b""))
    finally:
        body.close()


def wants_stream(content_type: bytes | None, data: bytes) -> bool:
    """Whether the client asks for its answer as a stream, by a whole body."""
    scanner = _scanner(content_type)
    scanner.feed(data, past_model=True)
    return bool(scanner.stream)


class Body:
    """The body of one request; see above for the order of calls."""

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
    )

    def __init__(self, content_type: bytes | None, content_length: int | None, *, limit_bytes: int) -> None:
        """
        Args:
            content_type: as the client's head has it.
            content_length: None: the body comes in chunks.
            limit_bytes: how long it may be.

        Raises:
            Refusal: 413, it is longer.
        """
        if content_length is not None and content_length > limit_bytes:
            raise _too_large(limit_bytes)
        self._content_type = content_type
        self._content_length = content_length
        self._limit_bytes = limit_bytes
        self._scanner = _scanner(content_type)
        self._spool = Spool()
        self._ended = False
        self._begun = False
        self._serving: Serving | None = None
        self._cuts: tuple[Cut, ...] = ()
        self.ready = False

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
    def finished(self) -> bool:
        """Whether all of it came and was taken."""
        return self._ended and self.ready and self._spool.position == self._spool.size

    def no_model(self) -> Refusal:
        """Why there is no model, once ``settled``: for whoever has no other way to choose one."""
        scanner = self._scanner
        if isinstance(scanner, FormScanner):
            message = scanner.problem or "The request's form names no model."
            return Refusal(400, message, hint='Give its name in a field "model".', param="model")
        if scanner.problem is not None and (scanner.opened or (self._content_type or b"").lower().startswith(_JSON)):
            return Refusal(400, scanner.problem, param="model" if '"model"' in scanner.problem else None)
        if scanner.opened and scanner.closed is None and scanner.problem is None:
            return Refusal(400, _CUT_OFF)
        return Refusal(
            400,
            "The request names no model.",
            hint='Give its name in a member "model" of the JSON body.',
            param="model",
        )

    def feed(self, data: bytes) -> None:
        """Take what came from the client.

        Raises:
            Refusal: 413, the body is too large; 507, it has to be held back and there is no room; 400, it is to be
                filtered and is no JSON.
        """
        before = self._spool.size
        if before + len(data) > self._limit_bytes:
            raise _too_large(self._limit_bytes)
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
            Refusal: 400, it is to be filtered and is no JSON.
        """
        self._ended = True
        if self._begun and not self.ready:
            self._judge()

    def begin(self, serving: Serving | None) -> None:
        """The model is chosen. Nothing may be taken before, and a model that is chosen stays.

        Args:
            serving: says what is to be changed; None: nothing.

        Raises:
            Refusal: 400, it is to be filtered and is no JSON.
        """
        self._begun = True
        self._serving = serving if serving is not None and edits(serving) else None
        if self._serving is not None:
            self._catch_up(past_model=self._filters)
        self._judge()

    def take(self) -> bytes:
        """The next bytes for the engine; empty: nothing now.

        Raises:
            Refusal: 500, what was held back cannot be read.
        """
        if not self.ready:
            return b""
        spool = self._spool
        while True:
            offset = spool.position
            try:
                data = spool.read()
            except OSError as error:
                raise Refusal(500, f"The request's body cannot be read again: {error.strerror or error}.") from error
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
        scanner, serving = self._scanner, self._serving
        if serving is None:
            self.ready = True
        elif isinstance(scanner, FormScanner):
            if self.settled:
                if scanner.model_span is not None and serving.served_name is not None:
                    self._cuts = (Cut(*scanner.model_span, serving.served_name.encode()),)
                self.ready = True
        elif not filters(serving):
            if self.settled:
                if scanner.model_member is not None and serving.served_name is not None:
                    self._cuts = (rename_cut(scanner.model_member, serving.served_name),)
                self.ready = True
        elif scanner.closed is not None and scanner.problem is None:
            self._cuts = object_cuts(scanner.members, scanner.closed, serving)
            self.ready = True
        elif scanner.opened and (scanner.problem is not None or self._ended):
            raise Refusal(400, scanner.problem or _CUT_OFF)
        elif scanner.problem is not None or self._ended:
            self.ready = True  # no object, so that there are no members to change


_CUT_OFF: Final = "The request's body is not valid JSON: it ends too early."


def _scanner(content_type: bytes | None) -> FieldScanner | FormScanner:
    """What reads the body. Whatever is not a form is tried as JSON: many clients send it under another type."""
    if content_type is not None and is_form(content_type):
        return FormScanner(boundary_of(content_type))
    return FieldScanner()


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal(
        413,
        f"The request's body is larger than {format_size(limit_bytes)}.",
        hint="The key max_body in the section [gateway] of gpusvc.toml is the limit.",
        close=True,
    )


def _no_room(error: OSError) -> Refusal:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "there is no room for it on the disk" if full else (error.strerror or str(error))
    return Refusal(507 if full else 500, f"The request's body cannot be held back: {reason}.", close=True)
