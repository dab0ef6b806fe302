"""llama-swap's configuration (its config.example.yaml and config-schema.json) as model files.

Its rules of who may run beside whom, ``groups`` and ``matrix``, become ``exclusive``. Where there are none it runs one
model at a time, for want of a way to know better; that is not carried over, as gpusvc measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from urllib.parse import urlsplit

from gpusvc import names
from gpusvc.config.model import MAX_PRIORITY
from gpusvc.config.presets import PORT
from gpusvc.errors import ConfigError
from gpusvc.importing import commandline, exclusion, matrix
from gpusvc.importing.draft import Draft, Import, Notes, finish, without_nulls
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.macros import Macros, unknown
from gpusvc.importing.naming import Naming

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}

# Keys of the whole that no model file has, and where what they say belongs.
_ELSEWHERE = {
    "logLevel": "gpusvc writes to the journal; `journalctl -p` filters it.",
    "logTimeFormat": "The journal has the times.",
    "logToStdout": "Everything is in the journal: `gpusvc logs NAME`.",
    "metricsMaxInMemory": "Metrics are counters, which take no more room with time.",
    "captureBuffer": "Requests and answers are not kept.",
    "startPort": "gpusvc takes a port that is free.",
    "sendLoadingState": "It is the host's: `loading_events = true` below [gateway] in gpusvc.toml.",
    "includeAliasesInList": "The gateway always lists aliases.",
    "apiKeys": "Keys are not kept in clear here: `gpusvc key add NAME` makes one.",
    "peers": "The gateway serves this machine's models only; docs/fleet.md has several machines behind one address.",
    "store": "The journal keeps what happened: `gpusvc events`.",
    "ui": "The status page has no settings.",
    "performance": "`gpusvc gpus`, and the metrics of the gateway, have that.",
    "profiles": "Names that mean another model from time to time have no counterpart; aliases are for good.",
    "upstream": "A request to /upstream always counts as use.",
}

# Keys of a model that its file has no counterpart for.
_LOST = {
    "unlisted": "The gateway lists every model.",
    "metadata": "The gateway's list of models has no fields of one's own.",
    "capabilities": "The gateway's list of models does not tell; the engine does.",
    "sendLoadingState": "It is the host's: `loading_events = true` below [gateway] in gpusvc.toml.",
    "timeouts": "Connections to an engine are local. `upstream_timeout` below [gateway] bounds its silence.",
}


@dataclass(slots=True)
class _Model:
    """A model of llama-swap's, its draft, and what the rules for all have to know of it."""

    id: str
    draft: Draft
    macros: Macros
    aliases: list[str] = field(default_factory=list)


