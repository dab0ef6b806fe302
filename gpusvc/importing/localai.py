"""LocalAI's model files (its docs, "Model Configuration") as model files of gpusvc.

The backends llama.cpp, vLLM and SGLang become the engines of that name; models of other backends need a command.
LocalAI forms prompts and responses itself, engines of gpusvc do it: those keys are named, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from gpusvc.errors import ConfigError
from gpusvc.importing import defaults, gpu_options, llama_options, places
from gpusvc.importing import localai_keys as keys
from gpusvc.importing.draft import Draft, Import, Notes, finish
from gpusvc.importing.foreign import Foreign, truth_of
from gpusvc.importing.llama_options import OptionKind
from gpusvc.importing.naming import Naming

_LLAMA = ("", "llama-cpp", "llama", "llama-stable", "ik-llama-cpp")
_LLAMA_BUILDS = ("avx", "avx2", "avx512", "cuda", "fallback", "grpc", "hipblas", "sycl_f16", "sycl_f32")
_ENGINES = {
    **dict.fromkeys((*_LLAMA, *(f"llama-cpp-{build}" for build in _LLAMA_BUILDS)), "llama-server"),
    "vllm": "vllm",
    "sglang": "sglang",
}

_HUGGING_FACE = ("huggingface", "hf")

# Files beside the model: llama-server's options for a path and for a URL; empty: it has none.
_FILES = {"mmproj": ("--mmproj", "--mmproj-url"), "draft_model": ("--model-draft", "")}


def convert(
    documents: Iterable[tuple[Path, object]],
    exists: Callable[[Path], bool] = places.exists,
    broken: Iterable[tuple[Path, str]] = (),
) -> Import:
    """Return the models of LocalAI's files.

    Args:
        documents: the content of each file: a model, or a list of models. Paths are relative to the file's directory.
        exists: whether a file exists.
        broken: files that could not be read, each with a sentence on why.

    Raises:
        ConfigError: there is no model.
    """
    notes = Notes()
    for file, reason in broken:
        notes.add(None, str(file), f"{reason} The other files are imported.")
    naming = Naming()
    drafts: list[Draft] = []
    seen = False
    for source, document in documents:
        for model in document if isinstance(document, list) else [document]:
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                notes.add(None, str(source), "It has no name, so it is not a model of LocalAI.")
                continue
            seen = True
            fields = Foreign(model, notes, naming.name(model["name"]), "")
            draft = _convert(fields, source, exists)
            drafts += [draft] if draft is not None else []
    if not seen:
        raise ConfigError("There is no model of LocalAI.", hint="Name one of its YAML files, or their directory.")
    return finish(drafts, notes)


def _convert(fields: Foreign, source: Path, exists: Callable[[Path], bool]) -> Draft | None:
    name, title = fields.model, fields.text("name")
    assert name is not None  # noqa: S101 - convert() named it
    backend = fields.text("backend") or ""
    engine = _engine(backend)
    if engine is None:
        fields.note(
            "backend", f"{backend!r} has no preset. Left out. `gpusvc add {name} -- COMMAND` adds it with your command."
        )
        return None
    if fields.truth("disabled"):
        fields.note("disabled", "It is switched off. Left out.")
        return None
    parameters = fields.table("parameters")
    model = _model(parameters, source, exists, engine)
    if model is None:
        return None
    draft = Draft(name, f"Imported from {source}, where it is called {title!r}.")
    draft.put("engine", engine)
    draft.put("model", model)
    draft.extend("aliases", [title])
    description = " ".join((fields.text("description") or "").split())
    draft.put("description", description if description and description.isprintable() else None)
    draft.put("pinned", fields.truth("pinned") or None)
    _put_groups(draft, fields)
    if engine == "llama-server":
        if not str(draft.get("model")).startswith("/") and (file := _file_of(parameters)):
            draft.extend("args", ["--hf-file", file])
        for key in _FILES:
            _put_file(draft, fields, key, source, exists)
        _put_llama(draft, fields, parameters, source)
    else:
        _put_vllm(draft, fields, parameters)
    parameters.drop(keys.LOST_PARAMETERS)
    parameters.finish()
    fields.drop(keys.LOST)
    fields.finish()
    return draft


def _engine(backend: str) -> str | None:
    """Return the engine of a backend, which may have the hardware in its name, such as cuda12-llama-cpp."""
    name = backend.removesuffix("-development")
    if name in _ENGINES:
        return _ENGINES[name]
    return next((engine for title, engine in _ENGINES.items() if title and name.endswith(f"-{title}")), None)


def _model(parameters: Foreign, source: Path, exists: Callable[[Path], bool], engine: str) -> str | None:
    """Return the file, or the repository. LocalAI keeps downloaded files beside its YAML files."""
    said = parameters.text("model")
    if not said:
        parameters.note("model", "It is missing. The model is left out.")
        return None
    scheme, _, rest = said.partition("://")
    local = source.absolute().parent / (rest.rpartition("/")[2] if rest else said)
    if exists(local) or (engine == "llama-server" and not rest):
        return str(local)
    if not rest:
        return said
    owner, *more = rest.split("@")[0].split("/")
    if scheme in _HUGGING_FACE and more:
        return "/".join([owner, more[0]])
    parameters.note("model", f"{local} does not exist, and an import downloads nothing from {said}. Left out.")
    return None


def _file_of(parameters: Foreign) -> str:
    """Return the file within a repository that a model's URL names; empty if it names none."""
    scheme, _, rest = (parameters.text("model") or "").partition("://")
    parts = rest.split("@")[0].split("/")
    return "/".join(parts[2:]) if scheme in _HUGGING_FACE else ""


