"""llama-swap's groups and matrix as groups of models that exclude each other."""

from __future__ import annotations

import tomllib
from collections import Counter
from itertools import combinations
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.importing import exclusion, llama_swap, matrix, yamlfile
from gpusvc.importing.draft import Import
from gpusvc.placement.request import exclude_each_other


def convert(text: str) -> Import:
    return llama_swap.convert(yamlfile.parse(dedent(text), "config.yaml")[0], "config.yaml", {})


def files(found: Import) -> dict[str, dict[str, Any]]:
    return {draft.name: tomllib.loads(draft.text()) for draft in found.drafts}


def keys_noted(found: Import) -> set[str]:
    return {note.key for note in found.notes}


def test_models_without_rules_are_left_to_vram() -> None:
    found = convert("models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'x ${PORT}'}}")
    assert not any("exclusive" in file for file in files(found).values())
    assert any("max_active" in note.reason for note in found.notes)


def exclusive(rules: str, models: str = "abcde") -> set[str]:
    """Pairs of models that exclude each other, as ``ab``."""
    listed = ", ".join(f"{name}: {{cmd: 'x ${{PORT}}'}}" for name in models)
    made = files(convert(f"models: {{{listed}}}\n{rules}"))
    return {
        one + other
        for one, other in combinations(models, 2)
        if exclude_each_other(frozenset(made[one].get("exclusive", ())), frozenset(made[other].get("exclusive", ())))
    }


def test_groups_that_swap_exclude_their_members() -> None:
    rules = "groups: {g: {members: [a, b], exclusive: false}, h: {members: [c, d, e], exclusive: false}}"
    assert exclusive(rules) == {"ab", "cd", "ce", "de"}


def test_an_exclusive_group_excludes_the_others_and_a_persistent_one_is_spared() -> None:
    rules = """
groups:
  work: {swap: false, exclusive: true, members: [a, b]}
  always: {swap: false, exclusive: false, persistent: true, members: [c]}
"""
    # d and e are in no group, which is one that swaps and excludes.
    assert exclusive(rules) == {"ad", "ae", "bd", "be", "de"}


def test_persistent_models_are_pinned_unless_they_have_a_ttl() -> None:
    rules = "groups: {always: {persistent: true, swap: false, exclusive: false, members: [a, b]}}"
    made = files(convert(f"models: {{a: {{cmd: 'x ${{PORT}}'}}, b: {{cmd: 'x ${{PORT}}', ttl: 5}}}}\n{rules}"))
    assert (made["a"].get("pinned"), made["b"].get("pinned"), made["b"].get("priority")) == (True, None, 100)


def test_a_group_keeps_its_name() -> None:
    made = files(convert("models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'x ${PORT}'}}\ngroups: {big: {members: [a, b]}}"))
    assert made["a"]["exclusive"] == made["b"]["exclusive"] == ["big"]


MATRIX = """
  vars: {A: a, B: b, C: c, D: d}
  evict_costs: {C: 50, D: 1}
  sets: {base: "(A | B) & C", more: "+base & D", alone: "A"}
"""


def test_a_matrix_excludes_all_that_no_set_has_together() -> None:
    assert exclusive(f"matrix:{MATRIX}") == {"ab", "ae", "be", "ce", "de"}


def test_routing_is_where_newer_configurations_have_their_rules() -> None:
    rules = "routing: {router: {use: group, settings: {groups: {g: {members: [a, b], exclusive: false}}}}}"
    assert exclusive(rules, "ab") == {"ab"}


def test_costs_become_priorities() -> None:
    made = files(convert("models: {c: {cmd: 'x ${PORT}'}, d: {cmd: 'x ${PORT}'}}\nmatrix:" + MATRIX))
    assert (made["c"].get("priority"), made["d"].get("priority")) == (49, None)


@pytest.mark.parametrize("wrong", ["A &", "(A", "Z", "A ! B", "+nowhere", "+wrong", "A B", "", "(" * 3000])
def test_a_set_that_makes_no_sense_is_named_and_left_out(wrong: str) -> None:
    found = convert(f"models: {{a: {{cmd: 'x ${{PORT}}'}}}}\nmatrix: {{vars: {{A: a}}, sets: {{wrong: '{wrong}'}}}}")
    assert "matrix.sets" in keys_noted(found)


def test_sets_without_end_are_refused() -> None:
    names = {f"v{number}": f"m{number}" for number in range(40)}
    expression = " & ".join(
        f"({one} | {other})" for one, other in zip(list(names)[::2], list(names)[1::2], strict=True)
    )
    with pytest.raises(ValueError, match="more than"):
        matrix.expand({"all": expression}, names.get)


def test_sets_that_refer_to_each_other_are_read_once() -> None:
    sets = {"s0": "a | b"} | {f"s{number}": f"+s{number - 1} & +s{number - 1}" for number in range(1, 200)}
    assert matrix.expand(sets, {"a": "A", "b": "B"}.get) == [frozenset("A"), frozenset("B"), frozenset("AB")]


PAIRS = st.sets(st.frozensets(st.sampled_from(range(7)), min_size=2, max_size=2))


@given(PAIRS)
def test_groups_say_what_is_excluded_and_nothing_else(pairs: set[frozenset[int]]) -> None:
    excluded = [sum(1 << other for other in range(7) if frozenset((one, other)) in pairs) for one in range(7)]
    made: dict[str, list[str]] = {str(model): [] for model in range(7)}
    for number, sides in enumerate(exclusion.groups(excluded)):
        named = [[str(model) for model in exclusion.members(side)] for side in sides]
        for model, entry in exclusion.entries(
            f"g{number}", named, [f"s{position}" for position in range(7)][: len(named)]
        ).items():
            made[model].append(entry)
    assert pairs == {
        frozenset((one, other))
        for one, other in combinations(range(7), 2)
        if exclude_each_other(frozenset(made[str(one)]), frozenset(made[str(other)]))
    }


