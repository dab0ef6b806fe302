"""llama-swap's configuration (its config.example.yaml and config-schema.json) as model files.

``swap_rules`` has the rules of which models may run together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from gpusvc.config.presets import PORT
from gpusvc.errors import ConfigError
from gpusvc.importing import commandline, gpu_options, places, shell, swap_rules
from gpusvc.importing.draft import Draft, Import, Notes, finish, without_nulls
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.macros import Macros, unknown, unknown_in
from gpusvc.importing.naming import Naming

_LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|::1|0\.0\.0\.0|::")

# A limit above what any machine serves.
_MOST_MODELS = 5000

# Keys of the whole configuration that no model file has, and what replaces them.
_ELSEWHERE = {
    "logLevel": "gpusvc writes to the journal; `journalctl -p` filters it.",
    "logTimeFormat": "The journal records the times.",
    "logToStdout": "Everything is in the journal: `gpusvc logs NAME`.",
    "metricsMaxInMemory": "Metrics are counters; their size does not grow.",
    "captureBuffer": "gpusvc keeps no requests and no responses.",
    "startPort": "gpusvc takes a port that is free.",
    "sendLoadingState": "It is the host's: `loading_events = true` below [gateway] in gpusvc.toml.",
    "includeAliasesInList": "The gateway always lists aliases.",
    "apiKeys": "gpusvc stores hashes of keys only: `gpusvc key add NAME` makes a key.",
    "peers": "The gateway serves the models of this machine only; for several machines see docs/fleet.md.",
    "store": "The journal keeps the events: `gpusvc events`.",
    "ui": "The status page has no settings.",
    "performance": "See `gpusvc gpus` and the metrics of the gateway.",
    "profiles": "A name that changes its model has no counterpart; an alias is permanent.",
    "upstream": "A request to /upstream always counts as a use.",
}

# Keys of a model without a counterpart in its file.
_LOST = {
    "unlisted": "The gateway lists every model.",
    "metadata": "The gateway's list of models has no such field.",
    "capabilities": "The gateway's list of models does not show them; the engine does.",
    "sendLoadingState": "It is the host's: `loading_events = true` below [gateway] in gpusvc.toml.",
    "timeouts": "Connections to an engine are local. `upstream_timeout` below [gateway] bounds its silence.",
}

_CONTAINER = (
    "A daemon runs the container, outside the model's control group: gpusvc can neither restrict it to its GPUs nor "
    "prove its end, and the model never becomes ready. Name the engine itself, or a runtime that starts the processes "
    "below itself, such as `podman run --cgroups=disabled`."
)


class _Source(NamedTuple):
    """What all models of a configuration have in common."""

    name: str  # for people
    place: Path  # of the file
    macros: Macros
    there: places.Exists


def convert(
    document: object, source: str, environment: Mapping[str, str], there: places.Exists = places.exists
) -> Import:
    """Return the models of a configuration.

    Args:
        document: the content of the YAML file.
        source: its path.
        environment: for its ``${env.NAME}``.
        there: whether a file exists.

    Raises:
        ConfigError: it is not a configuration of llama-swap.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("models"), Mapping):
        raise ConfigError(f"{source} has no models.", hint="A llama-swap configuration has a mapping of that name.")
    notes = Notes()
    shared = document.get("macros")
    macros = Macros(environment, shared if isinstance(shared, Mapping) else {})
    whole = Foreign(_expanded(document, macros, source), notes, None)
    whole.table("macros")
    listed = whole.table("models")
    if len(listed.names()) > _MOST_MODELS:
        raise ConfigError(f"{source} has more than {_MOST_MODELS} models.")
    about = _Source(source, Path(source), macros, there)
    naming = Naming()
    models: dict[str, Draft] = {}
    for identifier in listed.names():
        name = naming.name(identifier)
        draft = _Model(identifier, name, listed.value(identifier), notes, about).convert()
        if draft is not None:
            models[identifier] = draft
    _apply_defaults(whole, models)
    swap_rules.apply(whole, models)
    _apply_preload(whole.table("hooks"), models)
    whole.drop(_ELSEWHERE)
    whole.finish()
    if any(draft.get("gpu.count") is None for draft in models.values()):
        whole.note("models", "With llama-swap an engine sees every GPU; here a model gets one, or `count` below [gpu].")
    return finish(models.values(), notes)


