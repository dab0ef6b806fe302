"""The member ``keep_alive``: how long a model stays loaded after a request."""

from __future__ import annotations

import math
import re

from gpusvc.gateway.ollama import members

_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PLAIN = re.compile(r"[+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?")

# Longer than any machine runs.
_FOREVER_SECONDS = 10 * 365 * 86400.0


def parse(value: object) -> float | None:
    """Return seconds: 0 unloads the model, infinity keeps it; None: the request does not say.

    A number is in seconds, and a text is a duration as Go writes it: 10m, 1h30m. A negative one keeps the model.

    Raises:
        HttpError: 400, it is neither.
    """
    if value is None:
        return None
    seconds = _of_text(value) if isinstance(value, str) else float(members.number(value, "keep_alive", whole=False))
    return math.inf if seconds < 0 or seconds > _FOREVER_SECONDS else seconds


def _of_text(text: str) -> float:
    if _PLAIN.fullmatch(text):  # Ollama refuses it, and its clients send it all the same
        return float(text)
    unsigned = text[1:] if text[:1] in ("-", "+") else text
    seconds, position = 0.0, 0
    while position < len(unsigned) and (part := _PART.match(unsigned, position)):
        seconds += float(part[1]) * _SECONDS[part[2]]
        position = part.end()
    if not unsigned or len(text) > 64 or position < len(unsigned):
        raise members.bad("keep_alive is not a duration: write 10m, 1h30m, 0 or -1.", param="keep_alive")
    return -seconds if text[0] == "-" else seconds
