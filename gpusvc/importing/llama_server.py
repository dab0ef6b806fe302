"""A preset file of llama-server's router (``--models-preset``; llama.cpp's tools/server/README.md) as model files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpusvc.importing import ini, llama_options
from gpusvc.importing.draft import Draft, Import, Notes, finish
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.naming import Naming

_GLOBAL = "*"
_VARIABLE = "LLAMA_ARG_"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")

# All names of an option that says something about gpusvc rather than about the engine, the first of them leading.
_SAME = {
    "model": ("model", "m", "LLAMA_ARG_MODEL"),
    "hf-repo": ("hf-repo", "hf", "hfr", "LLAMA_ARG_HF_REPO"),
    "alias": ("alias", "a", "LLAMA_ARG_ALIAS"),
    "device": ("device", "dev", "LLAMA_ARG_DEVICE"),
    "main-gpu": ("main-gpu", "mg", "LLAMA_ARG_MAIN_GPU"),
    "split-mode": ("split-mode", "sm", "LLAMA_ARG_SPLIT_MODE"),
    "tensor-split": ("tensor-split", "ts", "LLAMA_ARG_TENSOR_SPLIT"),
}

_BY_THE_GATEWAY = (
    "Engines listen on the loopback address only, and the gateway does that: see [gateway] and `gpusvc key`."
)
_BY_GPUSVC = "gpusvc binds the engine to the loopback address, and takes a port that is free."
_ROUTER = "It is about llama-server's router, whose place gpusvc takes."

_LEFT_OUT = {
    **dict.fromkeys(("host", "port", "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "reuse-port"), _BY_GPUSVC),
    **dict.fromkeys(("api-key", "api-key-file", "ssl-key-file", "ssl-cert-file", "LLAMA_API_KEY"), _BY_THE_GATEWAY),
    **dict.fromkeys(("models-dir", "models-preset", "models-autoload", "no-models-autoload"), _ROUTER),
    "models-max": "It is the host's: `max_active` in gpusvc.toml.",
    "tags": "The gateway's list of models has no fields of one's own.",
    "api-prefix": "The gateway asks the engine at the paths that clients ask for.",
}


def convert(text: str, source: Path) -> Import:
    """The models of a preset file; ``source`` is where it lies, as its paths may be relative to that.

    Raises:
        ConfigError: it is no such file.
    """
    notes = Notes()
    sections = ini.parse(text, str(source))
    shared = sections.pop(_GLOBAL, {})
    naming = Naming()
    drafts = []
    for title, keys in sections.items():
        own = {key: value for key, value in keys.items() if key != "version"}
        if title == ini.DEFAULT and not own:
            continue
        fields = Foreign(_leading(shared) | _leading(own), notes, naming.name(title), "")
        draft = _convert(title, fields, source)
        if draft is not None:
            drafts.append(draft)
    return finish(drafts, notes)


def _leading(keys: Mapping[str, str]) -> dict[str, str]:
    """The same with the leading name of each option that has several."""
    leaders = {name: leader for leader, names in _SAME.items() for name in names}
    return {leaders.get(key, key): value for key, value in keys.items() if key != "version"}


def _convert(title: str, fields: Foreign, source: Path) -> Draft | None:
    name = fields.model
    assert name is not None  # noqa: S101 - convert() named it
    draft = Draft(name, f"Imported from {source}, where it is called {title!r}.")
    draft.put("engine", "llama-server")
    draft.put("model", _model(title, fields, source))
    if draft.get("model") is None:
        fields.note("model", "Nothing says which file it is, and so the model is left out.")
        return None
    aliases = (fields.text("alias") or "").split(",")
    draft.extend("aliases", [title, *(alias.strip() for alias in aliases if alias.strip())])
    draft.put("preload", fields.truth("load-on-startup") or None)
    draft.put("stop_timeout", _seconds(fields.number("stop-timeout")))
    asleep = fields.number("sleep-idle-seconds")
    if asleep is not None and asleep > 0:
        draft.put("idle_timeout", _seconds(asleep))
        fields.note("sleep-idle-seconds", "It became idle_timeout: the engine is stopped, and all of its VRAM is back.")
    fields.drop(_LEFT_OUT)
    _put_gpus(draft, fields)
    _put_rest(draft, fields)
    return draft


def _model(title: str, fields: Foreign, source: Path) -> str | None:
    """The file or the repository; where a section has neither, its name may be one."""
    path, repository = fields.text("model"), fields.text("hf-repo")
    if path:
        return str(source.absolute().parent / path)
    return repository or (title if _REPOSITORY.fullmatch(title) else None)


def _put_gpus(draft: Draft, fields: Foreign) -> None:
    """Which GPUs: the engine sees no others here, and counts those that it sees from 0."""
    devices = [device.strip() for device in (fields.text("device") or "").split(",") if device.strip()]
    indices = [int(device.removeprefix("CUDA")) for device in devices if re.fullmatch(r"CUDA[0-9]{1,4}", device)]
    if devices == ["none"]:
        draft.put("gpu.count", 0)
        draft.extend("args", ["--device", "none"])
    elif devices and len(indices) == len(devices):
        draft.put("gpu.count", len(indices))
        draft.put("gpu.devices", indices)
        fields.note("device", "It became [gpu] devices, by nvidia-smi's indices.")
    elif devices:
        fields.note("device", "Only CUDA's devices are known here; see [gpu] devices.")

    mode, main, shares = fields.text("split-mode"), fields.count("main-gpu"), fields.text("tensor-split")
    if main is not None and mode == "none":
        draft.put("gpu.count", 1)
        draft.put("gpu.devices", [main])
    elif main:
        fields.note("main-gpu", "The engine counts the GPUs that it gets from 0; see [gpu] devices.")
    if shares is not None:
        count = sum(1 for share in shares.replace("/", ",").split(",") if share.strip().strip("0."))
        draft.put("gpu.count", draft.get("gpu.count") or max(count, 1))
        draft.extend("args", ["--tensor-split", shares])
    if mode is not None:
        draft.extend("args", ["--split-mode", mode])


def _put_rest(draft: Draft, fields: Foreign) -> None:
    """All other options: those named as variables into the environment, and the rest behind the preset's command."""
    env: dict[str, object] = {}
    for key in [key for key in fields.names() if not fields.was_asked(key)]:
        value = fields.text(key) or ""
        if key.startswith(_VARIABLE):
            env[key] = value
        else:
            draft.extend("args", llama_options.spell(key, value))
    draft.put("env", env)


def _seconds(value: float | None) -> str | None:
    return f"{value:g}s" if value else None
