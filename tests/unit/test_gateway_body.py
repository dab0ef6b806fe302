"""A request's body on its way: held back, edited, taken, replayed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.serving import Serving
from gpusvc.gateway.body.edits import edits
from gpusvc.gateway.body.spool import IN_MEMORY_BYTES, KEPT_BYTES
from gpusvc.gateway.body.streamed import FULL_BYTES, StreamedBody
from gpusvc.gateway.body.whole import edited, find_model, wants_stream
from gpusvc.gateway.http.replies import HttpError

JSON = b"application/json"
FORM = b"multipart/form-data; boundary=frontier"
LIMIT = 1 << 30

PLAIN = Serving("qwen")
RENAMED = Serving("qwen", served_name="Qwen/Qwen3-8B")
FILTERED = Serving("qwen", served_name="served", strip=("user", "seed"), set={"temperature": 0.5, "stop": ["é"]})


def form(model: bytes, *, audio: bytes = b"") -> bytes:
    return (
        b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + audio + b"\r\n"
        b'--frontier\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model + b"\r\n--frontier--\r\n"
    )


def taken(body: StreamedBody) -> bytes:
    return b"".join(iter(body.take, b""))


def fed(content_type: bytes | None, *pieces: bytes, end: bool = True) -> StreamedBody:
    body = StreamedBody(content_type, None, limit_bytes=LIMIT)
    for piece in pieces:
        body.feed(piece)
    if end:
        body.end()
    return body


@pytest.fixture(autouse=True)
def _no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


# What is known, and when.


def is_full(body: StreamedBody) -> bool:
    """What changes under a checker of types, who believes an assertion for ever."""
    return body.full


def test_the_model_is_known_as_soon_as_its_name_is_there() -> None:
    body = fed(JSON, b'{"messages":[', b'{}],"model":"qw', end=False)
    assert (body.model, body.settled) == (None, False)
    body.feed(b'en","str')
    assert (body.model, body.settled) == ("qwen", True)
    assert not body.stream
    body.feed(b'eam":true')
    body.feed(b"}")
    assert body.stream


@pytest.mark.parametrize(
    ("content_type", "data", "words"),
    [
        (JSON, b"", "names no model"),
        (JSON, b"{}", "names no model"),
        (JSON, b'{"messages":[]}', "names no model"),
        (JSON, b'{"model":3}', "is a number"),
        (JSON, b'{"a":[1,', "ends too early"),
        (JSON, b"{a:1}", "should stand at byte 1"),
        (JSON, b"[]", "not a JSON object"),
        (b"application/x-www-form-urlencoded", b'{"model":null}', "is null"),
        (b"application/octet-stream", b"\x00\x01", "names no model"),
        (None, b"hello", "names no model"),
        (FORM, form(b"x").replace(b"model", b"modem"), "form names no model"),
        (b"multipart/form-data", form(b"x"), "no valid boundary"),
    ],
)
def test_why_there_is_no_model_is_said(content_type: bytes | None, data: bytes, words: str) -> None:
    assert find_model(content_type, data) is None
    body = fed(content_type, data)
    assert body.settled
    assert body.model is None
    refusal = body.no_model()
    assert refusal.status == 400
    assert words in refusal.message


def test_a_body_of_any_type_but_a_form_is_tried_as_json() -> None:
    for content_type in (None, JSON, b"text/plain", b"application/x-www-form-urlencoded"):
        assert find_model(content_type, b'{"model":"qwen"}') == "qwen"
        assert fed(content_type, b'{"model":"qwen"}').model == "qwen"
    assert find_model(FORM, b'{"model":"qwen"}') is None


def test_a_whole_body_tells_whether_it_wants_a_stream() -> None:
    assert wants_stream(JSON, b'{"model":"a","stream":true}')
    assert not wants_stream(JSON, b'{"model":"a","stream":false}')
    assert not wants_stream(JSON, b'{"model":"a","x":{"stream":true}}')
    assert not wants_stream(JSON, b"nonsense")


# What goes to the engine.


def test_nothing_may_be_taken_before_the_model_is_chosen() -> None:
    body = fed(JSON, b'{"model":"qwen"}')
    assert (body.ready, body.take()) == (False, b"")
    body.begin(PLAIN)
    assert (body.ready, body.length, taken(body), body.finished) == (True, 16, b'{"model":"qwen"}', True)


def test_what_comes_later_is_taken_as_it_comes() -> None:
    body = StreamedBody(JSON, 40, limit_bytes=LIMIT)
    body.feed(b'{"model":"qwen","prompt":')
    body.begin(PLAIN)
    assert body.length == 40
    assert taken(body) == b'{"model":"qwen","prompt":'
    assert not body.finished
    body.feed(b'"is not looked')
    assert taken(body) == b'"is not looked'
    body.feed(b"}")
    body.end()
    assert not body.finished
    assert taken(body) == b"}"
    assert body.finished


def test_the_length_of_a_chunked_body_is_known_once_it_has_ended() -> None:
    body = fed(JSON, b'{"model":"a"', end=False)
    body.begin(RENAMED)
    assert (body.ready, body.length) == (True, None)
    ended = fed(JSON, b'{"model":"a"}')
    ended.begin(RENAMED)
    assert ended.length == len(taken(ended))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_served_name_replaces_the_name_and_nothing_else(size: int) -> None:
    data = b'{ "model" : "\\u0061", "prompt":  "x","seed": 1.0}'
    expected = data.replace(b'"\\u0061"', b'"Qwen/Qwen3-8B"')
    body = StreamedBody(JSON, len(data), limit_bytes=LIMIT)
    for start in range(0, len(data), size):
        body.feed(data[start : start + size])
    body.begin(RENAMED)
    body.end()
    assert body.length == len(expected)
    assert taken(body) == expected
    assert edited(JSON, data, RENAMED) == expected
    assert edited(JSON, data.replace(b"\\u0061", b"a"), RENAMED) == expected


def test_a_served_name_replaces_the_name_in_a_form() -> None:
    data, expected = form(b"a", audio=b"RIFF" * 1000), form(b"Qwen/Qwen3-8B", audio=b"RIFF" * 1000)
    assert edited(FORM, data, RENAMED) == expected
    body = fed(FORM, *(data[start : start + 100] for start in range(0, len(data), 100)))
    assert body.model == "a"
    body.begin(RENAMED)
    assert body.length == len(expected)
    assert taken(body) == expected


def test_a_model_that_is_chosen_by_the_path_waits_for_the_name_that_is_to_be_replaced() -> None:
    body = StreamedBody(JSON, 30, limit_bytes=LIMIT)
    body.begin(RENAMED)
    body.feed(b'{"prompt":"x",')
    assert (body.ready, body.take()) == (False, b"")
    body.feed(b'"model":"any"}')
    assert body.ready
    assert taken(body) == b'{"prompt":"x","model":"Qwen/Qwen3-8B"}'
    for data in (b"", b"{}", b"\x00binary", b'{"model":1}', b"{oops"):
        assert edited(JSON, data, RENAMED) == data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"{}", b'{"temperature":0.5,"stop":["\\u00e9"]}'),
        (b'{"user":1}', b'{"temperature":0.5,"stop":["\\u00e9"]}'),
        (b'{ "user":1 ,"seed":2 }', b'{  "temperature":0.5,"stop":["\\u00e9"]}'),
        (b'{"user":1, "a" : 2,"seed":3}', b'{"a" : 2,"temperature":0.5,"stop":["\\u00e9"]}'),
        (b'{"stop" : "x", "user":1,"temperature":2}', b'{"stop" : ["\\u00e9"], "temperature":0.5}'),
        (b'{"a":1,"us\\u0065r":1,"model":"m","b":{"user":1}}',
         b'{"a":1,"model":"served","b":{"user":1},"temperature":0.5,"stop":["\\u00e9"]}'),
        (b'{"temperature":1,"temperature":2,"stop":0,"model":"a","model":"b"}',
         b'{"temperature":0.5,"temperature":0.5,"stop":["\\u00e9"],"model":"served","model":"served"}'),
    ],
)  # fmt: skip
def test_members_are_stripped_and_set(data: bytes, expected: bytes) -> None:
    assert edited(JSON, data, FILTERED) == expected
    json.loads(expected)


names = st.sampled_from(["user", "seed", "temperature", "stop", "model", "a", "b"])


@given(st.lists(st.tuples(names, st.text(max_size=3))), st.lists(st.integers(0, 500), max_size=5), st.integers(0, 5))
def test_a_filtered_body_is_what_its_members_say(members: list[tuple[str, str]], cuts: list[int], begun: int) -> None:
    data = ("{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in members) + "}").encode()
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    body = StreamedBody(JSON, len(data), limit_bytes=LIMIT)
    for number, (start, end) in enumerate(pairwise(places)):
        if number == begun:
            body.begin(FILTERED)
        body.feed(data[start:end])
    body.end()
    if len(places) - 1 <= begun:
        body.begin(FILTERED)
    wanted = {key: value for key, value in members if key not in FILTERED.strip} | dict(FILTERED.set)
    if "model" in wanted:
        wanted["model"] = "served"
    assert body.ready
    sent = taken(body)
    assert json.loads(sent) == wanted
    assert body.length == len(sent)


@pytest.mark.parametrize("data", [b'{"user":1', b'{"user":1]', b'{"a" 1}', b'{"model":1,"user":2}'])
def test_what_is_to_be_filtered_and_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(HttpError) as refused:
        edited(JSON, data, FILTERED)
    assert refused.value.status == 400
    assert edited(JSON, data, PLAIN) == data


def test_more_members_than_anybody_needs_are_not_filtered_in_part() -> None:
    data = b"{" + b",".join(b'"%d":0' % number for number in range(5000)) + b"}"
    with pytest.raises(HttpError, match="members"):
        edited(JSON, data, FILTERED)


@pytest.mark.parametrize("data", [b"", b" ", b"[1]", b"\x00\x01"])
def test_what_has_no_members_passes_the_filter(data: bytes) -> None:
    assert edited(JSON, data, FILTERED) == data


def test_only_some_models_edit() -> None:
    assert [edits(serving) for serving in (PLAIN, RENAMED, FILTERED)] == [False, True, True]


# What is held back.


def test_a_long_body_waits_in_a_file_that_has_no_name(tmp_path: Path) -> None:
    head, middle, tail = b'{"prompt":"', b"long \\n" * 50_000, b'","model":"qwen"}'
    body = StreamedBody(JSON, None, limit_bytes=LIMIT)
    body.feed(head)
    for _ in range(10):
        body.feed(middle)
        assert not body.full
    assert list(tmp_path.iterdir()) == []
    assert len(_open_files(tmp_path)) == 1
    body.feed(tail)
    assert body.model == "qwen"
    body.begin(RENAMED)
    body.end()
    expected = (head + middle * 10 + tail).replace(b'"qwen"', b'"Qwen/Qwen3-8B"')
    assert body.length == len(expected)
    assert taken(body) == expected
    assert body.finished
    assert body.rewind()
    assert taken(body) == expected
    body.close()
    body.close()
    assert _open_files(tmp_path) == []


def test_a_client_waits_while_the_engine_does_not_take() -> None:
    body = StreamedBody(JSON, None, limit_bytes=LIMIT)
    body.feed(b'{"model":"qwen","prompt":"')
    assert not is_full(body)
    body.feed(b"x" * FULL_BYTES)
    assert is_full(body)  # while the model is loaded
    body.begin(PLAIN)
    assert is_full(body)
    taken(body)
    assert not is_full(body)
    body.feed(b"x" * FULL_BYTES)
    assert is_full(body)


def test_a_client_goes_on_when_only_more_bytes_can_help() -> None:
    body = StreamedBody(JSON, None, limit_bytes=LIMIT)
    body.feed(b'{"model":"qwen","prompt":"' + b"x" * FULL_BYTES)
    assert is_full(body)
    body.begin(FILTERED)
    assert not is_full(body)
    body.feed(b"x" * IN_MEMORY_BYTES)
    body.feed(b'"}')
    body.end()
    assert body.ready
    assert len(taken(body)) == body.length
    body.close()


def test_a_body_can_be_taken_again_until_too_much_of_it_is_gone() -> None:
    body = fed(JSON, b'{"model":"qwen","prompt":"', end=False)
    body.begin(RENAMED)
    first = taken(body)
    assert body.rewind()
    assert taken(body) == first
    body.feed(b"x" * KEPT_BYTES)
    assert body.rewind()
    assert taken(body) == first + b"x" * KEPT_BYTES
    assert not body.rewind()
    body.feed(b'"}')
    assert taken(body) == b'"}'


def test_single_bytes_are_held_together() -> None:
    body = StreamedBody(JSON, None, limit_bytes=LIMIT)
    for byte in b'{"prompt":"' + b"x" * 10_000:
        body.feed(bytes([byte]))
    assert len(body._spool._chunks) < 5


def test_a_body_that_is_too_large_is_refused() -> None:
    with pytest.raises(HttpError, match="larger than") as announced:
        StreamedBody(JSON, 1001, limit_bytes=1000)
    assert (announced.value.status, announced.value.close) == (413, True)
    body = StreamedBody(JSON, None, limit_bytes=1000)
    body.feed(b"x" * 1000)
    with pytest.raises(HttpError, match="larger than") as found:
        body.feed(b"x")
    assert found.value.status == 413


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    body = StreamedBody(JSON, None, limit_bytes=LIMIT)
    body.feed(b'{"prompt":"')
    limited = _writes_to("/dev/full")
    monkeypatch.setattr("gpusvc.gateway.body.spool.tempfile.TemporaryFile", limited)
    monkeypatch.setattr("gpusvc.gateway.body.spool.os.pwrite", lambda fd, data, _: os.write(fd, data))
    with pytest.raises(HttpError, match="no room") as refused:
        body.feed(b"x" * IN_MEMORY_BYTES)
    assert (refused.value.status, refused.value.close) == (507, True)
    body.close()


def _writes_to(path: str) -> Callable[..., object]:
    return lambda **_: Path(path).open("wb", buffering=0)


def _open_files(directory: Path) -> list[str]:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return [link for link in links if link.startswith(str(directory))]