def convert(document: object, source: str, environment: Mapping[str, str]) -> Import:
    """The models of a configuration.

    Args:
        document: what the YAML file holds.
        source: its name, for people.
        environment: for its ``${env.NAME}``.

    Raises:
        ConfigError: it is no configuration of llama-swap.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("models"), Mapping):
        raise ConfigError(f"{source} has no models.", hint="A llama-swap configuration has a mapping of that name.")
    notes = Notes()
    whole = Foreign(document, notes, None)
    macros = Macros(environment, _texts(whole.table("macros")))
    naming = Naming()
    listed = whole.table("models")
    models: dict[str, _Model] = {}
    for identifier in listed.names():
        fields = Foreign(listed.value(identifier), notes, naming.name(identifier), "")
        model = _convert_model(identifier, fields, macros, source)
        if model is not None:
            models[identifier] = model
    _apply_defaults(whole, models)
    _apply_rules(whole, models, notes)
    _apply_preload(whole.table("hooks"), models)
    whole.drop(_ELSEWHERE)
    whole.finish()
    _note_gpus(models, notes)
    return finish((model.draft for model in models.values()), notes)


# -- one model --------------------------------------------------------------------------------------------------------


def _convert_model(identifier: str, fields: Foreign, macros: Macros, source: str) -> _Model | None:
    """None, and a note, if it has no command."""
    name = fields.model
    assert name is not None  # noqa: S101 - convert() named it
    draft = Draft(name, f"Imported from {source}, where it is called {identifier!r}.")
    # Those that everybody may refer to come first.
    own = Macros(environment=macros.environment, texts={"MODEL_ID": identifier, "PORT": PORT})
    own = own.with_more(macros.texts).with_more(_texts(fields.table("macros")))
    try:
        command = commandline.split(own.expand(fields.text("cmd") or ""))
    except ValueError as error:
        fields.note("cmd", f"It cannot be taken apart: {error}. The model is left out.")
        return None
    if not command:
        fields.note("cmd", "It is missing, and so the model is left out.")
        return None
    model = _Model(identifier, draft, own, [identifier])
    _put_command(draft, command, fields)
    _put_names(model, fields)
    _put_port(draft, own.expand(fields.text("proxy") or ""), command, fields)
    _put_times(draft, fields)
    check = own.expand(fields.text("checkEndpoint") or "/health")
    draft.put("health", None if check == "/health" else "" if check == "none" else check)
    draft.put("concurrency", fields.count("concurrencyLimit") or None)
    _put_filters(model, fields.table("filters"))
    if fields.text("cmdStop"):
        fields.note("cmdStop", "A stop is a SIGTERM to the whole control group, then SIGKILL, then the proof.")
    fields.drop(_LOST)
    fields.finish()
    draft.extend("aliases", model.aliases)
    return model


def _put_command(draft: Draft, command: list[str], fields: Foreign) -> None:
    draft.put("command", command)
    for macro in unknown(" ".join(command)):
        what = "The environment has no such variable" if macro.startswith("${env.") else "No such macro is defined"
        fields.note("cmd", f"{what}: {macro} is left as it is. `gpusvc edit {draft.name}` mends it.")
    if commandline.is_container(command):
        fields.note("cmd", commandline.CONTAINER)
    count = commandline.gpus(command)
    draft.put("gpu.count", count if count != 1 else None)
    env: dict[str, str] = {}
    for entry in fields.texts("env"):
        variable, equals, value = entry.partition("=")
        if equals:
            env[variable] = value
        else:
            fields.note("env", f"{entry!r} has no '=': left out.")
    commandline.put_environment(draft, env, fields.notes, "env")


def _put_names(model: _Model, fields: Foreign) -> None:
    title, text = fields.text("name"), " ".join((fields.text("description") or "").split())
    description = f"{title}: {text}" if title and text else title or text
    model.draft.put("description", description if description and description.isprintable() else None)
    model.draft.put("served_name", fields.text("useModelName") or None)
    aliases = fields.value("aliases")
    for alias in aliases if isinstance(aliases, list) else []:
        if isinstance(alias, Mapping):
            model.aliases.append(str(alias.get("id", "")))
            if alias.get("unlisted") or alias.get("name") not in (None, alias.get("id")):
                fields.note("aliases", f"{alias.get('id')!r} is listed by the gateway, under no other name.")
        else:
            model.aliases.append(str(alias))
    model.aliases = [alias for alias in model.aliases if alias]


def _put_port(draft: Draft, proxy: str, command: list[str], fields: Foreign) -> None:
    """The port that the command names; else the one that llama-swap sends requests to."""
    if any(PORT in argument for argument in command):
        return
    try:
        parts = urlsplit(proxy)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    draft.put("port", commandline.fixed_port(command) or port)
    if draft.get("port") is None:
        fields.note("cmd", f"It names no port. Where the engine does not go by $PORT, say {PORT} in it.")
    if parts.hostname and parts.hostname not in _LOOPBACK:
        fields.note("proxy", f"{parts.hostname} may be another machine; gpusvc asks the engine on this one.")
    if parts.path.strip("/") or parts.scheme == "https":
        fields.note("proxy", "gpusvc asks the engine by plain HTTP, with the path that the client gave.")


def _put_times(draft: Draft, fields: Foreign) -> None:
    ttl = fields.number("ttl")
    if ttl is not None and ttl >= 0:
        _put_ttl(draft, ttl)
    draft.put("stop_timeout", _seconds(fields.count("unloadTimeout")))


def _put_ttl(draft: Draft, ttl: float) -> None:
    """0 was never."""
    draft.put("idle_timeout", _seconds(ttl))
    draft.put("keep", None if ttl else True)


def _seconds(value: float | None) -> str | None:
    return f"{value:g}s" if value else None


def _put_filters(model: _Model, filters: Foreign) -> None:
    stripped = model.macros.expand(filters.text("stripParams") or "").split(",")
    members = dict.fromkeys(member.strip() for member in stripped if member.strip() not in ("", "model"))
    model.draft.put("filter.strip", list(members))
    values = filters.value("setParams")
    kept, lost = without_nulls(values if isinstance(values, Mapping) else {})
    kept.pop("model", None)
    model.draft.put("filter.set", kept)
    for member in lost:
        filters.note(f"setParams.{member}", "A member cannot be set to null: TOML has none.")
    by_name = filters.table("setParamsByID")
    for key in by_name.names():
        by_name.value(key)
        alias = model.macros.expand(key)
        if alias not in model.aliases:
            model.aliases.append(alias)
        by_name.note(key, f"{alias!r} is an alias that sets nothing: [filter] holds for all names of a model.")
    filters.finish()


# -- rules for all ----------------------------------------------------------------------------------------------------


def _apply_defaults(whole: Foreign, models: Mapping[str, _Model]) -> None:
    """What the whole says for each model that does not say it itself."""
    ttl, patience, stop = whole.number("globalTTL"), whole.number("healthCheckTimeout"), whole.number("unloadTimeout")
    for model in models.values():
        if ttl is not None and ttl >= 0 and model.draft.get("idle_timeout") is None and not model.draft.get("keep"):
            _put_ttl(model.draft, ttl)
        if model.draft.get("stop_timeout") is None:
            model.draft.put("stop_timeout", _seconds(stop))
        model.draft.put("start_timeout", None if patience is None else _seconds(max(patience, 15)))
    if patience is not None:
        whole.note("healthCheckTimeout", "It became start_timeout, which is the time without any progress.")
    if ttl is None and any(model.draft.get("idle_timeout") is None for model in models.values()):
        whole.note("globalTTL", "It is not said: llama-swap never unloads then. Here idle_timeout of the host holds.")


def _apply_preload(hooks: Foreign, models: Mapping[str, _Model]) -> None:
    startup = hooks.table("on_startup")
    owners = {alias: model for model in models.values() for alias in model.aliases}
    for name in startup.texts("preload"):
        if name in owners:
            owners[name].draft.put("preload", True)
        else:
            startup.note("preload", f"There is no model {name!r}.")
    startup.finish()
    hooks.finish()


def _apply_rules(whole: Foreign, models: Mapping[str, _Model], notes: Notes) -> None:
    """groups, or else matrix, at the top or below routing."""
    routing = whole.table("routing")
    settings = _router(routing)
    groups = whole.table("groups") if whole.has("groups") else settings.table("groups")
    rules = whole.table("matrix") if whole.has("matrix") else settings.table("matrix")
    whole.value("groups"), whole.value("matrix")
    if groups.names():
        excluded = _excluded_by_groups(groups, models)
    elif rules.names():
        excluded = _excluded_by_matrix(rules, models)
    else:
        if len(models) > 1:
            reason = "There are none: llama-swap ran one model at a time. Here those run side by side that find room;"
            notes.add(None, "groups", f"{reason} `max_active = 1` in gpusvc.toml is the old rule.")
        return
    for number, members in enumerate(exclusion.groups(list(models), excluded), start=1):
        for member in members:
            models[member].draft.extend("exclusive", [_group_name(groups, members, number)])


def _router(routing: Foreign) -> Foreign:
    router = routing.table("router")
    router.value("use")
    scheduler = routing.table("scheduler")
    if scheduler.names():
        routing.note("scheduler", "Who waits is served in turn; `priority` of a model here is about eviction.")
    settings = router.table("settings")
    routing.finish()
    return settings


def _group_name(groups: Foreign, members: tuple[str, ...], number: int) -> str:
    """That of a group of llama-swap with just these members; groups of gpusvc are named as models are."""
    for name in groups.names():
        group = groups.value(name)
        listed = group.get("members") if isinstance(group, Mapping) else None
        if isinstance(listed, list) and set(members) == set(map(str, listed)) and names.is_name(name):
            return name
    return f"swap-{number}"


@dataclass(frozen=True, slots=True)
class _Group:
    members: tuple[str, ...]
    swap: bool = True
    exclusive: bool = True
    persistent: bool = False

    def ends(self, other: _Group) -> bool:
        """Whether a model of this one that starts ends those of the other."""
        return self.exclusive and not other.persistent


def _excluded_by_groups(listed: Foreign, models: Mapping[str, _Model]) -> set[exclusion.Pair]:
    groups: list[_Group] = []
    for name in listed.names():
        fields = listed.table(name)
        members = [member for member in fields.texts("members") if member in models]
        flags = {key: fields.truth(key) for key in ("swap", "exclusive", "persistent")}
        groups.append(_Group(tuple(members), **{key: flag for key, flag in flags.items() if flag is not None}))
        fields.finish()
    # Whoever is in no group is in one that llama-swap makes.
    grouped = {member for group in groups for member in group.members}
    groups.append(_Group(tuple(model for model in models if model not in grouped)))

    excluded: set[exclusion.Pair] = set()
    one_way = False
    for group in groups:
        if group.swap:
            excluded |= exclusion.pairs(group.members)
    for one, other in combinations(groups, 2):
        if one.ends(other) or other.ends(one):
            crossing = {frozenset((a, b)) for a in one.members for b in other.members}
            one_way |= bool(crossing) and one.ends(other) != other.ends(one)
            excluded |= crossing
    if one_way:
        listed.note(
            "exclusive", "There one of two groups ended the other, but not the reverse; here it goes both ways."
        )
    for group in groups:
        for member in group.members if group.persistent else ():
            # It is never evicted. With a ttl of its own it goes when it is idle, which a pinned model never does.
            key, value = ("pinned", True) if models[member].draft.get("idle_timeout") is None else ("priority", 100)
            models[member].draft.put(key, value)
    return excluded


def _excluded_by_matrix(rules: Foreign, models: Mapping[str, _Model]) -> set[exclusion.Pair]:
    variables, sets = _texts(rules.table("vars")), _texts(rules.table("sets"))
    costs = rules.table("evict_costs")
    for short in costs.names():
        cost = costs.count(short)
        if cost is not None and variables.get(short) in models:
            models[variables[short]].draft.put("priority", min(max(cost - 1, 0), MAX_PRIORITY) or None)
    if costs.names():
        rules.note("evict_costs", "They became priority: who has the lowest goes first; costs are not added up.")
    rules.finish()
    try:
        together = matrix.expand(sets, variables)
    except (ValueError, RecursionError) as error:
        rules.note("sets", f"{error} They are left out.")
        return set()
    allowed = {pair for members in together for pair in exclusion.pairs(sorted(members))}
    if any(_is_allowed(trio, allowed) and not any(trio <= some for some in together) for trio in _trios(together)):
        rules.note("sets", "Three that may run together two by two, but not all at once, have no counterpart.")
    return exclusion.pairs(models) - allowed


def _trios(together: list[matrix.Together]) -> list[frozenset[str]]:
    models = sorted({model for members in together for model in members})
    return [frozenset(trio) for trio in combinations(models, 3)] if len(models) <= 100 else []


def _is_allowed(trio: frozenset[str], allowed: set[exclusion.Pair]) -> bool:
    return exclusion.pairs(sorted(trio)) <= allowed


def _note_gpus(models: Mapping[str, _Model], notes: Notes) -> None:
    if any(model.draft.get("gpu.count") is None for model in models.values()):
        notes.add(None, "models", "An engine saw every GPU there; here a model gets one, or `count` below [gpu].")


def _texts(fields: Foreign) -> dict[str, str]:
    """Every key of a mapping as text."""
    return {key: text for key in fields.names() if (text := fields.text(key)) is not None}
