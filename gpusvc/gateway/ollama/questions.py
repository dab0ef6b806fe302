"""What a client of Ollama's API asks, as requests that engines understand. It knows no model and no engine.

Endpoints of engines that not all have are tried in order: the next one is asked if an engine does not know the path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gpusvc.gateway.ollama import context, keepalive, members, messages, options
from gpusvc.gateway.ollama.context import Said

_CHAT = b"/v1/chat/completions"
_COMPLETIONS = b"/v1/completions"
_INFILL = b"/infill"
_EMBEDDINGS = b"/v1/embeddings"

_LEVELS = frozenset({"low", "medium", "high"})


class Form(StrEnum):
    """The endpoint, which decides how an answer looks."""

    CHAT = "chat"
    GENERATE = "generate"
    EMBED = "embed"
    EMBEDDINGS = "embeddings"  # the older one, for one text

    @property
    def is_streamed(self) -> bool:
        """Whether its answers are streams unless the client says otherwise."""
        return self in (Form.CHAT, Form.GENERATE)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to ask an engine."""

    path: bytes
    body: dict[str, object]


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    form: Form
    model: str
    """As the client wrote it."""
    attempts: tuple[Attempt, ...]
    """None: the model is to be loaded or unloaded, and nothing else."""
    is_streamed: bool
    keep_alive_seconds: float | None
    """As keepalive.parse() has it."""
    ignored: tuple[str, ...] = ()
    """Names of members and options that have no effect."""
    said: tuple[Said, ...] | None = None
    """The conversation before the answer, for the next ``context``; None: the answer has no context."""


def read(form: Form, asked: Mapping[str, object]) -> Question:
    """Return what is asked.

    Raises:
        HttpError: 400, it is not as Ollama's API has it.
    """
    match form:
        case Form.CHAT:
            return _chat(asked)
        case Form.GENERATE:
            return _generate(asked)
        case _:
            return _embed(form, asked)


def _chat(asked: Mapping[str, object]) -> Question:
    common = _Common.of(Form.CHAT, asked)
    conversation = messages.translate(members.rows(asked, "messages"))
    if not conversation:
        return common.question(())
    body = common.body | {"messages": conversation} | common.of_chat(asked)
    tools = members.rows(asked, "tools")
    if tools:
        body["tools"] = tools
    return common.question((Attempt(_CHAT, body),))


def _generate(asked: Mapping[str, object]) -> Question:
    common = _Common.of(Form.GENERATE, asked)
    prompt, suffix = members.text(asked, "prompt"), members.text(asked, "suffix")
    images = members.texts(asked, "images")
    if not prompt and not suffix and not images:
        return common.question(())
    is_raw = members.flag(asked, "raw", default=False)
    common.ignore(*(name for name in ("template",) if members.text(asked, name)))
    if is_raw or suffix:
        if images:
            raise members.bad("Images cannot be sent with raw or suffix: engines see them in chats.", param="images")
        common.ignore(*(name for name in ("system", "context", "think", "logprobs", "top_logprobs") if asked.get(name)))
        return common.question(_completion(common, asked, prompt, suffix))
    said = _said(common, asked, members.text(asked, "system"))
    conversation: list[messages.Message] = [{"role": role, "content": words} for role, words in said]
    content = messages.with_images(prompt, images, "images") if images else prompt
    conversation.append({"role": "user", "content": content})
    body = common.body | {"messages": conversation} | common.of_chat(asked)
    # One that is too long for a context must not stay in memory until the answer is there.
    length = len(prompt) + sum(len(words) for _, words in said)
    next_said = (*said, ("user", prompt)) if context.may_hold(length) else None
    return common.question((Attempt(_CHAT, body),), said=next_said)


def _said(common: _Common, asked: Mapping[str, object], system: str) -> list[Said]:
    """Return what was said before, with ``system`` instead of its former instructions."""
    before = asked.get("context")
    said = context.decode(before) if before else []
    if said is None:
        common.ignore("context")
        said = []
    if system:
        said = [("system", system), *(one for one in said if one[0] != "system")]
    return said


