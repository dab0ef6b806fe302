"""The scanner of JSON bodies, held against json.loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.body.fields import MOST_MEMBERS, FieldScanner
from gpusvc.gateway.body.grammar import LONGEST_NAME_BYTES
from gpusvc.gateway.body.search import find_model

# Texts full of what could confuse a scanner of quotes and backslashes.
texts = st.one_of(st.text(st.sampled_from('a"\\{}[]:,é𝄞\n\x00/ '), max_size=12), st.text(max_size=8))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(texts, st.just("model")), inner)),
    max_leaves=12,
)
keys = st.one_of(texts, st.sampled_from(["model", "stream", "messages", "mode", "models"]))

Document = tuple[list[tuple[str, object]], bytes]


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """An object's members, in order and with duplicates, and one of the ways to write it."""
    members = draw(st.lists(st.tuples(keys, values), max_size=6))
    indent = draw(st.sampled_from([None, 1]))
    ascii_only = draw(st.booleans())
    blank = st.text(st.sampled_from(" \t\r\n"), max_size=2)
    parts = [
        draw(blank) + _escaped(key, draw(st.booleans()), ascii_only) + draw(blank) + ":" + draw(blank)
        + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + draw(blank)
        for key, value in members
    ]  # fmt: skip
    text = draw(blank) + "{" + ",".join(parts) + ("" if parts else draw(blank)) + "}" + draw(blank)
    return members, (b"\xef\xbb\xbf" if draw(st.booleans()) else b"") + text.encode()


def _escaped(key: str, fully: bool, ascii_only: bool) -> str:
    if fully and key.isascii():
        return '"' + "".join(f"\\u{ord(char):04X}" for char in key) + '"'
    return json.dumps(key, ensure_ascii=ascii_only)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return (data[start:end] for start, end in pairwise(places))


def scanned(data: bytes, cuts: list[int], *, past_model: bool = True) -> FieldScanner:
    scanner = FieldScanner()
    for piece in pieces(data, cuts):
        scanner.feed(piece, past_model=past_model)
    return scanner


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(documents(), cuts)
def test_every_member_is_found_where_it_stands(document: Document, cuts: list[int]) -> None:
    members, data = document
    scanner = scanned(data, cuts)
    first = next((value for key, value in members if key == "model"), "")
    if not isinstance(first, str):
        assert scanner.problem is not None
        assert '"model"' in scanner.problem
        return
    assert scanner.problem is None
    assert scanner.model == next((value for key, value in members if key == "model"), None)
    assert scanner.stream == next((v for k, v in members if k == "stream" and isinstance(v, bool)), None)
    assert [(member.name, json.loads(data[member.value_start : member.end])) for member in scanner.members] == members
    assert all(data[member.start : member.start + 1] == b'"' for member in scanner.members)
    assert scanner.closed == data.rindex(b"}")
    assert scanner.offset == len(data)


@given(documents(), cuts)
def test_the_quick_way_finds_the_same_or_leaves_it_to_the_scanner(document: Document, cuts: list[int]) -> None:
    _, data = document
    assert find_model(data) in (None, scanned(data, cuts).model)


@given(st.binary(max_size=40) | st.text(st.sampled_from('{}[]",:\\ model1tn'), max_size=40).map(str.encode), cuts)
def test_whatever_comes_is_read_the_same_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    whole, cut = scanned(data, []), scanned(data, cuts)
    assert (whole.model, whole.stream, whole.problem, whole.members, whole.closed, whole.settled) == (
        cut.model, cut.stream, cut.problem, cut.members, cut.closed, cut.settled
    )  # fmt: skip
    assert find_model(data) in (None, whole.model)


