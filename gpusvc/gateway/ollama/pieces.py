"""What an engine says in one object of its answer, whichever of its endpoints it comes from.

Whole answers and chunks of streams have the same members in other places: ``message`` or ``delta``, ``text``, or
llama-server's own ``content``. An engine may leave out every one of them, or send nonsense: that is no text then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class EngineError(Exception):
    """The engine's answer is an error, or cannot be understood. The text is a sentence for the client."""


class CallPart(NamedTuple):
    """A part of a call of a tool. Parts of one call have one position."""

    position: int
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Piece:
    """A part of an answer, or the whole."""

    text: str = ""
    thinking: str = ""
    calls: list[CallPart] = field(default_factory=list)
    finish: str | None = None
    """Why it ended; None: it goes on."""
    logprobs: list[object] = field(default_factory=list)
    vectors: list[object] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """What an engine says of its work. None: it does not say."""

    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    prompt_seconds: float | None = None
    answer_seconds: float | None = None

    def take(self, said: Mapping[str, object]) -> None:
        """Note what this object says; what it leaves out stays."""
        usage, timings = said.get("usage"), said.get("timings")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
            self.answer_tokens = _count(usage.get("completion_tokens"), self.answer_tokens)
        # llama-server's own.
        self.prompt_tokens = _count(said.get("tokens_evaluated"), self.prompt_tokens)
        self.answer_tokens = _count(said.get("tokens_predicted"), self.answer_tokens)
        if isinstance(timings, dict):
            self.prompt_seconds = _seconds(timings.get("prompt_ms"), self.prompt_seconds)
            self.answer_seconds = _seconds(timings.get("predicted_ms"), self.answer_seconds)


def read(data: bytes) -> Mapping[str, object]:
    """Return an object of an answer.

    Raises:
        EngineError: it is an error, or no object.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise EngineError("The engine's answer is not a JSON object.")
    if said.get("error"):
        raise EngineError(error_in(said) or "The engine answered with an error that it does not describe.")
    return said


def piece_of(said: Mapping[str, object]) -> Piece:
    """Return what one object of an answer says."""
    piece = Piece()
    choices = said.get("choices")
    if isinstance(choices, list):
        for choice in choices[:1]:  # nobody asked for more than one
            if isinstance(choice, dict):
                _of_choice(choice, piece)
    elif isinstance(said.get("data"), list):
        data = [one for one in said["data"] if isinstance(one, dict)]  # type: ignore[attr-defined]
        if all(type(one.get("index")) is int for one in data):
            data.sort(key=lambda one: one["index"])
        piece.vectors = [one.get("embedding") for one in data]
    else:
        piece.text = _text(said.get("content"))
        if said.get("stop") is True:
            piece.finish = "length" if said.get("stop_type") == "limit" or said.get("stopped_limit") is True else "stop"
    return piece


def error_in(said: Mapping[str, object]) -> str | None:
    """Return the sentence of an error, in any of the forms that engines have; None: there is none."""
    error = said.get("error")
    for found in (error.get("message") if isinstance(error, dict) else error, said.get("message"), said.get("detail")):
        if isinstance(found, str) and found:
            return found
    return None


def _of_choice(choice: Mapping[str, object], piece: Piece) -> None:
    finish = choice.get("finish_reason")
    piece.finish = finish if isinstance(finish, str) else None
    piece.text = _text(choice.get("text"))
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        piece.logprobs = logprobs["content"]
    for key in ("delta", "message"):
        said = choice.get(key)
        if isinstance(said, dict):
            piece.text += _text(said.get("content"))
            # vLLM has renamed it.
            piece.thinking += _text(said.get("reasoning_content")) or _text(said.get("reasoning"))
            piece.calls += _calls(said.get("tool_calls"))


def _calls(found: object) -> list[CallPart]:
    parts: list[CallPart] = []
    for position, call in enumerate(found if isinstance(found, list) else ()):
        if not isinstance(call, dict):
            continue
        index, function = call.get("index"), call.get("function")
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        name = _text(function.get("name"))
        parts.append(CallPart(index if type(index) is int else position, _text(call.get("id")), name, _text(arguments)))
    return parts


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object, otherwise: int | None) -> int | None:
    return value if type(value) is int and value >= 0 else otherwise


def _seconds(milliseconds: object, otherwise: float | None) -> float | None:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float) or not 0 <= milliseconds < 1e12:
        return otherwise
    return milliseconds / 1000