def _expanded(document: Mapping[object, object], macros: Macros, source: str) -> dict[object, object]:
    """Return the configuration with its macros expanded, except in the models, which have macros of their own."""
    kept = ("models", "macros")
    try:
        return {key: value if key in kept else macros.expand_value(value) for key, value in document.items()}
    except ValueError as error:
        raise ConfigError(f"{source} cannot be read: {error}.") from error


# -- one model --------------------------------------------------------------------------------------------------------


class _Model:
    """One model of a configuration."""

    def __init__(self, identifier: str, name: str, document: object, notes: Notes, source: _Source) -> None:
        self._id = identifier
        self._source = source
        self._draft = Draft(name, f"Imported from {source.name}, where it is called {identifier!r}.")
        said = document if isinstance(document, Mapping) else {}
        own = said.get("macros")
        first = {"MODEL_ID": identifier, "PORT": PORT}
        self._macros = source.macros.with_more(own if isinstance(own, Mapping) else {}, first)
        # Foreign notes a document that is not a mapping.
        self._fields = Foreign(said if isinstance(document, Mapping) else document, notes, name, "")
        self._aliases = [identifier]

    def convert(self) -> Draft | None:
        """Return the draft; None, and a note, if the model has no command."""
        draft = self._draft
        try:
            self._fields = self._expanded()
            command = self._command()
        except ValueError as error:
            self._fields.note("cmd", f"It cannot be split into words: {error}. The model is left out.")
            return None
        if not command:
            self._fields.note("cmd", "It is missing. The model is left out.")
            return None
        fields = self._fields
        self._put_command(command)
        self._put_names()
        self._put_port(command)
        self._put_times()
        check = fields.text("checkEndpoint") or "/health"
        draft.put("health", None if check == "/health" else "" if check == "none" else check)
        draft.put("concurrency", fields.count("concurrencyLimit") or None)
        self._put_filters(fields.table("filters"))
        fields.drop(_LOST)
        fields.finish()
        draft.extend("aliases", self._aliases)
        return draft

    def _expanded(self) -> Foreign:
        """Return all keys with their macros expanded. Values with an unknown macro are noted and left out."""
        fields = self._fields
        kept: dict[str, object] = {}
        for key in fields.names():
            value = fields.value(key)
            if key in ("cmd", "cmdStop") and isinstance(value, str):
                value = shell.without_comments(value)
            if key == "macros":
                continue
            value = self._macros.expand_value(value)
            kept[key] = value if key in ("cmd", "cmdStop", *_LOST) else self._without_unknown(key, value)
        return Foreign(kept, fields.notes, fields.model, "")

    def _without_unknown(self, key: str, value: object) -> object:
        """Return the value without the parts that still have macros."""
        if isinstance(value, list):
            return [item for item in value if not self._note_unknown(key, item)]
        if isinstance(value, Mapping):
            return {
                name: self._without_unknown(f"{key}.{name}", item)
                for name, item in value.items()
                if not self._note_unknown(key, name)
            }
        return None if self._note_unknown(key, value) else value

    def _note_unknown(self, key: str, value: object) -> bool:
        found = unknown_in(value)
        for macro in found:
            self._fields.note(key, f"{_what_is_wrong_with(macro)}: {macro}. Left out.")
        return bool(found)

    def _command(self) -> list[str]:
        words, open_quote = shell.split(shell.without_comments(self._fields.text("cmd") or ""))
        if open_quote:
            reason = "A quotation mark is not closed. The quotation ends with the command, as in llama-swap."
            self._fields.note("cmd", reason)
        return words

    def _put_command(self, command: list[str]) -> None:
        draft, fields = self._draft, self._fields
        for macro in unknown(" ".join(command)):
            what = _what_is_wrong_with(macro)
            fields.note("cmd", f"{what}: {macro} stays as it is. Correct it with `gpusvc edit {draft.name}`.")
        env = self._environment()
        reports: list[gpu_options.Report] = []
        settled = gpu_options.settle(draft, command, env, reports)
        for report in reports:
            fields.note(f"env.{report.subject}" if report.subject in env else "cmd", _sentence(report, env))
        stop = shell.split(fields.text("cmdStop") or "").words
        if commandline.is_container(command) or commandline.is_container(stop):
            fields.note("cmd", _CONTAINER)
            draft.put("command", settled)
            return
        if stop:
            fields.note(
                "cmdStop", "gpusvc stops a model by SIGTERM to its control group, then SIGKILL, then the proof."
            )
        draft.put("command", self._placed(settled))

    def _environment(self) -> dict[str, str]:
        env: dict[str, str] = {}
        for entry in self._fields.texts("env"):
            variable, equals, value = entry.partition("=")
            if not equals:
                self._fields.note("env", f"{entry!r} has no '='. Left out.")
            elif PORT in value and variable != "PORT":
                self._fields.note(
                    "env", f"{variable}: only a command can contain the port; engines have it in $PORT. Left out."
                )
            else:
                env[variable] = value
        return env

    def _placed(self, command: list[str]) -> list[str]:
        """Return the command, after putting the directory of its relative paths, or a note on them."""
        relative = commandline.relative_paths(command)
        if not relative:
            return command
        listed = ", ".join(relative[:5])
        base = places.directory_of(relative, self._source.place, self._source.there)
        if base is None:
            reason = (
                f"{listed}: relative to the directory of llama-swap. Set working_directory, or write absolute paths."
            )
            self._fields.note("cmd", reason)
            return command
        self._draft.put("working_directory", str(base))
        self._fields.note(
            "cmd", f"{listed}: relative to the directory in which llama-swap was started. gpusvc takes {base}."
        )
        # A program is found by its absolute path, or in PATH.
        return [str(base / command[0]), *command[1:]] if command[0] in relative else command

    def _put_names(self) -> None:
        fields = self._fields
        title, text = fields.text("name"), fields.text("description")
        said = " ".join(f"{title}: {text}".split() if title and text else (title or text or "").split())
        description = "".join(character for character in said if character.isprintable())
        if description != said:
            fields.note("name" if title else "description", "Its characters that cannot be printed are left out.")
        self._draft.put("description", description or None)
        self._draft.put("served_name", fields.text("useModelName") or None)
        aliases = fields.value("aliases")
        for alias in aliases if isinstance(aliases, list) else [] if aliases is None else [aliases]:
            if isinstance(alias, Mapping):
                self._aliases.append(str(alias.get("id", "")))
                if alias.get("unlisted") or alias.get("name") not in (None, alias.get("id")):
                    fields.note("aliases", f"The gateway lists {alias.get('id')!r}, under this name only.")
            elif isinstance(alias, str | int | float):
                self._aliases.append(str(alias))
        self._aliases = [alias for alias in self._aliases if alias]

    def _put_port(self, command: list[str]) -> None:
        """Put the port to which llama-swap sends requests, else the port that the command names."""
        said = self._fields.text("proxy") or ""
        has_placeholder = any(PORT in argument for argument in command)
        parts, port = _split_url("" if PORT in said else said)
        if parts.hostname and not _LOOPBACK.fullmatch(parts.hostname):
            self._fields.note(
                "proxy", f"{parts.hostname} may be another machine; gpusvc sends requests to the engine on this one."
            )
        url = _urlsplit(said.replace(PORT, "1"))
        if url is not None and (url.path.strip("/") or url.scheme == "https"):
            self._fields.note("proxy", "gpusvc sends requests to the engine by plain HTTP, with the client's own path.")
        if port is not None:
            self._draft.put("port", port)
            if has_placeholder:
                reason = (
                    f"It has {PORT} too, which is {port} here. Give another port to programs that do not listen there."
                )
                self._fields.note("cmd", reason)
        elif not has_placeholder:
            self._draft.put("port", commandline.fixed_port(command))
            if self._draft.get("port") is None:
                self._fields.note(
                    "cmd", f"It names no port. Write {PORT} in it, unless the engine takes its port from $PORT."
                )

    def _put_times(self) -> None:
        ttl = self._fields.number("ttl")
        if ttl is not None and ttl >= 0:
            _put_ttl(self._draft, ttl)
        self._draft.put("stop_timeout", _seconds(self._fields.count("unloadTimeout")))

    def _put_filters(self, filters: Foreign) -> None:
        # The second is an older spelling, which llama-swap still accepts.
        stripped = ",".join(filters.text(key) or "" for key in ("stripParams", "strip_params")).split(",")
        members = {member.strip() for member in stripped} - {"", "model"}
        self._draft.put("filter.strip", sorted(members))
        values = filters.value("setParams")
        kept, lost = without_nulls(values if isinstance(values, Mapping) else {})
        kept.pop("model", None)
        self._draft.put("filter.set", kept)
        for member in lost:
            filters.note(f"setParams.{member}", "A member cannot be set to null: TOML has no null.")
        by_name = filters.table("setParamsByID")
        for alias in by_name.names():
            by_name.value(alias)
            if alias not in self._aliases:
                self._aliases.append(alias)
            reason = "It became an alias without settings: [filter] applies to all names of a model."
            by_name.note(alias, reason)
        filters.finish()


