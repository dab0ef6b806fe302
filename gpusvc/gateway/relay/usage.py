"""How many tokens a response took, as the engine says at its end. It reads only the first and the last bytes."""

from __future__ import annotations

import re

_KEPT_BYTES = 4096

_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*([0-9]{1,15})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*([0-9]{1,15})')

_COUNTED_TYPES = (b"application/json", b"text/event-stream")


def is_usage_type(content_type: bytes | None) -> bool:
    """Return whether a response of this type may say how many tokens it took."""
    return content_type is not None and content_type.lower().startswith(_COUNTED_TYPES)


class Tail:
    """Keeps the last bytes of a body, and the first ones, where Anthropic's streams have the tokens of the prompt."""

    __slots__ = ("_first", "_last")

    def __init__(self, first: bytes) -> None:
        self._first = first[:_KEPT_BYTES]
        self._last = first[-_KEPT_BYTES:]

    def add(self, piece: bytes) -> None:
        self._last = piece[-_KEPT_BYTES:] if len(piece) >= _KEPT_BYTES else (self._last + piece)[-_KEPT_BYTES:]

    @property
    def is_between_events(self) -> bool:
        """Whether a stream of events is between two events."""
        return self._last.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))

    def tokens(self) -> tuple[int, int] | None:
        """Return how many tokens the engine read and wrote; None: the response does not say."""
        # In a text that mentions "usage" the quotes would be escaped.
        found = self._last.rfind(b'"usage"')
        if found < 0:
            return None
        prompt = _PROMPT.search(self._last, found)
        completion = _COMPLETION.search(self._last, found)
        if prompt is None:
            begin = self._first.find(b'"usage"')
            prompt = _PROMPT.search(self._first, begin) if begin >= 0 else None
        return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0
