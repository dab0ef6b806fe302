"""Ollama's messages and tools as OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from gpusvc.gateway.ollama import members

# The first letters of an image in base64, and its type. Engines look at the bytes, and want some type.
_KINDS = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp"}

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

Message = dict[str, object]


def translate(asked: Sequence[Mapping[str, object]]) -> list[Message]:
    """Return a conversation in OpenAI's form.

    OpenAI wants to know by an id which call a tool answers. Where a client gives no id, the answers belong to the calls
    before them by the tool's name, and else in their order.

    Raises:
        HttpError: 400, a message is not as Ollama's API has it.
    """
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # name and id of the calls without an answer
    for position, message in enumerate(asked):
        place = f"messages[{position}]."
        role = members.text(message, "role", place)
        if role not in _ROLES:
            raise members.bad(f"{place}role must be system, user, assistant or tool.", param=place + "role")
        words = members.text(message, "content", place)
        images = members.texts(message, "images", place)
        one: Message = {"role": role, "content": with_images(words, images, place + "images") if images else words}
        if role == "assistant":
            if thinking := members.text(message, "thinking", place):
                one["reasoning_content"] = thinking
            calls = members.rows(message, "tool_calls", place)
            if calls:
                one["tool_calls"] = made_calls = [
                    _call(call, f"call_{position}_{index}", f"{place}tool_calls[{index}].")
                    for index, call in enumerate(calls)
                ]
                waiting = [(str(made["function"]["name"]), str(made["id"])) for made in made_calls]
        elif role == "tool":
            name = members.text(message, "tool_name", place) or members.text(message, "name", place)
            one["tool_call_id"] = members.text(message, "tool_call_id", place) or _answered(waiting, name)
            if name:
                one["name"] = name
        made.append(one)
    return made


def with_images(words: str, images: Sequence[str], place: str) -> list[Message]:
    """Return a text with images as the content of one message. Raises HttpError 400: an image is empty."""
    parts: list[Message] = [{"type": "text", "text": words}] if words else []
    for index, image in enumerate(images):
        if not image:
            raise members.bad(f"{place}[{index}] is empty; an image is sent in base64.", param=place)
        address = image if image.startswith("data:") else f"data:image/{_kind_of(image)};base64,{image}"
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return parts


def _kind_of(image: str) -> str:
    return next((kind for begin, kind in _KINDS.items() if image.startswith(begin)), "jpeg")


def _call(call: Mapping[str, object], own_id: str, place: str) -> dict[str, dict[str, object]]:
    function = members.table(call, "function", place)
    name = members.text(function, "name", place + "function.")
    if not name:
        raise members.bad(f"{place}function.name is missing.", param=place + "function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(members.table(function, "arguments", place + "function."), separators=(",", ":"))
    made: dict[str, object] = {
        "id": members.text(call, "id", place) or own_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return made  # type: ignore[return-value]


def _answered(waiting: list[tuple[str, str]], name: str) -> str:
    """Take the call out of ``waiting`` that a tool answers, and return its id."""
    index = next((index for index, (called, _) in enumerate(waiting) if called == name), 0)
    return waiting.pop(index)[1] if waiting else "call"
