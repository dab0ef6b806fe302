"""llama-swap's rules of which models may run together, ``groups`` and ``matrix``, as ``exclusive``.

Without rules llama-swap runs one model at a time, as it does not know how much VRAM a model takes. The import does not
keep this, because gpusvc measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gpusvc import names
from gpusvc.config.model import MAX_PRIORITY
from gpusvc.importing import exclusion, matrix
from gpusvc.importing.draft import Draft
from gpusvc.importing.foreign import Foreign

# llama-swap never ends a model of a persistent group for another group. This is above the default priority.
_PERSISTENT_PRIORITY = 100

# Limits that keep the work on combinations short.
_MOST_IN_MATRIX = 1000
_MOST_COMPARED = 1_000_000


def apply(whole: Foreign, models: Mapping[str, Draft]) -> None:
    """Put ``exclusive``, ``pinned`` and ``priority`` into the drafts, which are given by model ID."""
    routing = whole.table("routing")
    settings, use = _router(routing)
    top_groups, top_matrix = whole.table("groups"), whole.table("matrix")
    at_the_top = bool(top_groups.names() or top_matrix.names())
    groups = top_groups if at_the_top else settings.table("groups")
    rules = top_matrix if at_the_top else settings.table("matrix")
    if rules.names() and (use == "matrix" or not groups.names()):
        if groups.names():
            whole.note("groups", "router.use is matrix, so the groups do not apply.")
        _apply_matrix(rules, models)
    elif groups.names():
        _Groups(groups, models).apply()
    elif len(models) > 1:
        reason = "There are none: llama-swap runs one model at a time. Here models run side by side if they fit;"
        whole.note("groups", f"{reason} `max_active = 1` in gpusvc.toml keeps the old rule.")


def _router(routing: Foreign) -> tuple[Foreign, str]:
    """Return the settings below routing.router, and the name of the one that applies."""
    router = routing.table("router")
    use = router.text("use") or ""
    scheduler = routing.table("scheduler")
    if scheduler.names():
        routing.note("scheduler", "Waiting requests are served in turn; a model's `priority` is about eviction.")
    settings = router.table("settings")
    routing.finish()
    return settings, use


# -- groups -----------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    title: str
    members: tuple[str, ...]
    swap: bool = True
    exclusive: bool = True
    persistent: bool = False


class _Groups:
    """The groups of a configuration, and the default group that llama-swap makes of all other models."""

    def __init__(self, listed: Foreign, models: Mapping[str, Draft]) -> None:
        self._listed = listed
        self._models = models
        self._titles = _Titles()
        self._groups = self._read()

    def _read(self) -> list[_Group]:
        groups: list[_Group] = []
        grouped: set[str] = set()
        for name in self._listed.names():
            fields = self._listed.table(name)
            said = dict.fromkeys(fields.texts("members"))
            members = tuple(member for member in said if member in self._models and member not in grouped)
            for member in said.keys() - set(members):
                what = "is already in another group" if member in grouped else "is not a model"
                fields.note("members", f"{member!r} {what}. Left out.")
            grouped.update(members)
            flags = {key: fields.truth(key) for key in ("swap", "exclusive", "persistent")}
            said_flags = {key: flag for key, flag in flags.items() if flag is not None}
            groups.append(_Group(self._titles.title(name), members, **said_flags))
            fields.finish()
        rest = tuple(model for model in self._models if model not in grouped)
        return [group for group in (*groups, _Group(self._titles.title("default"), rest)) if group.members]

    def apply(self) -> None:
        """Put one exclusive group between the groups, and one within each group that swaps."""
        self._exclude_each_other()
        for group in self._groups:
            if group.swap and len(group.members) > 1 and not self._swaps_already(group):
                for member in group.members:
                    self._models[member].extend("exclusive", [group.title])
            if group.persistent:
                self._keep(group)

    def _exclude_each_other(self) -> None:
        """Put the exclusive group between groups: an exclusive group ends the models of groups that are not persistent.

        So an exclusive group that is not persistent excludes all groups but those that are persistent and not
        exclusive. Of the others, the exclusive ones exclude those that are not.
        """
        fronts = [group for group in self._groups if group.exclusive and not group.persistent]
        lenient = [group for group in self._groups if not group.exclusive and not group.persistent]
        lasting = [group for group in self._groups if group.exclusive and group.persistent]
        sides = [[group] for group in fronts] + [side for side in (lenient, lasting) if side]
        if len(sides) < 2:
            return
        if (lenient and fronts) or lasting:
            reason = "In llama-swap one of two groups ends the other but not the reverse; here both exclude each other."
            self._listed.note("exclusive", reason)
        name = self._titles.title("swap-1")
        for side in sides:
            alone = len(side) == 1 and (self._swaps_already(side[0]) or len(side[0].members) == 1)
            entry = name if alone else f"{name}/{side[0].title}"
            for member in (member for group in side for member in group.members):
                self._models[member].extend("exclusive", [entry])

    def _swaps_already(self, group: _Group) -> bool:
        """Return whether the exclusive group between groups also separates the members of this group."""
        others = any(other is not group and not (other.persistent and not other.exclusive) for other in self._groups)
        return others and group.swap and group.exclusive and not group.persistent

    def _keep(self, group: _Group) -> None:
        """Pin the models of a persistent group, or raise their priority if they swap or have an idle timeout."""
        swaps = group.swap and len(group.members) > 1
        for member in group.members:
            draft = self._models[member]
            pinned = not swaps and draft.get("idle_timeout") is None
            draft.put(*("pinned", True) if pinned else ("priority", _PERSISTENT_PRIORITY))


class _Titles:
    """Unique names of groups: llama-swap's own names if they are valid here."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def title(self, wanted: str) -> str:
        base = wanted if names.is_name(wanted) else "group"
        title, number = base, 1
        while title in self._given:
            number += 1
            title = f"{base[: names.MAX_LENGTH - 5]}-{number}"
        self._given.add(title)
        return title