def _what_is_wrong_with(macro: str) -> str:
    return "The environment has no such variable" if macro.startswith("${env.") else "No such macro is defined"


def _sentence(report: gpu_options.Report, env: Mapping[str, str]) -> str:
    """Return the reason, with its subject if the note's key does not name it."""
    return report.reason if report.subject in env else f"{report.subject}: {report.reason}"


def _urlsplit(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _split_url(url: str) -> tuple[SplitResult, int | None]:
    """Return the parts of a URL and its port; empty parts for other texts."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        return urlsplit(""), None


def _put_ttl(draft: Draft, ttl: float) -> None:
    """Put the idle timeout; for llama-swap 0 means never."""
    draft.put("idle_timeout", _seconds(ttl))
    draft.put("keep", None if ttl else True)


def _seconds(value: float | None) -> str | None:
    return f"{value:g}s" if value else None


# -- defaults for all models ------------------------------------------------------------------------------------------


def _apply_defaults(whole: Foreign, models: Mapping[str, Draft]) -> None:
    """Put the values of the whole configuration into each model that has none of its own."""
    ttl, patience, stop = whole.number("globalTTL"), whole.number("healthCheckTimeout"), whole.number("unloadTimeout")
    for draft in models.values():
        if ttl is not None and ttl >= 0 and draft.get("idle_timeout") is None and not draft.get("keep"):
            _put_ttl(draft, ttl)
        if draft.get("stop_timeout") is None:
            draft.put("stop_timeout", _seconds(stop))
        draft.put("start_timeout", None if patience is None else _seconds(max(patience, 15)))
    if patience is not None:
        whole.note("healthCheckTimeout", "It became start_timeout, which limits the time without progress.")
    if ttl is None and any(draft.get("idle_timeout") is None for draft in models.values()):
        whole.note("globalTTL", "It is absent: llama-swap never unloads then. Here the host's idle_timeout applies.")


def _apply_preload(hooks: Foreign, models: Mapping[str, Draft]) -> None:
    startup = hooks.table("on_startup")
    owners: dict[str, Draft] = {}
    for identifier, draft in models.items():
        aliases = draft.get("aliases")
        for alias in [identifier, *(aliases if isinstance(aliases, list) else [])]:
            owners.setdefault(alias, draft)
    for name in startup.texts("preload"):
        if name in owners:
            owners[name].put("preload", True)
        else:
            startup.note("preload", f"There is no model {name!r}.")
    startup.finish()
    hooks.finish()
