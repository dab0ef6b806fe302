"""The scanner of forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.body.multipart import LONGEST_HEAD_BYTES, LONGEST_VALUE_BYTES, FormScanner, boundary_of, is_form

Part = tuple[bytes, bytes]


def field(name: str, value: bytes) -> Part:
    return (f'Content-Disposition: form-data; name="{name}"'.encode(), value)


def file(name: str, value: bytes) -> Part:
    head = f'Content-Disposition: form-data; name="{name}"; filename="a.wav"\r\nContent-Type: audio/wav'
    return (head.encode(), value)


def form(*parts: Part, boundary: bytes = b"frontier") -> bytes:
    body = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value) for head, value in parts)
    return body + b"--" + boundary + b"--\r\n"


def scanned(data: bytes, cuts: list[int], boundary: bytes | None = b"frontier") -> FormScanner:
    scanner = FormScanner(boundary)
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(places):
        scanner.feed(data[start:end])
    return scanner


cuts = st.lists(st.integers(0, 10_000), max_size=8)
# Contents full of what looks like a delimiter, and is none.
contents = st.lists(
    st.sampled_from(
        [b"\r\n", b"--", b"-", b"\r", b"\r\n--fron", b"\r\n--frontiers", b"\r\n--frontier-", b"\n", b"x", b" "]
    )
).map(b"".join)


def is_content(value: bytes) -> bool:
    """Whether no line of it is a delimiter."""
    lines = (b"\r\n" + value + b"\r\n").split(b"\r\n--frontier")[1:]
    return not any(line.startswith(b"--") or line.lstrip(b" \t").startswith(b"\r\n") for line in lines)


@given(contents.filter(is_content), st.text("äb", max_size=3), contents.filter(is_content), cuts)
def test_the_field_is_found_wherever_it_stands_and_however_it_is_cut(
    before: bytes, model: str, after: bytes, cuts: list[int]
) -> None:
    data = form(file("file", before), field("model", model.encode()), field("x", after))
    scanner = scanned(data, cuts)
    assert scanner.problem is None
    assert scanner.model == model
    assert scanner.model_span is not None
    start, end = scanner.model_span
    assert data[start:end] == model.encode()
    assert scanner.closed
    assert scanner.offset == len(data)


@given(contents, cuts)
def test_whatever_comes_is_read_the_same_however_it_is_cut(content: bytes, cuts: list[int]) -> None:
    data = content + form(field("model", content), (b"", content), field("stream", b"true"))
    whole, cut = scanned(data, []), scanned(data, cuts)
    assert (whole.model, whole.model_span, whole.stream, whole.closed) == (
        cut.model, cut.model_span, cut.stream, cut.closed
    )  # fmt: skip


def test_the_field_is_found_after_a_long_file() -> None:
    scanner = FormScanner(b"frontier")
    head, tail = form(file("file", b"|"), field("model", b"whisper"), field("stream", b"True")).split(b"|")
    scanner.feed(head)
    for _ in range(50):
        scanner.feed(b"\r\n--fron" * 10_000)
        assert len(scanner._rest) <= 100
        assert not scanner.settled
    scanner.feed(tail)
    assert scanner.model == "whisper"
    assert scanner.stream is True


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="model"',
        b"content-disposition:form-data;name=model",
        b'CONTENT-TYPE: text/plain\r\nContent-Disposition: form-data; NAME="model"',
        b'Content-Disposition: form-data;\r\n name="model"',
        b'Content-Disposition: form-data; x="; name=other"; name="mo\\del"',
    ],
)
def test_a_head_may_be_written_in_many_ways(head: bytes) -> None:
    assert scanned(form((head, b"a")), []).model == "a"


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="file"; filename="; name=model"',
        b'Content-Disposition: form-data; name="model"; filename="model.bin"',
        b'Content-Disposition: attachment; name="model"',
        b'X-Content-Disposition: form-data; name="model"',
        b"",
    ],
)
def test_a_file_or_another_field_is_not_the_model(head: bytes) -> None:
    scanner = scanned(form((head, b"a")), [])
    assert scanner.model is None
    assert scanner.settled


def test_the_first_field_counts() -> None:
    data = form(field("model", b"first"), field("model", b"second"))
    scanner = scanned(data, [])
    assert scanner.model == "first"
    assert scanner.model_span is not None
    assert scanner.model_span[1] < data.index(b"second")


def test_what_stands_before_the_first_and_after_the_last_part_is_no_part() -> None:
    fake = b"\r\n--other\r\n" + b'Content-Disposition: form-data; name="model"\r\n\r\nfake\r\n'
    assert scanned(fake + b"\r\n" + form(field("a", b"b")) + form(field("model", b"late")), []).model is None


def test_blanks_after_a_boundary_are_allowed() -> None:
    data = form(field("model", b"a")).replace(b"frontier\r\n", b"frontier \t\r\n")
    assert [scanned(data, list(range(0, len(data), size))).model for size in (1, 2, 1000)] == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(form((b"X: " + b"x" * LONGEST_HEAD_BYTES, b"")), "head of a part", id="head of a part"),
        pytest.param(form(field("model", b"x" * (LONGEST_VALUE_BYTES + 1))), "longer than", id="longer than"),
        (form(field("model", b"\xff")), "not UTF-8"),
        pytest.param(b"--frontier" + b" " * 10_000, "no end of line", id="no end of line"),
    ],
)
def test_what_cannot_be_read_is_said(data: bytes, words: str) -> None:
    for cuts in ([], list(range(0, len(data), 100))):
        scanner = scanned(data, cuts)
        assert scanner.problem is not None
        assert words in scanner.problem
        assert scanner.settled


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data; charset=utf-8; Boundary="a b\\"c"', b'a b"c'),
        (b"multipart/form-data;boundary=----WebKitFormBoundary7MA4;x=y", b"----WebKitFormBoundary7MA4"),
        (b"multipart/form-data", None),
        (b"multipart/form-data; boundary=", None),
        (b'multipart/form-data; boundary=""', None),
        (b'multipart/form-data; boundary="a "', None),
        pytest.param(b"multipart/form-data; boundary=" + b"x" * 71, None, id="long"),
    ],
)
def test_the_boundary_is_read_from_the_content_type(content_type: bytes, boundary: bytes | None) -> None:
    assert is_form(content_type)
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize("content_type", [None, b"application/json", b"multipart/form-database", b"multipart/mixed"])
def test_other_types_are_no_forms(content_type: bytes | None) -> None:
    assert not is_form(content_type)


def test_a_form_without_a_boundary_has_no_model() -> None:
    scanner = scanned(form(field("model", b"a")), [], None)
    assert scanner.model is None
    assert scanner.settled
