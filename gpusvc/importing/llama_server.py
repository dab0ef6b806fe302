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

# Options that become keys of the model file. Here they are known by their leading names.
_LEADING = ("model", "hf-repo", "model-url", "docker-repo", "alias")

# Options that tell llama-server to fetch a model. The preset of gpusvc does not use them.
_ELSEWHERE = ("model-url", "docker-repo")

# The limit for all sections together. Each section repeats the keys of [*].
_MOST_KEYS = 100_000

_BY_THE_GATEWAY = (
    "Engines listen on the loopback address only. The gateway has keys and TLS: see [gateway] and `gpusvc key`."
)
_BY_GPUSVC = "gpusvc binds the engine to the loopback address, and takes a port that is free."
_ROUTER = "It configures llama-server's router, which gpusvc replaces."

# By leading name.
_LEFT_OUT = {
    **dict.fromkeys(("host", "port", "reuse-port"), _BY_GPUSVC),
    **dict.fromkeys(("api-key", "api-key-file", "ssl-key-file", "ssl-cert-file"), _BY_THE_GATEWAY),
    **dict.fromkeys(("models-dir", "models-preset", "models-autoload", "dedup-cache-models"), _ROUTER),
    "models-max": "It is the host's: `max_active` in gpusvc.toml.",
    "tags": "The gateway's list of models has no such field.",
    "api-prefix": "The gateway sends requests to the engine with the clients' own paths.",
    "control-vector-layer-range": "A preset cannot give an option two values; llama-server refuses it too.",
    **dict.fromkeys(
        ("usage", "version", "cache-list", "completion-bash", "list-devices"), "llama-server prints something and ends."
    ),
}


def convert(text: str, source: Path, there: places.Exists = places.exists) -> Import:
    """Return the models of a preset file.

    Args:
        text: of the file.
        source: the path of the file. Paths in it are relative to the directory in which llama-server was started.
        there: whether a file exists.

    Raises:
        ConfigError: it is not a preset file.
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
    """Return the keys of a section and of [*], each option once; the section's own value counts.

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
        """Return the draft; None, and a note, if the section does not name a model."""
        fields = self._fields
        name = fields.model
        assert name is not None  # noqa: S101 - convert() named it
        draft = Draft(name, f"Imported from {self._source}, where it is called {self._title!r}.")
        if not self._put_model(draft):
            fields.note("model", "The section does not name a file. The model is left out.")
            return None
        aliases = (fields.text("alias") or "").split(",")
        draft.extend("aliases", [self._title, *(alias.strip() for alias in aliases if alias.strip())])
        draft.put("preload", fields.truth("load-on-startup") or None)
        draft.put("stop_timeout", _seconds(fields.number("stop-timeout")))
        asleep = fields.number("sleep-idle-seconds")
        if asleep is not None and asleep > 0:
            draft.put("idle_timeout", _seconds(asleep))
            reason = "It became idle_timeout: gpusvc stops the engine, and frees all of its VRAM."
            fields.note("sleep-idle-seconds", reason)
        self._put_options(draft)
        return draft

    def _put_model(self, draft: Draft) -> bool:
        """Put the file, the repository, or a command that fetches the model. A section's name may be a repository."""
        path, repository = self._fields.text("model"), self._fields.text("hf-repo")
        if not repository and not path and _REPOSITORY.fullmatch(self._title):
            repository = "" if self._is_elsewhere() else self._title
        if path or repository:
            draft.put("engine", "llama-server")
            draft.put("model", self._absolute("model", path) if path else repository)
            for key in _ELSEWHERE:
                if self._fields.text(key):
                    self._fields.note(key, "Another key already names the model. Left out.")
            return True
        for key in _ELSEWHERE:
            if origin := self._fields.text(key):
                listen = ["--alias", draft.name, "--host", "127.0.0.1", "--port", PORT]
                draft.put("command", ["llama-server", f"--{key}", origin, *listen])
                self._fields.note(
                    key, "The engine downloads the model. Its user needs a home directory with write access."
                )
                return True
        return False

    def _is_elsewhere(self) -> bool:
        return any(self._fields.has(key) for key in _ELSEWHERE)

    def _put_options(self, draft: Draft) -> None:
        """Put all other options: variables into the environment, the rest into the arguments."""
        fields = self._fields
        args: list[str] = []
        env: dict[str, str] = {}
        for key in [key for key in fields.names() if not fields.was_asked(key)]:
            value = fields.text(key) or ""
            option = llama_options.find(key)
            if option is None and key not in _LEFT_OUT:
                fields.note(key, "gpusvc does not know this option of llama-server. It is kept.")
            elif option is not None and option.older:
                fields.note(key, "A current llama-server refuses it: see its --load-mode. It is kept.")
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
        """Return a path of the preset as an absolute one, with a note if that is a guess.

        For some options llama-server takes several files in one value, or a scale behind a file. Such a value is not
        found as a file, and stays as it is.
        """
        if not places.is_relative(value):
            return value
        base = places.directory_of([value], self._source, self._there)
        if base is None and key != "model":
            reason = f"{value} is relative to the directory of llama-server. Engines run in /: write an absolute path."
            self._fields.note(key, reason)
            return value
        path = str((base or self._source.absolute().parent) / value)
        self._fields.note(key, f"It is relative to the directory in which llama-server was started. It became {path}.")
        return path


def _is_about_gpus(option: llama_options.Option) -> bool:
    """Return whether gpu_options reads the option, which looks at arguments only."""
    return option.leading in ("device", "main-gpu", "split-mode", "tensor-split")


def _seconds(value: float | None) -> str | None:
    return f"{value:g}s" if value else None