FLAGS = st.fixed_dictionaries({"swap": st.booleans(), "exclusive": st.booleans(), "persistent": st.booleans()})


@given(st.lists(st.tuples(FLAGS, st.integers(1, 3)), min_size=1, max_size=5), st.integers(0, 2))
def test_groups_exclude_what_llama_swap_would_end(drawn: list[tuple[dict[str, bool], int]], others: int) -> None:
    """llama-swap ends the models of another group if its own is exclusive and the other is not persistent."""
    listed = [(flags, [f"m{group}-{number}" for number in range(size)]) for group, (flags, size) in enumerate(drawn)]
    models = [model for _, members in listed for model in members] + [f"o{number}" for number in range(others)]
    document = {
        "models": {model: {"cmd": "x ${PORT}"} for model in models},
        "groups": {f"g{number}": {**flags, "members": members} for number, (flags, members) in enumerate(listed)},
    }
    made = files(llama_swap.convert(document, "x", {}))
    group_of = {model: (number, flags) for number, (flags, members) in enumerate(listed) for model in members}
    rest = (-1, {"swap": True, "exclusive": True, "persistent": False})
    for one, other in combinations(models, 2):
        (number, flags), (other_number, other_flags) = group_of.get(one, rest), group_of.get(other, rest)
        if number == other_number:
            expected = flags["swap"]
        else:
            expected = (flags["exclusive"] and not other_flags["persistent"]) or (
                other_flags["exclusive"] and not flags["persistent"]
            )
        entries = (frozenset(made[model].get("exclusive", ())) for model in (one, other))
        assert exclude_each_other(*entries) == expected, (one, other)


def many(groups: int, size: int, flags: str) -> dict[str, Any]:
    models = [f"m{number}" for number in range(groups * size)]
    listed = {f"g{number}": models[number * size : (number + 1) * size] for number in range(groups)}
    return {
        "models": {model: {"cmd": "x ${PORT}"} for model in models},
        "groups": {name: {**dict.fromkeys(flags.split(), False), "members": listed[name]} for name in listed},
    }


@pytest.mark.parametrize("flags", ["", "swap", "swap exclusive", "exclusive"])
def test_models_in_many_groups_are_in_two_groups_at_most(flags: str) -> None:
    made = files(llama_swap.convert(many(20, 20, flags), "x", {}))
    counts = Counter(len(file.get("exclusive", ())) for file in made.values())
    assert len(made) == 400
    assert max(counts) <= 2
    assert len({entry.partition("/")[0] for file in made.values() for entry in file.get("exclusive", ())}) <= 21


def test_a_large_matrix_makes_few_groups() -> None:
    models = [f"m{number}" for number in range(400)]
    sets = {f"s{row}": " & ".join(models[row * 20 : row * 20 + 20]) for row in range(20)}
    document = {"models": {model: {"cmd": "x ${PORT}"} for model in models}, "matrix": {"sets": sets}}
    made = files(llama_swap.convert(document, "x", {}))
    assert {tuple(file["exclusive"]) for file in made.values()} == {(f"swap-1/{side}",) for side in range(1, 21)}


def test_models_of_groups_that_do_not_swap_run_apart_as_sides() -> None:
    rules = """
groups:
  small: {swap: false, exclusive: true, members: [a, b]}
  large: {swap: false, exclusive: true, members: [c, d]}
"""
    assert exclusive(rules, "abcd") == {"ac", "ad", "bc", "bd"}


def test_a_persistent_group_that_swaps_is_not_pinned() -> None:
    rules = "groups: {main: {swap: true, exclusive: false, persistent: true, members: [a, b]}}"
    made = files(
        convert(f"models: {{a: {{cmd: 'x ${{PORT}}'}}, b: {{cmd: 'x ${{PORT}}'}}, c: {{cmd: 'x ${{PORT}}'}}}}\n{rules}")
    )
    assert [made[model].get("pinned") for model in "abc"] == [None, None, None]
    assert [made[model].get("priority") for model in "abc"] == [100, 100, None]
    assert exclusive(rules, "abc") == {"ab"}


def test_a_matrix_takes_the_ids_of_models_and_names_with_dots() -> None:
    document = {
        "models": {name: {"cmd": "x ${PORT}"} for name in ("chat-7b", "coder", "embed.small", "big")},
        "matrix": {
            "evict_costs": {"coder": 30},
            "sets": {"s": "(chat-7b | coder) & embed.small", "t": "big & embed.small"},
        },
    }
    found = llama_swap.convert(document, "x", {})
    made = files(found)
    assert "exclusive" not in made["embed.small"]
    assert {tuple(made[name]["exclusive"]) for name in ("chat-7b", "coder", "big")} == {("swap-1",)}
    assert made["coder"]["priority"] == 29


@pytest.mark.parametrize(("use", "expected"), [("matrix", set()), ("group", {"ab"}), ("", {"ab"})])
def test_the_router_in_use_is_the_one_in_force(use: str, expected: set[str]) -> None:
    settings = "{groups: {one: {swap: true, members: [a, b]}}, matrix: {vars: {x: a, y: b}, sets: {both: 'x & y'}}}"
    assert exclusive(f"routing: {{router: {{use: '{use}', settings: {settings}}}}}", "ab") == expected
