"""Ollama's local store as model files: manifests that name blobs. One blob of a model is its GGUF file.

``read()`` reads the disk, ``convert()`` does not. A store has ``manifests/HOST/NAMESPACE/MODEL/TAG``, each a JSON list
of layers, and ``blobs/sha256-DIGEST`` (ollama's manifest/paths.go and server/images.go).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpusvc import files
from gpusvc.errors import ConfigError, PermissionDeniedError
from gpusvc.importing import defaults
from gpusvc.importing.draft import Draft, Import, Notes, finish
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.naming import Naming
from gpusvc.weights import gguf

_MEDIA = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"

# Manifests and parameters have kilobytes.
_MOST_BYTES = 1 << 20

# Architectures that llama.cpp does not know, or knows by another name.
_ONLY_THERE = {"gptoss", "mllama", "qwen25vl"}

# Architectures of embedding models. Other files tell it by their pooling.
_EMBEDDING = {
    *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert"),
    *("gemma-embedding", "llama-embed", "t5encoder"),
}

# llama.cpp's enum llama_pooling_type.
_NO_POOLING, _RANK_POOLING = 0, 4

_LOST_PARAMETERS = {
    "stop": "Requests name their stop words; the model's end of a turn always applies.",
    "use_mmap": "llama-server's option changed its name: --no-mmap, later --load-mode. Add yours to args.",
    "use_mlock": "llama-server's option changed its name: --mlock, later --load-mode. Add yours to args.",
    "main_gpu": "The engine counts the GPUs that it gets from 0; see [gpu] devices.",
    "num_gqa": "The model's file contains it.",
    "low_vram": "llama-server has no such option; see its --fit.",
    "f16_kv": "It is llama-server's default.",
    "penalize_newline": "llama-server has no such option.",
    "tfs_z": "llama-server has no such option any more.",
    "logits_all": "llama-server has no such option.",
    "vocab_only": "llama-server has no such option.",
    "draft_num_predict": "See llama-server's --spec-type.",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A model of the store: its name as Ollama shows it, and the content of its layers."""

    name: str
    weights: Path | None  # None: it has no file of weights
    drafts: tuple[Path, ...] = ()  # draft models
    projectors: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)
    others: tuple[str, ...] = ()  # kinds of its other layers
    architecture: str = ""
    pooling: int | None = None  # as llama.cpp numbers it; None: the file does not say
    has_own_vision: bool = False  # in the same file as the text, which only Ollama's own engine can read
    problem: str | None = None  # why it cannot be read


def root_of(path: Path) -> Path:
    """Return the store's directory, given that or a directory of Ollama above it.

    Raises:
        ConfigError: there is no store.
    """
    for root in (path, path / "models", path / ".ollama/models"):
        if (root / "manifests").is_dir():
            return root
    hint = "A store has manifests and blobs, such as /usr/share/ollama/.ollama/models or ~/.ollama/models."
    raise ConfigError(f"{path} is not a store of Ollama.", hint=hint)


def read(root: Path) -> list[Stored]:
    """Return all models of a store, sorted by name.

    Raises:
        PermissionDeniedError: it may not be read.
    """
    found: list[Stored] = []

    def refuse(error: OSError) -> None:
        raise PermissionDeniedError(f"{error.filename} may not be read.", hint="Try again as root.") from error

    manifests = root / "manifests"
    for directory, subdirectories, tags in os.walk(manifests, onerror=refuse):
        subdirectories.sort()
        parts = Path(directory).relative_to(manifests).parts
        if len(parts) == 3:
            shown = [(_shown(*parts, tag), tag) for tag in sorted(tags) if not tag.startswith(".")]
            found += [_read_manifest(root, Path(directory) / tag, name) for name, tag in shown]
    return sorted(found, key=lambda stored: stored.name)


def _shown(host: str, namespace: str, model: str, tag: str) -> str:
    """Return the name as `ollama list` shows it."""
    parts = [host] if host != _HOST else []
    parts += [namespace] if parts or namespace != _NAMESPACE else []
    return "/".join([*parts, f"{model}:{tag}"])