@given(documents(), st.integers(0, 10_000), cuts)
def test_a_scanner_that_stopped_at_the_model_goes_on_from_there(
    document: Document, extra: int, cuts: list[int]
) -> None:
    _, data = document
    scanner = scanned(data, cuts, past_model=False)
    for piece in pieces(data[scanner.offset :], [extra]):
        scanner.feed(piece, past_model=True)
    whole = scanned(data, [])
    assert (scanner.members, scanner.closed, scanner.stream) == (whole.members, whole.closed, whole.stream)


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (b'{"model":"qwen","messages":[]}', "qwen"),
        (b'{"messages":[{"role":"user","content":"say \\"hi\\""}],"model":"qwen"}', "qwen"),
        (b'{"metadata":{"model":"inner"},"model":"outer"}', "outer"),
        (b'{"prompt":"\\"model\\":\\"no\\"","model":"qwen"}', "qwen"),
        (b'\xef\xbb\xbf \r\n{ "model"\t:\n"Qwen/Qwen3-8B" }', "Qwen/Qwen3-8B"),
        (b'{"model":""}', ""),
        (b'{"input":[1,2,3],"dimensions":-1.5e3,"model":"embed","user":null}', "embed"),
    ],
)
def test_common_bodies_go_the_quick_way(data: bytes, model: str) -> None:
    assert find_model(data) == model
    assert scanned(data, []).model == model


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (b'{"\\u006dodel":"escaped key"}', "escaped key"),
        (b'{"\\u006d\\u006F\\u0064el":"a","model":"b"}', "a"),
        (b'{"model":"first","model":"second"}', "first"),
        (b'{"model":"\\ud83d\\ude00"}', "😀"),
        ('{"model":"größe"}'.encode(), "größe"),
        (b'{"x":"ends in backslashes \\\\\\\\","model":"a\\/b"}', "a/b"),
        (b'{"x":"{\\"y\\":\\"\\\\\\"\\"}","model":"a"}', "a"),
        (b'{"x":["\\\\\\\\\\"]","\\\\","\\\\\\\\"],"model":"a"}', "a"),
    ],
)
def test_odd_bodies_are_understood(data: bytes, model: str) -> None:
    for size in (1, 2, 3, 7, 1000):
        assert scanned(data, list(range(0, len(data), size))).model == model
    assert find_model(data) in (None, model)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"model":12}', "is a number"),
        (b'{"model":null}', "is null"),
        (b'{"model":true}', "is true"),
        (b'{"model":["a"]}', "is an array"),
        (b'{"model":{"name":"a"}}', "is an object"),
        (b'{"model":"\\ud800"}', "not valid JSON text"),
        (b'{"model":"a\nb"}', "not valid JSON text"),
        (b'{"model":"\xff"}', "not valid JSON text"),
        pytest.param(b'{"model":"' + b"a" * (LONGEST_NAME_BYTES + 1) + b'"}', "longer than", id="long"),
        (b'["model"]', "not a JSON object"),
        (b'{"a":1,}', "should stand at byte 7"),
        (b"{'model':'a'}", "should stand at byte 1"),
        (b'{"a" "b"}', "a colon should stand at byte 5"),
        (b'{"a":}', "a value should stand at byte 5"),
        (b'{"a":1 "model":"b"}', "a comma or a closing brace should stand at byte 7"),
    ],
)
def test_what_cannot_be_read_is_said(data: bytes, words: str) -> None:
    for size in (1, 1000):
        scanner = scanned(data, list(range(0, len(data), size)))
        assert scanner.problem is not None
        assert words in scanner.problem
        assert scanner.model is None
        assert scanner.settled
    assert find_model(data) is None or words == "not valid JSON text"


def test_depth_costs_no_stack() -> None:
    data = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b',"model":"deep"}'
    assert find_model(data) == "deep"
    assert scanned(data, [1000, 300_000]).model == "deep"


def test_nobody_needs_more_members_than_a_thousand() -> None:
    members = b"{" + b"".join(b'"k%d":0,' % number for number in range(MOST_MEMBERS - 1))
    assert scanned(members + b'"model":"last"}', [5000]).model == "last"
    scanner = scanned(members + b'"k":[],"k":{},"model":"last"}', [5000])
    assert scanner.problem is not None
    assert "members" in scanner.problem


def test_a_scanner_keeps_nothing_of_long_strings() -> None:
    scanner = FieldScanner()
    scanner.feed(b'{"prompt":"')
    for _ in range(64):
        scanner.feed(b'text with \\"quotes\\" ' * 1000)
    assert len(scanner._token.raw()) == 0
    scanner.feed(b'","' + b"k" * 10_000)
    assert len(scanner._token.raw()) <= LONGEST_NAME_BYTES
    scanner.feed(b'":1,"model":"a"')
    assert scanner.model == "a"
