"""Members of a request's JSON, read with the type that Ollama's API gives them. A null counts as absent."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gpusvc.gateway.http.replies import HttpError
from gpusvc.quantity import shown

_DEEPEST = "The request's body is nested too deeply."

# Python's objects take many times the memory of a short value: 60 MiB of [] take 1.6 GiB, and stop a worker for 6 s.
_MOST_VALUES = 1 << 20


def bad(message: str, *, param: str | None = None) -> HttpError:
    """Return the error for a request that Ollama's API does not allow."""
    return HttpError(400, message, code="invalid_request", param=param)


def read(body: bytes) -> Mapping[str, object]:
    """Return the members of a request's body; an empty body has none.

    Raises:
        HttpError: 400, it is not a JSON object; 413, it has too many values.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > _MOST_VALUES:
        raise HttpError(413, "The request's body has too many values.", code="request_too_large")
    try:
        value = json.loads(body) if body else {}
    except RecursionError:
        raise bad(_DEEPEST) from None
    except ValueError as error:
        raise bad(f"The request's body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad("The request's body is not a JSON object.")
    return value


def text(members: Mapping[str, object], key: str, place: str = "") -> str:
    """Return a text; empty if it is absent. Raises HttpError 400 if it is something else."""
    value = members.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(place + key, "a text")
    return value


def flag(members: Mapping[str, object], key: str, *, default: bool) -> bool:
    """Return a boolean. Raises HttpError 400 if it is something else."""
    value = members.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(key, "true or false")
    return value


def table(members: Mapping[str, object], key: str, place: str = "") -> Mapping[str, object]:
    """Return an object; empty if it is absent. Raises HttpError 400 if it is something else."""
    value = members.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(place + key, "an object")
    return value


def rows(members: Mapping[str, object], key: str, place: str = "") -> list[Mapping[str, object]]:
    """Return a list of objects; empty if it is absent. Raises HttpError 400 if it is something else."""
    value = members.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise _wrong(place + key, "a list of objects")
    return value


def texts(members: Mapping[str, object], key: str, place: str = "") -> list[str]:
    """Return a list of texts; empty if it is absent. Raises HttpError 400 if it is something else."""
    value = members.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _wrong(place + key, "a list of texts")
    return value


def model(members: Mapping[str, object]) -> str:
    """Return the model that a request names, as ``model`` or, as older clients do, as ``name``.

    Raises:
        HttpError: 400, it names none.
    """
    name = text(members, "model") or text(members, "name")
    if not name:
        raise HttpError(
            400,
            "The request names no model.",
            hint='Give its name in a member "model" of the JSON body.',
            code="missing_model",
            param="model",
        )
    return name


def number(value: object, place: str, *, whole: bool) -> int | float:
    """Return a number. A whole one may be written with a zero fraction, as JavaScript does.

    Raises:
        HttpError: 400, it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1e18:
        raise _wrong(place, "a whole number" if whole else "a number")
    if not whole:
        return value
    if value != int(value):
        raise _wrong(place, "a whole number")
    return int(value)


def _wrong(place: str, wanted: str) -> HttpError:
    return bad(f"{shown(place)} must be {wanted}.", param=place)