# -- the matrix -------------------------------------------------------------------------------------------------------


def _apply_matrix(rules: Foreign, models: Mapping[str, Draft]) -> None:
    variables = _texts(rules.table("vars"))

    def resolve(name: str) -> str | None:
        return next((model for model in (variables.get(name), name) if model in models), None)

    costs = rules.table("evict_costs")
    for short in costs.names():
        cost, model = costs.count(short), resolve(short)
        if cost is not None and model is not None:
            models[model].put("priority", min(max(cost - 1, 0), MAX_PRIORITY) or None)
    if costs.names():
        rules.note(
            "evict_costs", "They became priority: the model with the lowest is evicted first. Costs are not added up."
        )
    sets = _texts(rules.table("sets"))
    rules.finish()
    try:
        together = matrix.expand(sets, resolve)
    except (ValueError, RecursionError) as error:
        what = "They are nested too deeply." if isinstance(error, RecursionError) else str(error)
        rules.note("sets", f"{what} Left out.")
        return
    if len(models) > _MOST_IN_MATRIX:
        rules.note("sets", f"They name more than {_MOST_IN_MATRIX} models. Left out.")
        return
    numbers = {model: number for number, model in enumerate(models)}
    masks = [sum(1 << numbers[model] for model in members) for members in together]
    allowed = [0] * len(models)
    for mask in masks:
        for number in exclusion.members(mask):
            allowed[number] |= mask
    everyone = (1 << len(models)) - 1
    _put_groups(exclusion.groups([everyone & ~(mask | 1 << number) for number, mask in enumerate(allowed)]), models)
    if _has_trio(masks, allowed):
        rules.note("sets", "Three models that may run together in pairs, but not all at once, have no counterpart.")


def _put_groups(groups: Iterable[Sequence[int]], models: Mapping[str, Draft]) -> None:
    listed = list(models)
    for number, sides in enumerate(groups, start=1):
        named = [[listed[model] for model in exclusion.members(side)] for side in sides]
        titles = [str(position) for position in range(1, len(named) + 1)]
        for model, entry in exclusion.entries(f"swap-{number}", named, titles).items():
            models[model].extend("exclusive", [entry])


def _has_trio(masks: Sequence[int], allowed: Sequence[int]) -> bool:
    """Return whether three models may run together in pairs but not all at once. False if it takes too long."""
    pairs = [(one, other) for one, mask in enumerate(allowed) for other in exclusion.members(mask) if other > one]
    if len(pairs) * len(masks) > _MOST_COMPARED:
        return False
    for one, other in pairs:
        both = 1 << one | 1 << other
        covered = 0
        for mask in masks:
            if mask & both == both:
                covered |= mask
        if allowed[one] & allowed[other] & ~both & ~covered:
            return True
    return False


def _texts(fields: Foreign) -> dict[str, str]:
    """Return every key of a mapping with its value as text."""
    return {key: text for key in fields.names() if (text := fields.text(key)) is not None}
