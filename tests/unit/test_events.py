"""Events as values: into the journal's protocol, out of its JSON, and on to hooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.hooks.directory import is_hook_name
from gpusvc.hooks.unit import environment
from gpusvc.journal.eventlog import Event, command, is_cursor, parse
from gpusvc.journal.events import MESSAGE_IDS, EventType, encode

ROOT = Path(__file__).parents[2]

ENTRY = {
    "__CURSOR": "s=0a;i=1",
    "__REALTIME_TIMESTAMP": "1795225900066668",
    "MESSAGE": "Ready.",
    "PRIORITY": "6",
    "GPUSVC_EVENT": "ready",
    "GPUSVC_MODEL": "qwen",
}


def decode(entry: bytes) -> list[tuple[str, str]]:
    """What journald makes of a datagram of its native protocol."""
    fields = []
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(entry[:8], "little")
            value, entry = entry[8 : 8 + length], entry[8 + length :]
            assert entry[:1] == b"\n"
            entry = entry[1:]
        fields.append((name.decode(), value.decode()))
    return fields


def of(**changed: Any) -> Event | None:
    return parse(json.dumps(ENTRY | changed))


def event(**changed: Any) -> Event:
    found = of(**changed)
    assert found is not None
    return found


# ---- kinds ----


def test_each_kind_has_a_message_id_of_its_own() -> None:
    assert set(MESSAGE_IDS) == set(EventType)
    assert len(set(MESSAGE_IDS.values())) == len(EventType)
    assert all(re.fullmatch("[0-9a-f]{32}", message_id) for message_id in MESSAGE_IDS.values())


def test_the_catalog_explains_every_kind_and_nothing_else() -> None:
    text = (ROOT / "packaging/gpusvc.catalog").read_text()
    entry = re.compile(r"^-- ([0-9a-f]{32})\nSubject: .+\nDefined-By: gpusvc\nDocumentation: .+\n\n\S", re.MULTILINE)
    assert sorted(entry.findall(text)) == sorted(MESSAGE_IDS.values())


def test_the_catalog_speaks_only_of_fields_that_events_have() -> None:
    text = (ROOT / "packaging/gpusvc.catalog").read_text()
    assert set(re.findall("@([^@\n]*)@", text)) == {"GPUSVC_MODEL", "GPUSVC_GPU"}


def test_the_manual_lists_every_kind() -> None:
    section = (ROOT / "docs/man/gpusvc-hooks.7").read_text().split(".SH EVENTS")[1].split(".SH")[0]
    assert re.findall(r"^\.TP\n\.B (\w+)$", section, re.MULTILINE) == list(EventType)


def test_the_manual_lists_every_variable_of_a_hook() -> None:
    manual = (ROOT / "docs/man/gpusvc-hooks.7").read_text()
    assert re.findall(r"^\.B (GPUSVC_\w+)$", manual, re.MULTILINE) == list(environment({}, event()))


# ---- into the journal ----


@given(st.lists(st.tuples(st.from_regex("[A-Z][A-Z_]{0,9}", fullmatch=True), st.text(max_size=200))))
def test_the_journal_reads_what_was_written(fields: list[tuple[str, str]]) -> None:
    assert decode(encode(fields)) == fields


def test_a_value_cannot_forge_another_field() -> None:
    assert decode(encode([("MESSAGE", "x\nGPUSVC_MODEL=other")])) == [("MESSAGE", "x\nGPUSVC_MODEL=other")]


def test_a_long_value_is_cut_between_characters() -> None:
    [(_, value)] = decode(encode([("MESSAGE", "x" + "é" * 100_000)]))
    assert value == "x" + "é" * 16383


def test_what_is_no_text_is_written_all_the_same() -> None:
    assert decode(encode([("MESSAGE", "bad \udc80 byte")])) == [("MESSAGE", "bad ? byte")]


# ---- out of the journal ----


def test_an_event_is_read_with_all_its_parts() -> None:
    read = of(GPUSVC_GPU=["0", "1"], GPUSVC_BYTES="9663676416", GPUSVC_REASON="room for b", PRIORITY="4")
    assert read == Event(
        kind="ready",
        seconds=1795225900.066668,
        message="Ready.",
        cursor="s=0a;i=1",
        model="qwen",
        gpus=(0, 1),
        bytes=9663676416,
        reason="room for b",
        level=4,
    )


def test_what_an_event_was_not_told_is_unknown() -> None:
    read = event(GPUSVC_MODEL=None, PRIORITY=None)
    assert (read.model, read.gpus, read.bytes, read.reason, read.level) == (None, (), None, None, 6)
    assert str(read) == "ready"
    assert str(event()) == "ready of qwen"


def test_one_gpu_is_a_gpu() -> None:
    assert event(GPUSVC_GPU="3").gpus == (3,)


def test_a_value_that_is_not_printable_comes_as_bytes() -> None:
    assert event(MESSAGE=list("tab\x01é".encode())).message == "tab\x01é"


def test_events_of_a_newer_gpusvc_are_events() -> None:
    assert event(GPUSVC_EVENT="levitate").kind == "levitate"


@pytest.mark.parametrize(
    "line",
    ["", "-- No entries --", "[]", "{}", "{", json.dumps(ENTRY | {"GPUSVC_BYTES": "many"}), b"\xff"],
)
def test_a_line_without_an_event_is_none(line: str | bytes) -> None:
    assert parse(line) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*sorted(ENTRY), "GPUSVC_GPU", "GPUSVC_BYTES"]), _JSON))
def test_no_entry_of_a_journal_is_an_error(changed: dict[str, Any]) -> None:
    parse(json.dumps(ENTRY | changed))


def test_only_root_and_gpusvc_are_believed() -> None:
    *_, alternatives = " ".join(command(model="qwen")).partition("--no-pager ")
    for group in alternatives.split(" + "):
        matches = group.split(" ")
        assert {f"MESSAGE_ID={message_id}" for message_id in MESSAGE_IDS.values()} < set(matches)
        assert "GPUSVC_MODEL=qwen" in matches
        assert matches[-1].startswith(("_UID=0", "_SYSTEMD_UNIT=gpusvc-"))


def test_options_come_before_matches() -> None:
    asked = command("--follow")
    assert asked.index("--follow") < min(number for number, word in enumerate(asked) if word.startswith("MESSAGE_ID="))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("s=77a20f724db64e4c8323636d3e90b984;i=4ce;b=a5de;m=b4ed9b49;t=660bf9303e4fe;x=3bad", True),
        ("", False),
        ("garbage", False),
        ("s=1\n", False),
        ("--file=/etc/shadow", False),
    ],
)
def test_a_cursor_looks_like_one(text: str, answer: bool) -> None:
    assert is_cursor(text) is answer


# ---- on to hooks ----


def test_a_hook_is_told_everything_and_nothing_is_missing() -> None:
    told = environment({}, event(GPUSVC_GPU=["0", "1"], GPUSVC_BYTES="5"))
    assert told == {
        "GPUSVC_EVENT": "ready",
        "GPUSVC_MODEL": "qwen",
        "GPUSVC_GPU": "0,1",
        "GPUSVC_BYTES": "5",
        "GPUSVC_REASON": "",
        "GPUSVC_MESSAGE": "Ready.",
        "GPUSVC_PRIORITY": "6",
        "GPUSVC_TIME": "1795225900.066668",
    }


def test_a_hook_inherits_what_is_not_between_systemd_and_its_daemon() -> None:
    inherited = {"PATH": "/bin", "NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1", "LISTEN_FDS": "1", "GPUSVC_EVENT": "old"}
    told = environment(inherited, event())
    assert told["PATH"] == "/bin"
    assert told["GPUSVC_EVENT"] == "ready"
    assert not told.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"}


def test_no_value_is_more_than_an_environment_holds() -> None:
    assert "\0" not in environment({}, event(MESSAGE="a\0b"))["GPUSVC_MESSAGE"]


@pytest.mark.parametrize("name", ["notify", "10-notify", "notify.sh", "Notify_2.py"])
def test_a_plain_name_is_a_hooks(name: str) -> None:
    assert is_hook_name(name)


@pytest.mark.parametrize(
    "name", [".hidden", "notify~", "#notify#", "notify.dpkg-old", "notify.rpmsave", "notify.bak", "a.swp", "a b", ""]
)
def test_what_an_editor_leaves_is_no_hook(name: str) -> None:
    assert not is_hook_name(name)