def _put_file(draft: Draft, fields: Foreign, key: str, source: Path, exists: Callable[[Path], bool]) -> None:
    """Put a file beside the model: the local one, else the URL from which llama-server downloads it."""
    said = fields.text(key)
    if not said:
        return
    scheme, _, rest = said.partition("://")
    local = source.absolute().parent / (rest.rpartition("/")[2] if rest else said)
    option, url_option = _FILES[key]
    owner, *parts = rest.split("@")[0].split("/")
    if not rest or exists(local):
        draft.extend("args", [option, str(local)])
    elif key == "draft_model" and scheme in _HUGGING_FACE and parts:
        draft.extend("args", ["--spec-draft-hf", f"{owner}/{parts[0]}"])
        if parts[1:]:
            draft.extend("args", [option, "/".join(parts[1:])])
    elif url_option and scheme in _HUGGING_FACE and len(parts) > 1:
        url = f"https://huggingface.co/{owner}/{parts[0]}/resolve/main/{'/'.join(parts[1:])}"
        draft.extend("args", [url_option, url])
    elif url_option and scheme in ("http", "https"):
        draft.extend("args", [url_option, said])
    else:
        fields.note(key, f"{local} does not exist, and an import downloads nothing from {said}. Left out.")


def _put_groups(draft: Draft, fields: Foreign) -> None:
    groups = Naming()
    draft.extend("exclusive", [groups.name(group) for group in dict.fromkeys(fields.texts("concurrency_groups"))])


def _put_llama(draft: Draft, fields: Foreign, parameters: Foreign, source: Path) -> None:
    _put_values(draft, fields, keys.LLAMA_VALUES)
    _put_values(draft, parameters, {"batch": "-b", "rope_freq_base": "--rope-freq-base", "keep": "--keep"})
    _put_values(draft, parameters, {"rope_freq_scale": "--rope-freq-scale"})
    _put_flags(draft, fields, keys.LLAMA_FLAGS)
    limit = parameters.number("max_tokens")
    if limit is not None and limit > 0:
        draft.extend("args", ["-n", str(int(limit))])
    layers = fields.number("gpu_layers")
    # Millions mean all layers, which is llama-server's default.
    if layers is not None and 0 <= layers < 1000:
        draft.extend("args", ["-ngl", str(int(layers))])
    if fields.truth("mmap") is False:
        fields.note("mmap", "llama-server's option changed its name: --no-mmap, later --load-mode. Add yours to args.")
    attention = fields.text("flash_attention")
    if attention is not None:
        truth = truth_of(attention)
        draft.extend("args", ["--flash-attn", attention if truth is None else "on" if truth else "off"])
    if fields.truth("numa"):
        draft.extend("args", ["--numa", "distribute"])
    if shares := fields.text("tensor_split"):
        draft.extend("args", ["--tensor-split", shares])
    _put_adapters(draft, fields, source)
    _put_options(draft, fields)
    _settle_gpus(draft, fields)
    defaults.put(draft, parameters)
    for key in ("mirostat", "mirostat_tau", "mirostat_eta"):
        if fields.has(key):
            _put_values(draft, fields, {key: defaults.OPTIONS[key]})


def _put_adapters(draft: Draft, fields: Foreign, source: Path) -> None:
    """Put the LoRA adapters, each with its scale if it has one."""
    one, scale = fields.text("lora_adapter"), fields.number("lora_scale")
    files = fields.texts("lora_adapters") or ([one] if one else [])
    scales = fields.texts("lora_scales") or ([str(scale)] if scale else [])
    fields.value("lora_base")
    for position, file in enumerate(files):
        path = str(source.absolute().parent / file)
        if position < len(scales):
            draft.extend("args", ["--lora-scaled", f"{path}:{scales[position]}"])
        else:
            draft.extend("args", ["--lora", path])


