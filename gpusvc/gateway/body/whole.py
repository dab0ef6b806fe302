"""A request's body that came in one piece with its head, as nearly all do. It needs no spool, and rarely a scanner."""

from __future__ import annotations

import json

from gpusvc.config.serving import Serving
from gpusvc.gateway.body import search
from gpusvc.gateway.body.edits import edits, filters, spliced
from gpusvc.gateway.body.fields import FieldScanner
from gpusvc.gateway.body.multipart import FormScanner, is_form
from gpusvc.gateway.body.reading import JSON, cuts, make_scanner, no_model
from gpusvc.gateway.budget import Budget
from gpusvc.gateway.http.replies import HttpError


class WholeBody:
    """A Body that is complete from the start."""

    __slots__ = ("_budget", "_content_type", "_data", "_held_bytes", "_is_taken", "_scanner", "model", "received_bytes")

    complete = settled = ready = True
    full = awaited = False

    def __init__(self, content_type: bytes | None, data: bytes, *, names_model: bool, budget: Budget) -> None:
        """``budget`` has room for ``data``."""
        self._content_type = content_type
        self._data = data
        self._is_taken = False
        self._scanner: FieldScanner | FormScanner | None = None
        self.received_bytes = self._held_bytes = len(data)
        self._budget = budget
        budget.held_bytes += self._held_bytes
        self.model: str | None = None
        if data and names_model:
            self.model = find_model(content_type, data)
            if self.model is None:
                self._scanner = make_scanner(content_type)
                self._scanner.feed(data)
                self.model = self._scanner.model

    @property
    def stream(self) -> bool:
        """Whether the client asks for its response as a stream."""
        return bool(self._data) and wants_stream(self._content_type, self._data)

    @property
    def length(self) -> int:
        return len(self._data)

    @property
    def finished(self) -> bool:
        return self._is_taken or not self._data

    def no_model(self) -> HttpError | None:
        """Return the error that says why the body names no model; None if no scanner searched it."""
        return None if self._scanner is None else no_model(self._scanner, self._content_type)

    def feed(self, data: bytes) -> None:
        """Refuse: the body is complete."""
        raise NotImplementedError(f"{len(data)} bytes after the end of a whole body")

    def end(self) -> None:
        """Do nothing: the body is complete."""

    def begin(self, serving: Serving | None) -> None:
        """Apply the model's changes. Raises HttpError 400 if its filter applies, but the body is not valid JSON."""
        if serving is not None and self._data and edits(serving):
            self._data = edited(self._content_type, self._data, serving)

    def take(self) -> bytes:
        if self._is_taken:
            return b""
        self._is_taken = True
        return self._data

    def rewind(self) -> bool:
        self._is_taken = False
        return True

    def close(self) -> None:
        self._data = b""
        self._budget.held_bytes -= self._held_bytes
        self._held_bytes = 0


def find_model(content_type: bytes | None, data: bytes) -> str | None:
    """Return the name of the model in a whole body by a quick search; None: only a scanner can tell."""
    if content_type != JSON and is_form(content_type):
        return None
    return search.find_model(data)


def edited(content_type: bytes | None, data: bytes, serving: Serving) -> bytes:
    """Return a whole body with the model's changes.

    Raises:
        HttpError: 400, it cannot be filtered.
    """
    if serving.served_name is not None and not filters(serving) and not is_form(content_type):
        span = search.find_model_span(data)
        if span is not None:
            return b"".join((data[: span[0] - 1], json.dumps(serving.served_name).encode(), data[span[1] + 1 :]))
    scanner = make_scanner(content_type)
    scanner.feed(data, past_model=filters(serving))
    return spliced(data, 0, cuts(scanner, serving, is_ended=True) or ())


def wants_stream(content_type: bytes | None, data: bytes) -> bool:
    """Return whether a whole body asks for the response as a stream."""
    scanner = make_scanner(content_type)
    scanner.feed(data, past_model=True)
    return bool(scanner.stream)
