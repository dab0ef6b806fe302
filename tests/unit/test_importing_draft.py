"""Drafts of model files: their text, their names, and foreign mappings taken key by key."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from gpusvc import names
from gpusvc.importing.draft import Draft, Note, Notes, by_kind, finish
from gpusvc.importing.foreign import Foreign
from gpusvc.importing.naming import Naming


def test_a_draft_has_its_keys_in_the_order_of_a_models_file() -> None:
    draft = Draft("qwen", "From elsewhere.")
    draft.put("gpu.count", 2)
    draft.put("pinned", True)
    draft.extend("args", ["-c", "1"])
    draft.put("engine", "vllm")
    assert draft.text() == '# From elsewhere.\nengine = "vllm"\nargs = ["-c", "1"]\npinned = true\n\n[gpu]\ncount = 2\n'


def test_a_draft_leaves_out_what_is_empty() -> None:
    draft = Draft("qwen", "")
    for key in ("aliases", "filter.strip"):
        draft.put(key, [])
    draft.put("env", {})
    draft.put("port", 1)
    draft.put("port", None)
    assert tomllib.loads(draft.text()) == {}


def test_an_alias_belongs_to_whoever_comes_first() -> None:
    notes = Notes()
    drafts = [Draft("a", ""), Draft("b", ""), Draft("c", "")]
    drafts[0].extend("aliases", ["a", "gpt", "gpt", "c"])
    drafts[1].extend("aliases", ["gpt", "b2"])
    found = finish(drafts, notes)
    assert [draft.get("aliases") for draft in found.drafts] == [["gpt"], ["b2"], []]
    assert [(note.model, note.reason) for note in found.notes] == [
        ("a", "'c' already means the model 'c'."),
        ("b", "'gpt' already means the model 'a'."),
    ]


def test_a_name_that_fits_is_kept() -> None:
    assert [Naming().name(name) for name in ("qwen3", "llama3.2:1b", "A_b-c")] == ["qwen3", "llama3.2:1b", "A_b-c"]


def test_a_name_with_slashes_becomes_its_last_part_or_all_of_it_or_gets_a_number() -> None:
    naming = Naming()
    given = [naming.name(name) for name in ("Qwen/Qwen3", "Other/Qwen3", "Other/Qwen3", "Qwen3", "///")]
    assert given == ["Qwen3", "Other-Qwen3", "Other-Qwen3-2", "Qwen3-2", "model"]


@given(st.lists(st.text(), max_size=20))
def test_every_name_is_a_models_and_no_two_are_the_same(foreign: list[str]) -> None:
    naming = Naming()
    given_names = [naming.name(name) for name in foreign]
    assert all(map(names.is_name, given_names))
    assert len(set(given_names)) == len(given_names)


def test_keys_are_read_as_what_they_mean_and_the_rest_is_noted() -> None:
    notes = Notes()
    fields = Foreign(
        {"count": "3", "on": "on", "text": 1.5, "list": ["a", 1], "no": False, "gone": 1, "what": 2, "bad": [1]},
        notes,
        "m",
        "x.",
    )
    assert (fields.count("count"), fields.truth("on"), fields.text("text")) == (3, True, "1.5")
    assert (fields.texts("list"), fields.texts("absent"), fields.text("bad")) == (["a", "1"], [], None)
    fields.drop({"gone": "It is gone.", "no": "Nobody hears of this.", "absent": "Nor of this."})
    fields.finish()
    assert [str(note) for note in notes] == [
        "m: x.bad: It is not text, but [1]. Left out.",
        "m: x.gone: It is gone.",
        "m: x.what: gpusvc does not know this key. Left out.",
    ]


def test_notes_of_one_kind_are_one_line() -> None:
    notes = [Note("a", "cmd", "It is x."), Note(None, "ui", "No."), Note("b", "cmd", "It is x."), Note("b", "k", "Y.")]
    assert by_kind(notes) == ["a, b: cmd: It is x.", "ui: No.", "b: k: Y."]


def test_what_is_no_mapping_has_no_keys() -> None:
    notes = Notes()
    assert Foreign(["a"], notes, None, "models.").names() == []
    assert [note.key for note in notes] == ["models"]


def test_many_models_of_one_name_are_numbered() -> None:
    naming = Naming()
    assert [naming.name("a") for _ in range(5000)][-1] == "a-5000"
