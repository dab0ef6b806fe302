"""The lists of models in Ollama's form, and what is shown of one. It computes values only.

The gateway's own list says which models there are. The management API adds what their files and locks say; without its
answer, sizes are 0 and the texts empty, as Ollama itself has them where it does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from gpusvc.gateway.ollama.answers import now_text

Value = dict[str, object]
Facts = Mapping[str, Mapping[str, object]]
"""What the management API says, by model."""

# As Ollama writes it for a model that stays: a time that does not come.
_NEVER_SECONDS = 9_999_999_999.0


def tagged(name: str) -> str:
    """Return a name as Ollama lists it, always with a tag."""
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def tags(listed: Sequence[Mapping[str, object]], weights: Facts) -> Value:
    """Return the answer of /api/tags.

    Args:
        listed: the entries of /v1/models.
        weights: what the files of the models say.
    """
    return {"models": [_entry(name, card, weights) for name, card in _named(listed)]}


def running(listed: Sequence[Mapping[str, object]], weights: Facts, models: Facts, now: float) -> Value:
    """Return the answer of /api/ps: the models that are loaded or loading, each under its own name.

    Args:
        listed: as for tags().
        weights: as for tags().
        models: what the management API says of their use.
        now: seconds since the epoch.
    """
    found: list[Value] = []
    for name, card in _named(listed):
        own = _own(card)
        if card.get("id") != own.get("name") or own.get("state") not in ("ready", "loading"):
            continue
        entry = _entry(name, card, weights)
        del entry["modified_at"]
        entry["size_vram"] = size = _size(own.get("used_bytes"))
        entry["size"] = size or entry["size"]
        entry["expires_at"] = now_text(_expiry(models.get(str(own.get("name")), {}), now))
        entry["context_length"] = _size(weights.get(str(own.get("name")), {}).get("context"))
        found.append(entry)
    return {"models": found}


def details(known: Mapping[str, object]) -> Value:
    """Return what the lists say of a model's files."""
    architecture = _text(known.get("architecture"))
    return {
        "parent_model": "",
        "format": _text(known.get("format")),
        "family": architecture,
        "families": [architecture] if architecture else [],
        "parameter_size": _text(known.get("parameters")),
        "quantization_level": _text(known.get("quantisation")),
    }


def shown(card: Mapping[str, object], known: Mapping[str, object]) -> Value:
    """Return the answer of /api/show.

    Args:
        card: the model's entry in /v1/models.
        known: what its files say.
    """
    architecture, context = _text(known.get("architecture")), _size(known.get("context"))
    information: Value = {}
    if architecture:
        information["general.architecture"] = architecture
        if context:
            information[f"{architecture}.context_length"] = context
    capabilities = known.get("capabilities")
    return {
        "modelfile": "",
        "parameters": f"num_ctx                        {context}" if context else "",
        "template": "",
        "details": details(known),
        "model_info": information,
        "capabilities": capabilities if isinstance(capabilities, list) and capabilities else ["completion"],
        "modified_at": now_text(_size(card.get("created"))),
    }


def _named(listed: Sequence[Mapping[str, object]]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield each entry with its name in Ollama's form; ``qwen`` and ``qwen:latest`` are one there."""
    seen: set[str] = set()
    for card in listed:
        name = tagged(str(card.get("id")))
        if name not in seen:
            seen.add(name)
            yield name, card


def _entry(name: str, card: Mapping[str, object], weights: Facts) -> Value:
    own = _own(card)
    known = weights.get(str(own.get("name")), {})
    created = _size(card.get("created"))
    return {
        "name": name,
        "model": name,
        "modified_at": now_text(created),
        "size": _size(known.get("size_bytes")),
        # Clients tell by it whether a model has changed. Here that is its file.
        "digest": hashlib.sha256(f"{own.get('name')} {created}".encode()).hexdigest(),
        "details": details(known),
    }


def _expiry(known: Mapping[str, object], now: float) -> float:
    timeout = known.get("idle_timeout_seconds")
    if known.get("pinned") is True or not isinstance(timeout, int | float) or not timeout > 0:
        return _NEVER_SECONDS
    last_use = None if known.get("in_use") is True else _seconds(known.get("last_use"))
    return min((now if last_use is None else last_use) + timeout, _NEVER_SECONDS)


def _seconds(text: object) -> float | None:
    """Return a time of the API's in seconds since the epoch; None: it is none."""
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp()) if isinstance(text, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def _own(card: Mapping[str, object]) -> Mapping[str, object]:
    own = card.get("gpusvc")
    return own if isinstance(own, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _size(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0
