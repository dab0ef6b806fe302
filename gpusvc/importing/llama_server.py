"""A preset file of llama-server's router (``--models-preset``; llama.cpp's tools/server/README.md) as model files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpusvc.config.presets import PORT
from gpusvc.errors import ConfigError
from gpusvc.importing import gpu_options, ini, llama_options, places
from gpusvc.importing.draft import Draft, Import, Notes, finish
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.llama_options import OptionKind
from gpusvc.importing.naming import Naming

_GLOBAL = "*"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")

# Options that say something about gpusvc rather than about the engine. They are known by their leading names here.
_LEADING = ("model", "hf-repo", "model-url", "docker-repo", "alias")

# Where a model comes from, as options of llama-server that its preset here does not give.
_ELSEWHERE = ("model-url", "docker-repo")

# More than any preset file has; all sections together, as each repeats what holds for all.
_MOST_KEYS = 100_000

_BY_THE_GATEWAY = (
    "Engines listen on the loopback address only, and the gateway does that: see [gateway] and `gpusvc key`."
)
_BY_GPUSVC = "gpusvc binds the engine to the loopback address, and takes a port that is free."
_ROUTER = "It is about llama-server's router, whose place gpusvc takes."

# By leading name.
_LEFT_OUT = {
    **dict.fromkeys(("host", "port", "reuse-port"), _BY_GPUSVC),
    **dict.fromkeys(("api-key", "api-key-file", "ssl-key-file", "ssl-cert-file"), _BY_THE_GATEWAY),
    **dict.fromkeys(("models-dir", "models-preset", "models-autoload", "dedup-cache-models"), _ROUTER),
    "models-max": "It is the host's: `max_active` in gpusvc.toml.",
    "tags": "The gateway's list of models has no fields of one's own.",
    "api-prefix": "The gateway asks the engine at the paths that clients ask for.",
    "control-vector-layer-range": "A preset cannot give an option two values; llama-server refuses it too.",
    **dict.fromkeys(
        ("usage", "version", "cache-list", "completion-bash", "list-devices"), "llama-server prints something and ends."
    ),
}


def convert(text: str, source: Path, there: places.Exists = places.exists) -> Import:
    """The models of a preset file.

    Args:
        text: what the file holds.
        source: where it lies. Its paths are relative to where llama-server was started, which may be there.
        there: whether there is such a file.

    Raises:
        ConfigError: it is no such file.
    """
    notes = Notes()
    sections = ini.parse(text, str(source))
    shared = sections.pop(_GLOBAL, {})
    if sum(len(shared) + len(keys) for keys in sections.values()) > _MOST_KEYS:
        raise ConfigError(f"{source} has more than {_MOST_KEYS} keys, with those of [*] in every section.")
    naming = Naming()
    drafts = []
    for title, keys in sections.items():
        if title == ini.DEFAULT and not keys.keys() - {"version"}:
            continue
        fields = Foreign(_merged(shared, keys), notes, naming.name(title), "")
        draft = _Section(title, fields, source, there).convert()
        if draft is not None:
            drafts.append(draft)
    return finish(drafts, notes)


def _merged(shared: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The keys of a section and those that hold for all, each option once: the section's own spelling counts.

    Of two spellings of one option in the same section llama.cpp takes the one that sorts last.
    """
    found: dict[str, tuple[str, str]] = {}
    for section in (shared, own):
        chosen: dict[str, str] = {}
        for key in section:
            leading = _leading(key)
            chosen[leading] = max(key, chosen.get(leading, key))
        found |= {leading: (key, section[key]) for leading, key in chosen.items() if key != "version"}
    return {leading if leading in _LEADING else key: value for leading, (key, value) in found.items()}


def _leading(key: str) -> str:
    option = llama_options.find(key)
    return key if option is None else option.leading