def _put_options(draft: Draft, fields: Foreign) -> None:
    """Put the list ``options`` of KEY:VALUE. A key without a value is on; with a dash it is llama-server's own."""
    for entry in fields.texts("options"):
        key, colon, value = entry.partition(":")
        option = llama_options.find(keys.LLAMA_OPTIONS.get(key, ""))
        truth = truth_of(value) if colon else True
        if key.startswith("-"):
            draft.extend("args", [key, value] if colon else [key])
        elif option is None:
            fields.note(f"options.{key}", "gpusvc does not know it. Left out; see args and llama-server's own options.")
        elif option.kind in (OptionKind.FLAG, OptionKind.SWITCH):
            if truth is not None:
                draft.extend("args", llama_options.spell(keys.LLAMA_OPTIONS[key], "on" if truth else "off"))
        elif colon:
            named = ",".join(keys.VALUES.get(word, word) for word in value.split(","))
            draft.extend("args", llama_options.spell(keys.LLAMA_OPTIONS[key], _hyphenated(key, named)))


def _hyphenated(key: str, value: str) -> str:
    """Return types of speculation with hyphens; older files have underscores."""
    return value.replace("_", "-") if key in ("spec_type", "speculative_type") else value


def _settle_gpus(draft: Draft, fields: Foreign) -> None:
    """Put the GPUs that the arguments pick, and their number."""
    args = draft.get("args")
    reports: list[gpu_options.Report] = []
    draft.put("args", gpu_options.settle(draft, args if isinstance(args, list) else [], {}, reports))
    for report in reports:
        fields.note(f"options.{report.subject.lstrip('-')}", report.reason)


def _put_vllm(draft: Draft, fields: Foreign, parameters: Foreign) -> None:
    if draft.get("engine") == "sglang":
        _put_values(draft, fields, {"context_size": "--context-length", "max_model_len": "--context-length"})
        _put_values(draft, fields, {"gpu_memory_utilization": "--mem-fraction-static", "dtype": "--dtype"})
    else:
        if not fields.has("max_model_len"):
            _put_values(draft, fields, {"context_size": "--max-model-len"})
        _put_values(draft, fields, keys.VLLM_VALUES)
        _put_flags(draft, fields, keys.VLLM_FLAGS)
        limits = fields.value("limit_mm_per_prompt")
        if isinstance(limits, dict):
            draft.extend("args", ["--limit-mm-per-prompt", json.dumps(limits)])
        known = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "max_tokens")
        said = {key: number for key in known if (number := parameters.number(key)) is not None}
        if said.get("max_tokens") == 0:
            del said["max_tokens"]
        if said:
            generation = {{"max_tokens": "max_new_tokens"}.get(key, key): number for key, number in said.items()}
            draft.extend("args", ["--override-generation-config", json.dumps(generation)])
    _put_engine_options(draft, fields)
    args = draft.get("args")
    listed = args if isinstance(args, list) else []
    ways = fields.count("tensor_parallel_size") or 1
    count = gpu_options.count(["--tensor-parallel-size", str(ways), *listed]) or 1
    draft.put("gpu.count", count if count > 1 else None)
    if count > ways > 1:
        # Without this option the preset splits the model over all GPUs.
        draft.put("args", ["--tensor-parallel-size", str(ways), *listed])
    elif count > ways and "--tensor-parallel-size" not in listed:
        draft.put("args", ["--tensor-parallel-size", "1", *listed])


def _put_engine_options(draft: Draft, fields: Foreign) -> None:
    """Put the parsers and flags of the list ``options``, and ``engine_args``, which is vLLM's own mapping."""
    for entry in fields.texts("options"):
        key, colon, value = entry.partition(":")
        name = key.lstrip("-").replace("-", "_")
        if name in keys.PARSERS and value:
            auto = ["--enable-auto-tool-choice"] if name == "tool_parser" and draft.get("engine") == "vllm" else []
            draft.extend("args", [*auto, keys.PARSERS[name], value.strip()])
        elif key.startswith("--"):
            draft.extend("args", [key, value.strip()] if colon else [key])
        else:
            fields.note(f"options.{key}", "gpusvc does not know it. Left out; see args and the engine's own options.")
    values = fields.value("engine_args")
    for key, value in values.items() if isinstance(values, dict) else ():
        option = f"--{str(key).replace('_', '-')}"
        if isinstance(value, bool):
            draft.extend("args", [option if value else f"--no-{option.removeprefix('--')}"])
        elif isinstance(value, str | int | float):
            draft.extend("args", [option, str(value)])
        elif value is not None:
            draft.extend("args", [option, json.dumps(value, default=str)])


def _put_values(draft: Draft, fields: Foreign, options: dict[str, str]) -> None:
    for key, option in options.items():
        value = fields.text(key)
        if value:
            draft.extend("args", [option, value])


def _put_flags(draft: Draft, fields: Foreign, options: dict[str, str]) -> None:
    for key, option in options.items():
        if fields.truth(key):
            draft.extend("args", [option])