def _completion(common: _Common, asked: Mapping[str, object], prompt: str, suffix: str) -> tuple[Attempt, ...]:
    body = common.body | {"prompt": prompt}
    schema = _schema(asked)
    if schema is not None:
        # OpenAI's name, and llama-server's.
        body |= {"response_format": _response_format(schema), "json_schema": schema or {"type": "object"}}
    if not suffix:
        return (Attempt(_COMPLETIONS, body),)
    # llama-server ignores a suffix in completions, and its infill is no path of the others.
    infill = {key: value for key, value in common.body.items() if key not in ("max_tokens", "stream_options")}
    infill |= {"input_prefix": prompt, "input_suffix": suffix, "prompt": ""}
    if "max_tokens" in common.body:
        infill["n_predict"] = common.body["max_tokens"]
    return Attempt(_INFILL, infill), Attempt(_COMPLETIONS, body | {"suffix": suffix})


def _embed(form: Form, asked: Mapping[str, object]) -> Question:
    common = _Common.of(form, asked)
    key = "input" if form is Form.EMBED else "prompt"
    value = asked.get(key)
    texts = members.texts(asked, key) if isinstance(value, list) and form is Form.EMBED else [members.text(asked, key)]
    if not any(texts):
        return common.question(())
    if members.flag(asked, "truncate", default=False):
        common.ignore("truncate")
    body: dict[str, object] = {"model": common.model, "input": texts, "encoding_format": "float"}
    if asked.get("dimensions") is not None:
        body["dimensions"] = members.number(asked["dimensions"], "dimensions", whole=True)
    return common.question((Attempt(_EMBEDDINGS, body),))


class _Common:
    """What all endpoints share of a request."""

    def __init__(
        self, form: Form, model: str, keep_alive_seconds: float | None, body: dict[str, object], *, is_streamed: bool
    ) -> None:
        self.form = form
        self.model = model
        self.keep_alive_seconds = keep_alive_seconds
        self.body = body
        self.is_streamed = is_streamed
        self._ignored: list[str] = []

    @classmethod
    def of(cls, form: Form, asked: Mapping[str, object]) -> _Common:
        model = members.model(asked)
        is_streamed = form.is_streamed and members.flag(asked, "stream", default=True)
        sampled, ignored = options.translate(members.table(asked, "options"))
        body: dict[str, object] = {"model": model, "stream": is_streamed, **sampled}
        if is_streamed:
            body["stream_options"] = {"include_usage": True}
        common = cls(form, model, keepalive.parse(asked.get("keep_alive")), body, is_streamed=is_streamed)
        common.ignore(*ignored)
        common.ignore(*(name for name in ("shift",) if asked.get(name) is not None))
        if form.is_streamed and members.flag(asked, "truncate", default=False):
            common.ignore("truncate")
        return common

    def ignore(self, *names: str) -> None:
        self._ignored += (name for name in names if name not in self._ignored)

    def of_chat(self, asked: Mapping[str, object]) -> dict[str, object]:
        """Return members that only chats have."""
        body = _thinking(asked.get("think"))
        schema = _schema(asked)
        if schema is not None:
            body["response_format"] = _response_format(schema)
        if members.flag(asked, "logprobs", default=False):
            body["logprobs"] = True
            if asked.get("top_logprobs") is not None:
                body["top_logprobs"] = members.number(asked["top_logprobs"], "top_logprobs", whole=True)
        return body

    def question(self, attempts: tuple[Attempt, ...], *, said: tuple[Said, ...] | None = None) -> Question:
        return Question(
            self.form,
            self.model,
            attempts,
            self.is_streamed,
            self.keep_alive_seconds,
            tuple(self._ignored),
            said,
        )


def _schema(asked: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the JSON schema that ``format`` asks for; an empty one: any JSON; None: none is asked for."""
    value = asked.get("format")
    if value is None or value == "":
        return None
    if value == "json":
        return {}
    if not isinstance(value, dict):
        raise members.bad('format must be "json" or a JSON schema.', param="format")
    return value


def _response_format(schema: Mapping[str, object]) -> dict[str, object]:
    if not schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "format", "strict": True, "schema": schema}}


def _thinking(think: object) -> dict[str, object]:
    """Return the members that switch a model's thinking: its template decides which one counts."""
    if think is None or think == "":
        return {}
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think, "thinking": think}}
    if isinstance(think, str) and think in _LEVELS:
        switches = {"enable_thinking": True, "thinking": True, "reasoning_effort": think}
        return {"reasoning_effort": think, "chat_template_kwargs": switches}
    raise members.bad('think must be true, false, "low", "medium" or "high".', param="think")
