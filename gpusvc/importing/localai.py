"""LocalAI's model files (its docs, "Model Configuration") as model files of gpusvc.

The backends llama.cpp, vLLM and SGLang become the engines of that name; what others serve has to be given as a command.
LocalAI forms prompts and answers itself, which engines do by themselves here: those keys are named, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from gpusvc.errors import ConfigError
from gpusvc.importing import defaults, gpu_options
from gpusvc.importing.draft import Draft, Import, Notes, finish
from gpusvc.importing.foreign import Foreign, truth_of
from gpusvc.importing.naming import Naming

_LLAMA = ("", "llama-cpp", "llama", "llama-stable", "ik-llama-cpp")
_ENGINES = {**dict.fromkeys(_LLAMA, "llama-server"), "vllm": "vllm", "sglang": "sglang"}

_PROMPTS = "The engine forms prompts by the template that comes with the model."
_ANSWERS = "Answers are passed on as the engine gives them."
_ABOUT = "The gateway's list of models has no fields of one's own."

_LOST = {
    "usage": _ABOUT,
    "known_usecases": _ABOUT,
    "known_input_modalities": _ABOUT,
    "known_output_modalities": _ABOUT,
    "feature_flags": "LocalAI's own.",
    "f16": "It is how the engine computes anyhow.",
    "cuda": "The engine's build decides.",
    "low_vram": "llama-server has none such; see its --fit.",
    "mmlock": "llama-server's option for it changed its name: --mlock, later --load-mode; add yours to args.",
    "main_gpu": "The engine counts the GPUs that it gets from 0; see [gpu] devices.",
    "no_mulmatq": "llama-server has none such any more.",
    "rms_norm_eps": "The file says it.",
    "ngqa": "The file says it.",
    "type": "The file says it.",
    "system_prompt": "Nothing is put into conversations here; clients send their system prompt.",
    "template": _PROMPTS,
    "roles": _PROMPTS,
    "stopwords": "Requests say where to stop; the model's own end of a turn holds anyhow.",
    "cutstrings": _ANSWERS,
    "trimspace": _ANSWERS,
    "trimsuffix": _ANSWERS,
    "extract_regex": _ANSWERS,
    "function": "The engine finds calls of tools by itself: --jinja of llama-server, --tool-call-parser of vLLM.",
    "reasoning": "The engine does that by itself: --reasoning-format of llama-server, --reasoning-parser of vLLM.",
    "grammar": "Requests bring their grammar; --grammar-file of llama-server is one for all.",
    "prompt_cache_path": "llama-server keeps prompts in memory; see its --cache-ram.",
    "prompt_cache_all": "llama-server keeps prompts in memory; see its --cache-ram.",
    "prompt_cache_ro": "llama-server keeps prompts in memory; see its --cache-ram.",
    "download_files": "gpusvc downloads nothing; the files have to be there.",
    "pipeline": "Models are not chained here.",
    "mcp": "Tools are the client's.",
    "agent": "Agents are the client's.",
    "grpc": "Engines are asked by HTTP.",
    "tts": "It belongs to a backend that has no preset here.",
    "diffusers": "It belongs to a backend that has no preset here.",
    "step": "It belongs to a backend that has no preset here.",
}

_LOST_PARAMETERS = {
    "echo": "Requests say it.",
    "n": "Requests say it.",
    "logprobs": "Requests say it.",
    "top_logprobs": "Requests say it.",
    "logit_bias": "Requests say it.",
    "language": "Requests say it.",
    "translate": "Requests say it.",
    "negative_prompt": "Requests say it.",
    "negative_prompt_scale": "Requests say it.",
    "tfz": "llama-server has none such any more.",
    "tokenizer": "It comes with the model.",
}

# Keys with a value, and the option that says the same.
_LLAMA_VALUES = {
    "context_size": "-c",
    "threads": "-t",
    "batch": "-b",
    "cache_type_k": "-ctk",
    "cache_type_v": "-ctv",
    "rope_scaling": "--rope-scaling",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
    "yarn_ext_factor": "--yarn-ext-factor",
    "yarn_attn_factor": "--yarn-attn-factor",
    "yarn_beta_fast": "--yarn-beta-fast",
    "yarn_beta_slow": "--yarn-beta-slow",
    "n_draft": "--spec-draft-n-max",
}
_LLAMA_FILES = {"mmproj": "--mmproj", "draft_model": "--model-draft"}
_LLAMA_FLAGS = {"no_kv_offloading": "--no-kv-offload", "embeddings": "--embeddings", "reranking": "--reranking"}

# Of the list called options, KEY:VALUE each.
_LLAMA_OPTIONS = {
    "parallel": "--parallel",
    "n_parallel": "--parallel",
    "cache_ram": "--cache-ram",
    "cache_reuse": "--cache-reuse",
    "n_ubatch": "--ubatch-size",
    "ubatch": "--ubatch-size",
    "threads_batch": "--threads-batch",
    "pooling": "--pooling",
    "pooling_type": "--pooling",
    "reasoning_format": "--reasoning-format",
    "reasoning_budget": "--reasoning-budget",
    "image_min_tokens": "--image-min-tokens",
    "image_max_tokens": "--image-max-tokens",
    "override_tensor": "--override-tensor",
    "draft_gpu_layers": "--n-gpu-layers-draft",
    "spec_n_max": "--spec-draft-n-max",
    "draft_max": "--spec-draft-n-max",
    "spec_p_min": "--spec-draft-p-min",
}
_LLAMA_SWITCHES = {"use_jinja": "jinja", "jinja": "jinja", "context_shift": "context-shift", "warmup": "warmup"}

_VLLM_VALUES = {
    "max_model_len": "--max-model-len",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "swap_space": "--swap-space",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "load_format": "--load-format",
}
_VLLM_FLAGS = {
    "trust_remote_code": "--trust-remote-code",
    "enforce_eager": "--enforce-eager",
    "disable_log_stats": "--disable-log-stats",
}


def convert(documents: Iterable[tuple[Path, object]], exists: Callable[[Path], bool] = Path.exists) -> Import:
    """The models of LocalAI's files.

    Args:
        documents: what each file holds: one model, or a list of them. Paths in it are relative to the file's directory.
        exists: whether there is such a file.

    Raises:
        ConfigError: none of them is a model.
    """
    notes = Notes()
    naming = Naming()
    drafts: list[Draft] = []
    seen = False
    for source, document in documents:
        for model in document if isinstance(document, list) else [document]:
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                notes.add(None, str(source), "It has no name, and so is no model of LocalAI's.")
                continue
            seen = True
            fields = Foreign(model, notes, naming.name(model["name"]), "")
            draft = _convert(fields, source, exists)
            drafts += [draft] if draft is not None else []
    if not seen:
        raise ConfigError("There is no model of LocalAI's.", hint="Name one of its YAML files, or their directory.")
    return finish(drafts, notes)


def _convert(fields: Foreign, source: Path, exists: Callable[[Path], bool]) -> Draft | None:
    name, title = fields.model, fields.text("name")
    assert name is not None  # noqa: S101 - convert() named it
    backend = fields.text("backend") or ""
    engine = _ENGINES.get(backend)
    if engine is None:
        fields.note(
            "backend", f"{backend!r} has no preset here: `gpusvc add {name} -- COMMAND` with your own. Left out."
        )
        return None
    if fields.truth("disabled"):
        fields.note("disabled", "It is switched off, and so left out.")
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
        _put_llama(draft, fields, parameters, source)
    else:
        _put_vllm(draft, fields, parameters)
    parameters.drop(_LOST_PARAMETERS)
    parameters.finish()
    fields.drop(_LOST)
    fields.finish()
    return draft


def _model(parameters: Foreign, source: Path, exists: Callable[[Path], bool], engine: str) -> str | None:
    """The file, or the repository: LocalAI keeps what it downloaded beside its YAML files."""
    said = parameters.text("model")
    if not said:
        parameters.note("model", "It is missing, and so the model is left out.")
        return None
    scheme, _, rest = said.partition("://")
    local = source.absolute().parent / (rest.rpartition("/")[2] if rest else said)
    if exists(local) or (engine == "llama-server" and not rest):
        return str(local)
    if not rest:
        return said
    owner, *more = rest.split("@")[0].split("/")
    if scheme in ("huggingface", "hf") and more:
        return "/".join([owner, more[0]])
    parameters.note("model", f"{said} was not downloaded to {local}, and gpusvc downloads nothing. Left out.")
    return None


def _put_groups(draft: Draft, fields: Foreign) -> None:
    groups = Naming()
    draft.extend("exclusive", [groups.name(group) for group in dict.fromkeys(fields.texts("concurrency_groups"))])


def _put_llama(draft: Draft, fields: Foreign, parameters: Foreign, source: Path) -> None:
    _put_values(draft, fields, _LLAMA_VALUES)
    _put_values(draft, parameters, {"batch": "-b", "rope_freq_base": "--rope-freq-base", "keep": "--keep"})
    _put_values(draft, parameters, {"rope_freq_scale": "--rope-freq-scale"})
    _put_flags(draft, fields, _LLAMA_FLAGS)
    limit = parameters.number("max_tokens")
    if limit is not None and limit > 0:
        draft.extend("args", ["-n", str(int(limit))])
    for key, option in _LLAMA_FILES.items():
        if file := fields.text(key):
            draft.extend("args", [option, str(source.absolute().parent / file)])
    layers = fields.number("gpu_layers")
    # LocalAI says millions for all, which is llama-server's own default.
    if layers is not None and 0 <= layers < 1000:
        draft.extend("args", ["-ngl", str(int(layers))])
    if fields.truth("mmap") is False:
        fields.note("mmap", "llama-server's option for it changed its name: --no-mmap, later --load-mode; see args.")
    attention = fields.text("flash_attention")
    if attention is not None:
        truth = truth_of(attention)
        draft.extend("args", ["--flash-attn", attention if truth is None else "on" if truth else "off"])
    if fields.truth("numa"):
        draft.extend("args", ["--numa", "distribute"])
    if shares := fields.text("tensor_split"):
        draft.extend("args", ["--tensor-split", shares])
        draft.put("gpu.count", gpu_options.count(["--tensor-split", shares]))
    _put_adapters(draft, fields, source)
    _put_options(draft, fields)
    defaults.put(draft, parameters)
    for key in ("mirostat", "mirostat_tau", "mirostat_eta"):
        if fields.has(key):
            _put_values(draft, fields, {key: defaults.OPTIONS[key]})


def _put_adapters(draft: Draft, fields: Foreign, source: Path) -> None:
    """LoRA adapters, each with its scale if it has one."""
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
    for entry in fields.texts("options"):
        key, _, value = entry.partition(":")
        truth = truth_of(value) if value else True
        if key in _LLAMA_OPTIONS:
            draft.extend("args", [_LLAMA_OPTIONS[key], value])
        elif key in _LLAMA_SWITCHES and truth is not None:
            draft.extend("args", [f"--{_LLAMA_SWITCHES[key]}" if truth else f"--no-{_LLAMA_SWITCHES[key]}"])
        else:
            fields.note(
                f"options.{key}", "It is not known here, and left out; see args and llama-server's own options."
            )


def _put_vllm(draft: Draft, fields: Foreign, parameters: Foreign) -> None:
    if draft.get("engine") == "sglang":
        _put_values(draft, fields, {"context_size": "--context-length", "max_model_len": "--context-length"})
        _put_values(draft, fields, {"gpu_memory_utilization": "--mem-fraction-static", "dtype": "--dtype"})
    else:
        if not fields.has("max_model_len"):
            _put_values(draft, fields, {"context_size": "--max-model-len"})
        _put_values(draft, fields, _VLLM_VALUES)
        _put_flags(draft, fields, _VLLM_FLAGS)
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
    ways = fields.count("tensor_parallel_size")
    draft.put("gpu.count", ways if ways and ways > 1 else None)


def _put_values(draft: Draft, fields: Foreign, options: dict[str, str]) -> None:
    for key, option in options.items():
        value = fields.text(key)
        if value:
            draft.extend("args", [option, value])


def _put_flags(draft: Draft, fields: Foreign, options: dict[str, str]) -> None:
    for key, option in options.items():
        if fields.truth(key):
            draft.extend("args", [option])