class _Section:
    """One model of a preset file."""

    def __init__(self, title: str, fields: Foreign, source: Path, there: places.Exists) -> None:
        self._title = title
        self._fields = fields
        self._source = source
        self._there = there

    def convert(self) -> Draft | None:
        """The draft; None, and a note, if nothing says which model it is."""
        fields = self._fields
        name = fields.model
        assert name is not None  # noqa: S101 - convert() named it
        draft = Draft(name, f"Imported from {self._source}, where it is called {self._title!r}.")
        if not self._put_model(draft):
            fields.note("model", "Nothing says which file it is, and so the model is left out.")
            return None
        aliases = (fields.text("alias") or "").split(",")
        draft.extend("aliases", [self._title, *(alias.strip() for alias in aliases if alias.strip())])
        draft.put("preload", fields.truth("load-on-startup") or None)
        draft.put("stop_timeout", _seconds(fields.number("stop-timeout")))
        asleep = fields.number("sleep-idle-seconds")
        if asleep is not None and asleep > 0:
            draft.put("idle_timeout", _seconds(asleep))
            reason = "It became idle_timeout: the engine is stopped, and all of its VRAM is back."
            fields.note("sleep-idle-seconds", reason)
        self._put_options(draft)
        return draft

    def _put_model(self, draft: Draft) -> bool:
        """The file, the repository, or a command that fetches it; where a section has none, its name may be one."""
        path, repository = self._fields.text("model"), self._fields.text("hf-repo")
        if not repository and not path and _REPOSITORY.fullmatch(self._title):
            repository = "" if self._is_elsewhere() else self._title
        if path or repository:
            draft.put("engine", "llama-server")
            draft.put("model", self._absolute("model", path) if path else repository)
            for key in _ELSEWHERE:
                if self._fields.text(key):
                    self._fields.note(key, "Another key says already where the model is. Left out.")
            return True
        for key in _ELSEWHERE:
            if origin := self._fields.text(key):
                listen = ["--alias", draft.name, "--host", "127.0.0.1", "--port", PORT]
                draft.put("command", ["llama-server", f"--{key}", origin, *listen])
                self._fields.note(key, "The engine downloads the model: its user needs a home that it may write to.")
                return True
        return False

    def _is_elsewhere(self) -> bool:
        return any(self._fields.has(key) for key in _ELSEWHERE)

    def _put_options(self, draft: Draft) -> None:
        """All other options: those named as variables into the environment, and the rest behind the command."""
        fields = self._fields
        args: list[str] = []
        env: dict[str, str] = {}
        for key in [key for key in fields.names() if not fields.was_asked(key)]:
            value = fields.text(key) or ""
            option = llama_options.find(key)
            if option is None and key not in _LEFT_OUT:
                fields.note(key, "llama-server has no such option, as far as is known here; it is kept.")
            elif option is not None and option.older:
                fields.note(key, "llama-server of today refuses it: see its --load-mode. It is kept.")
            if _leading(key) in _LEFT_OUT:
                # Off or empty is what there is here anyhow.
                if value and (option is None or llama_options.spell(key, value)):
                    fields.note(key, _LEFT_OUT[_leading(key)])
            elif option is None:
                args += llama_options.spell(key, value)
            else:
                if option.kind is OptionKind.PATH:
                    value = self._absolute(key, value)
                if key == option.variable and not _is_about_gpus(option):
                    env[key] = value
                else:
                    args += llama_options.spell(key, value)
        reports: list[gpu_options.Report] = []
        args = gpu_options.settle(draft, args, env, reports)
        for report in reports:
            fields.note(report.subject.lstrip("-"), report.reason)
        draft.extend("command" if draft.get("command") else "args", args)

    def _absolute(self, key: str, value: str) -> str:
        """A path of the preset as an absolute one, with a note where that took a guess.

        llama-server takes several files in one value for some options, and a scale behind a file; what is no path then
        is not found, and stays as it is.
        """
        if not places.is_relative(value):
            return value
        base = places.directory_of([value], self._source, self._there)
        if base is None and key != "model":
            reason = f"{value} is relative to where llama-server was started. Engines run in /: make it absolute."
            self._fields.note(key, reason)
            return value
        path = str((base or self._source.absolute().parent) / value)
        self._fields.note(key, f"It is relative to where llama-server was started, and taken for {path}.")
        return path


def _is_about_gpus(option: llama_options.Option) -> bool:
    """Whether gpu_options reads it, which looks at arguments."""
    return option.leading in ("device", "main-gpu", "split-mode", "tensor-split")


def _seconds(value: float | None) -> str | None:
    return f"{value:g}s" if value else None