def _read_manifest(root: Path, file: Path, name: str) -> Stored:
    layers: dict[str, list[Path]] = {}
    try:
        manifest = _read_json(file)
        for layer in _items(manifest.get("layers")):
            kind = str(layer.get("mediaType", "")).removeprefix(_MEDIA)
            layers.setdefault(kind, []).append(_blob(root, str(layer.get("digest", ""))))
        parameters = {key: value for blob in layers.get("params", []) for key, value in _read_json(blob).items()}
        weights = layers.get("model", [])
        if len(weights) > 1:
            return Stored(name, None, problem="It has several layers of weights, but llama-server takes one file.")
        known = gguf.read_metadata(weights[0]) if weights else {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return Stored(name, None, problem=f"It cannot be read: {reason}.")
    architecture = str(known.get("general.architecture", ""))
    pooling = known.get(f"{architecture}.pooling_type")
    return Stored(
        name=name,
        weights=weights[0] if weights else None,
        projectors=tuple(layers.get("projector", ())),
        adapters=tuple(layers.get("adapter", ())),
        parameters=parameters,
        drafts=tuple(layers.get("draft", ())),
        others=tuple(sorted(layers.keys() - {"model", "projector", "adapter", "params", "license", "draft"})),
        architecture=architecture,
        pooling=pooling if isinstance(pooling, int) else None,
        has_own_vision=any(".vision." in key for key in known),
    )


def _read_json(file: Path) -> dict[str, object]:
    """Return the members of a JSON file. Raise ValueError or OSError."""
    content = files.read(file, limit_bytes=_MOST_BYTES, follow_links=True)
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return value


def _items(layers: object) -> Iterable[Mapping[str, object]]:
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _blob(root: Path, digest: str) -> Path:
    """Return the path of a blob. Raise ValueError if ``digest`` is not a digest, as it becomes part of the path."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a digest")
    return root.absolute() / "blobs" / digest.replace(":", "-")


def convert(models: Iterable[Stored], source: Path) -> Import:
    """Return the models of a store that llama-server can serve."""
    notes = Notes()
    naming = Naming()
    drafts: list[Draft] = []
    for stored in models:
        name = naming.name(stored.name.removesuffix(f":{_TAG}"))
        if stored.problem is not None or stored.weights is None:
            reason = stored.problem or "It has no GGUF file, but llama-server serves nothing else."
            notes.add(name, "model", f"{reason} The model is left out.")
            continue
        drafts.append(_convert(stored, name, source, notes))
    if drafts:
        reason = "The files stay in the store. `ollama rm` deletes them, and so does a pull of a newer version."
        notes.add(None, "blobs", reason)
    return finish(drafts, notes)


_CONTEXT = (
    "It is absent. Ollama then uses 4096 tokens or OLLAMA_CONTEXT_LENGTH; llama-server uses the context that the model "
    "was trained for, as far as it fits. Add -c to args to limit it."
)


def _convert(stored: Stored, name: str, source: Path, notes: Notes) -> Draft:
    draft = Draft(name, f"Imported from {source}, where it is called {stored.name!r}.")
    draft.put("engine", "llama-server")
    draft.put("model", str(stored.weights))
    # Some clients of Ollama add the default tag, others do not.
    draft.extend("aliases", [stored.name, stored.name.removesuffix(f":{_TAG}")])
    layers = (
        ("projector", "--mmproj", stored.projectors[:1], stored.projectors[1:]),
        ("adapter", "--lora", stored.adapters, ()),
        ("draft", "--model-draft", stored.drafts[:1], stored.drafts[1:]),
    )
    for kind, option, taken, more in layers:
        for file in taken:
            draft.extend("args", [option, str(file)])
        if more:
            notes.add(name, kind, "It has several of these layers, but llama-server takes one: the first.")
    if stored.pooling == _RANK_POOLING:
        draft.extend("args", ["--reranking"])
    elif stored.architecture in _EMBEDDING or stored.pooling not in (None, _NO_POOLING):
        draft.extend("args", ["--embeddings"])
    if "num_ctx" not in stored.parameters:
        notes.add(name, "params.num_ctx", _CONTEXT)
    _put_parameters(draft, Foreign(stored.parameters, notes, name, "params."))
    if stored.has_own_vision or stored.architecture in _ONLY_THERE:
        reason = (
            "llama-server may fail to read this file, made for Ollama's engine; use a GGUF file from another source."
        )
        notes.add(name, "model", reason)
    for kind in stored.others:
        notes.add(name, kind, _OTHERS.get(kind, "gpusvc does not know this kind of layer. Left out."))
    return draft


_OTHERS = {
    "template": "llama-server uses the template in the GGUF file, or a Jinja file that --chat-template-file names.",
    "prompt": "llama-server uses the template in the GGUF file, or a Jinja file that --chat-template-file names.",
    "system": "gpusvc adds nothing to conversations; clients send their system prompt.",
    "messages": "gpusvc adds nothing to conversations; clients send their messages.",
}


def _put_parameters(draft: Draft, fields: Foreign) -> None:
    for key, option in (("num_ctx", "-c"), ("num_batch", "-b"), ("num_thread", "-t"), ("num_predict", "-n")):
        number = fields.number(key)
        if number is not None and not (key == "num_predict" and number < 0):
            draft.extend("args", [option, str(int(number))])
    layers = fields.number("num_gpu")
    if layers is not None and layers >= 0:
        draft.extend("args", ["-ngl", str(int(layers))])
    keep = fields.number("num_keep")
    if keep is not None:
        draft.extend("args", ["--keep", str(int(keep))])
    if fields.truth("numa"):
        draft.extend("args", ["--numa", "distribute"])
    defaults.put(draft, fields)
    fields.drop(_LOST_PARAMETERS)
    fields.finish()
