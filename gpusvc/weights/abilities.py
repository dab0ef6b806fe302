"""What a model can do, as its files and its engine's command say: for clients that ask before they use it.

Whether a model knows tools or thinks stands in its chat template: that has words for them. vLLM and SGLang also need a
parser for that model, so that there the command decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpusvc.quantity import MIB
from gpusvc.weights import gguf, huggingface
from gpusvc.weights.command import EngineCommand, option
from gpusvc.weights.description import Description, FileKind, describe

_MODEL = option("-m --model --model-path", "LLAMA_ARG_MODEL")
_CONTEXT = option("-c --ctx-size --max-model-len --context-length", "LLAMA_ARG_CTX_SIZE")
_PROJECTOR = option("-mm --mmproj", "LLAMA_ARG_MMPROJ")
_EMBEDS = option("--embedding --embeddings --is-embedding", "LLAMA_ARG_EMBEDDINGS")
_RERANKS = option("--rerank --reranking", "LLAMA_ARG_RERANKING")
_TASKS = (option("--task"), option("--runner"))
_EMBEDDING_TASKS = frozenset({"embed", "embedding", "pooling"})
_TOOLS = option("--tool-call-parser")
_THINKS = option("--reasoning-parser")

_THINKING = ("<think>", "enable_thinking", "reasoning_content", "reasoning_effort")
_TEMPLATE = "tokenizer.chat_template"
_TEMPLATE_BYTES = 1 * MIB
_INFILL = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")


class Abilities(NamedTuple):
    """Of one model. None: its files do not say."""

    kind: FileKind
    size_bytes: int
    architecture: str | None
    parameters: str | None  # as its makers write it, such as 8B
    quantisation: str | None
    context: int | None  # tokens that it is served with, or was made for
    can: tuple[str, ...]  # Ollama's words: completion, embedding, vision, tools, thinking, insert

    def to_json(self) -> dict[str, Any]:
        return {
            "format": str(self.kind),
            "size_bytes": self.size_bytes,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "quantisation": self.quantisation,
            "context": self.context,
            "capabilities": list(self.can),
        }


def of_command(command: Sequence[str], env: Mapping[str, str]) -> Abilities | None:
    """Return what the model of an engine can do; None: its files are not to be read, or are none.

    Args:
        command: of the engine, with absolute paths.
        env: what its configuration adds to its environment.
    """
    asked = EngineCommand(command, env)
    try:
        for path in asked.paths((_MODEL,)):
            found = describe(path)
            if found is not None and found.kind is FileKind.GGUF:
                return _of_gguf(path, found, asked)
            if found is not None and found.kind is FileKind.SAFETENSORS:
                return _of_directory(path, found, asked)
    except (OSError, ValueError):
        return None
    return None


def _of_gguf(path: Path, found: Description, asked: EngineCommand) -> Abilities:
    known = gguf.read_metadata(path)
    architecture, label = _word(known.get("general.architecture")), _word(known.get("general.size_label"))
    head = gguf.read_beyond_vocabulary(path, _TEMPLATE)
    template = gguf.find_text(head, _TEMPLATE) or ""
    can = ["completion"]
    if asked.value(_PROJECTOR) is not None:
        can.append("vision")
    if "tools" in template:
        can.append("tools")
    if any(word in template for word in _THINKING):
        can.append("thinking")
    if gguf.has_any(head, _INFILL):
        can.append("insert")
    if f"{architecture}.pooling_type" in known or _is_for_embeddings(asked):
        can = ["embedding"]
    return _abilities(found, architecture, label, asked, can)


def _of_directory(path: Path, found: Description, asked: EngineCommand) -> Abilities:
    config = huggingface.read_config(path)
    can = ["completion"]
    if isinstance(config.get("vision_config"), dict):
        can.append("vision")
    if asked.value(_TOOLS) is not None:
        can.append("tools")
    if asked.value(_THINKS) is not None and any(word in _template(path) for word in _THINKING):
        can.append("thinking")
    if _is_for_embeddings(asked):
        can = ["embedding"]
    return _abilities(found, _word(config.get("model_type")), None, asked, can)


def _abilities(
    found: Description, architecture: str | None, label: str | None, asked: EngineCommand, can: Sequence[str]
) -> Abilities:
    context = asked.number(_CONTEXT) or found.context
    return Abilities(found.kind, found.size_bytes, architecture, label, found.quantisation, context, tuple(can))


def _is_for_embeddings(asked: EngineCommand) -> bool:
    if asked.flag(_EMBEDS) or asked.flag(_RERANKS):
        return True
    return any(asked.value(task) in _EMBEDDING_TASKS for task in _TASKS)


def _template(directory: Path) -> str:
    """Return the chat template of a directory, or what is known of it; empty if there is none."""
    try:
        return gguf.read_head(directory / "chat_template.jinja", _TEMPLATE_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        pass
    try:
        settings = json.loads(gguf.read_head(directory / "tokenizer_config.json", 8 * _TEMPLATE_BYTES))
    except (OSError, ValueError, RecursionError):
        return ""
    return json.dumps(settings.get("chat_template")) if isinstance(settings, dict) else ""


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and value and value.isprintable() else None
