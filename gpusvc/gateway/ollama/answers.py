"""An engine's answer as Ollama's API has it: one object, or a line for each part of a stream.

Durations are the engine's own where it tells them, as llama-server does. Else they are what was seen from here: the
prompt took until the first part, and the answer from there to the last. An answer that comes in one piece shows no
first part, so that ``eval_duration`` has the prompt's time in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from gpusvc.gateway.ollama import context
from gpusvc.gateway.ollama.pieces import CallPart, EngineError, Piece, Usage, piece_of
from gpusvc.gateway.ollama.questions import Form, Question

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop", "function_call": "stop"}

_NANOSECONDS = 1_000_000_000

# Characters of the arguments of one call, which are held until it is whole.
_LONGEST_ARGUMENTS = 8 << 20

Value = dict[str, object]


@dataclass(slots=True)
class Times:
    """When things happened, in nanoseconds of one clock. None: not yet."""

    began: int
    sent: int | None = None
    """When the engine got the request: the model was loaded, and a slot free."""
    first: int | None = None
    """When the first part of a stream came."""
    ended: int | None = None


def now_text(seconds: float) -> str:
    """Return seconds since the epoch as Ollama writes a time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def line(value: Value) -> bytes:
    """Return an object as a line of a stream."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def loaded(question: Question, reason: str, created: float) -> Value:
    """Return the answer to a request that only loads or unloads a model; ``reason`` says which."""
    match question.form:
        case Form.EMBED:
            return {"model": question.model, "embeddings": []}
        case Form.EMBEDDINGS:
            return {"embedding": []}
        case _:
            value = _part(question, "", created)
            return value | {"done": True, "done_reason": reason}


class Answer:
    """Collects the objects of one answer, and says them in Ollama's form."""

    def __init__(self, question: Question, times: Times) -> None:
        self._question = question
        self._times = times
        self._usage = Usage()
        self._calls: list[CallPart] = []
        self._text: list[str] = []  # for the context, as long as it may have room
        self._length = 0  # of the text, in characters
        self._finish: str | None = None

    def part(self, said: Mapping[str, object], created: float) -> Value | None:
        """Return the line for one object of a stream; None: it says nothing to the client now.

        Raises:
            EngineError: a call of a tool makes no sense.
        """
        piece = self._take(said)
        ready: list[CallPart] = []
        if piece.calls:
            # A call is whole when the next one begins: clients get objects, no parts of their text.
            self._calls = joined([*self._calls, *piece.calls])
            *ready, last = self._calls
            self._calls = [last]
            if len(last.arguments) > _LONGEST_ARGUMENTS:
                raise EngineError("A call of a tool does not end.")
        if not (piece.text or piece.thinking or ready or piece.logprobs):
            return None
        return _part(self._question, piece.text, created, piece, ready) | {"done": False}

    def end(self, created: float) -> list[Value]:
        """Return the last lines of a stream.

        Raises:
            EngineError: a call of a tool makes no sense.
        """
        lines: list[Value] = []
        if self._calls and not self._is_cut_off(self._calls[-1]):
            lines.append(_part(self._question, "", created, None, self._calls) | {"done": False})
        return [*lines, _part(self._question, "", created) | self._last()]

    def whole(self, said: Mapping[str, object], created: float) -> Value:
        """Return a whole answer.

        Raises:
            EngineError: it makes no sense.
        """
        piece = self._take(said)
        question = self._question
        if question.form is Form.EMBED:
            vectors = [_vector(vector) for vector in piece.vectors]
            value: Value = {"model": question.model, "embeddings": vectors}
            return value | {key: count for key, count in self._durations().items() if not key.startswith("eval_")}
        if question.form is Form.EMBEDDINGS:
            if not piece.vectors:
                raise EngineError("The engine's answer has no embedding.")
            return {"embedding": _vector(piece.vectors[0])}
        calls = joined(piece.calls)
        if calls and self._is_cut_off(calls[-1]):
            calls.pop()
        return _part(question, piece.text, created, piece, calls) | self._last()

    def _take(self, said: Mapping[str, object]) -> Piece:
        self._usage.take(said)
        piece = piece_of(said)
        if piece.finish is not None:
            self._finish = piece.finish
        if self._question.said is not None and context.may_hold(self._length):
            self._text.append(piece.text)
            self._length += len(piece.text)
        return piece

    def _is_cut_off(self, call: CallPart) -> bool:
        """Whether the answer was too long in the middle of this call, so that nobody can make it."""
        if self._finish != "length":
            return False
        try:
            arguments_of(call)
        except EngineError:
            return True
        return False

    def _last(self) -> Value:
        reason = self._finish or "stop"
        value: Value = {"done": True, "done_reason": _REASONS.get(reason, reason)}
        said = self._question.said
        if said is not None:
            numbers = context.encode([*said, ("assistant", "".join(self._text))])
            value |= {} if numbers is None else {"context": numbers}
        return value | self._durations()

    def _durations(self) -> Value:
        times, usage = self._times, self._usage
        ended = times.began if times.ended is None else times.ended
        sent = ended if times.sent is None else times.sent
        first = sent if times.first is None else times.first
        value: Value = {"total_duration": ended - times.began, "load_duration": sent - times.began}
        if usage.prompt_tokens is not None:
            value["prompt_eval_count"] = usage.prompt_tokens
        if usage.prompt_seconds is not None:
            value["prompt_eval_duration"] = round(usage.prompt_seconds * _NANOSECONDS)
        elif times.first is not None:
            value["prompt_eval_duration"] = first - sent
        if usage.answer_tokens is not None:
            value["eval_count"] = usage.answer_tokens
        if usage.answer_seconds is not None:
            value["eval_duration"] = round(usage.answer_seconds * _NANOSECONDS)
        else:
            value["eval_duration"] = ended - first
        return value


def joined(parts: list[CallPart]) -> list[CallPart]:
    """Return the calls that are made of these parts, in the order in which they began."""
    calls: dict[int, CallPart] = {}
    for part in parts:
        known = calls.get(part.position)
        if known is None:
            calls[part.position] = part
        else:
            calls[part.position] = CallPart(
                part.position, known.id or part.id, known.name or part.name, known.arguments + part.arguments
            )
    return list(calls.values())


def arguments_of(call: CallPart) -> Mapping[str, object]:
    """Return a call's arguments as an object. Raises EngineError: they are none."""
    try:
        arguments = json.loads(call.arguments) if call.arguments.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise EngineError(f"The model calls the tool {call.name[:100]!r} with arguments that are not a JSON object.")
    return arguments


def _part(
    question: Question, words: str, created: float, piece: Piece | None = None, calls: list[CallPart] | None = None
) -> Value:
    value: Value = {"model": question.model, "created_at": now_text(created)}
    thinking = {"thinking": piece.thinking} if piece is not None and piece.thinking else {}
    if question.form is Form.CHAT:
        message: Value = {"role": "assistant", "content": words, **thinking}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        value["message"] = message
    else:
        value |= {"response": words, **thinking}
    if piece is not None and piece.logprobs:
        value["logprobs"] = piece.logprobs
    return value


def _call(call: CallPart) -> Value:
    function = {"index": call.position, "name": call.name, "arguments": arguments_of(call)}
    return {"id": call.id, "function": function} if call.id else {"function": function}


def _vector(vector: object) -> list[object]:
    if not isinstance(vector, list):
        raise EngineError("The engine's embedding is not a list of numbers.")
    # llama-server's older answers have a vector for each token behind one more pair of brackets.
    return vector[0] if len(vector) == 1 and isinstance(vector[0], list) else vector
