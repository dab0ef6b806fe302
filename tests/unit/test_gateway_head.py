"""Heads and chunks: what is understood, what is passed on, and what is refused before two could read it differently."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gateway.http.chunks import BadChunkError, Chunks, encode
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead, check_beginning, read_request
from gpusvc.gateway.http.response_head import BadResponseError, ResponseHead, passed_on, read_response
from gpusvc.gateway.limits import Limits
from gpusvc.gateway.relay.usage import Tail, is_usage_type

LIMITS = Limits()


def request(*lines: str, first: str = "POST /v1/x HTTP/1.1", host: str | None = "Host: localhost") -> RequestHead:
    every = [first, *([host] if host is not None else []), *lines, "", ""]
    return read_request("\r\n".join(every).encode("latin-1"), LIMITS)


def response(*lines: str, first: str = "HTTP/1.1 200 OK") -> ResponseHead:
    return read_response("\r\n".join([first, *lines, "", ""]).encode("latin-1"), LIMITS)


def status(*lines: str, first: str = "POST /v1/x HTTP/1.1", host: str | None = "Host: localhost") -> int:
    """Of the refusal, which ends the connection."""
    with pytest.raises(HttpError) as refused:
        request(*lines, first=first, host=host)
    assert refused.value.close
    return refused.value.status


def test_what_a_request_says_is_noted() -> None:
    head = request("Content-Type: application/json", "content-length:  12 ", "AUTHORIZATION: Bearer x")
    assert (head.method, head.target, head.host) == (b"POST", b"/v1/x", b"localhost")
    assert (head.content_type, head.content_length, head.authorization) == (b"application/json", 12, b"Bearer x")
    assert head.kept == [b"Content-Type: application/json"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_known_lines_mean_the_same_as_new_ones(times: int) -> None:
    for _ in range(times):
        head = request("X-One: 1", "Cookie: a=b", "X-Gpusvc-Key: me", "Expect: 100-continue", "Content-Length: 3")
        assert head.kept == [b"X-One: 1", b"Cookie: a=b"]
        assert (head.expects_continue, head.content_length) == (True, 3)


def test_the_order_and_number_of_fields_is_kept() -> None:
    assert request("A: 1", "B: 2", "A: 3").kept == [b"A: 1", b"B: 2", b"A: 3"]


@pytest.mark.parametrize(
    "line",
    [
        "Connection: keep-alive",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic eA==",
        "TE: trailers",
        "Trailer: Expires",
        "Upgrade: websocket",
        "X-Gpusvc-Anything: 1",
        "Origin: http://localhost",
    ],
)
def test_what_is_for_this_hop_alone_is_not_passed_on(line: str) -> None:
    assert request(line).kept == []


def test_what_connection_names_is_not_passed_on() -> None:
    head = request("X-Secret: 1", "X-Open: 2", "Connection: close, x-secret")
    assert head.kept == [b"X-Open: 2"]
    assert not head.keeps_alive


@pytest.mark.parametrize(
    ("first", "lines", "kept"),
    [
        ("GET / HTTP/1.1", [], True),
        ("GET / HTTP/1.1", ["Connection: Close"], False),
        ("GET / HTTP/1.0", [], False),
        ("GET / HTTP/1.0", ["Connection: Keep-Alive"], True),
        ("GET / HTTP/1.0", ["Connection: keep-alive, close"], False),
    ],
)
def test_how_long_a_connection_lives_is_as_the_client_says(first: str, lines: list[str], kept: bool) -> None:
    assert request(*lines, first=first).keeps_alive is kept


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 3", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 3"],
        ["Content-Length: 3", "Content-Length: 3"],
        ["Content-Length: 3", "Content-Length: 4"],
        ["Content-Length: 3, 3"],
        ["Content-Length: +3"],
        ["Content-Length: 0x3"],
        ["Content-Length: 3_0"],
        ["Content-Length: -1"],
        ["Content-Length:"],
        ["Content-Length: 99999999999999999999"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: \x0bchunked"],
        ["Transfer-Encoding:"],
        ["Transfer-Encoding : chunked"],
        ["X: folded", " Transfer-Encoding: chunked"],
        ["X: folded", "\tline"],
        [" X: first"],
        ["X: a\nContent-Length: 3"],
        ["X: a\rContent-Length: 3"],
        ["X: \x00"],
        ["X: \x7f"],
        ["X\x80: a"],
        ["X X: a"],
        [": a"],
        ["no colon"],
        ["Host: other"],
        ["Content-Type: application/json", "Content-Type: multipart/form-data; boundary=x"],
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(lines: list[str]) -> None:
    for _ in range(2):  # nothing is learned from it
        assert status(*lines) == 400


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("POST /v1/x HTTP/1.2", 505),
        ("POST /v1/x HTTP/2.0", 505),
        ("POST /v1/x HTTP/0.9", 505),
        ("POST /v1/x", 400),
        ("POST  /v1/x HTTP/1.1", 400),
        ("POST /v1/x HTTP/1.1 ", 400),
        ("POST /v1/x http/1.1", 400),
        ("POST\t/v1/x HTTP/1.1", 400),
        ("P()ST /v1/x HTTP/1.1", 400),
        ("POST /\x7f HTTP/1.1", 400),
        ("POST /ü HTTP/1.1", 400),
        ("POST v1/x HTTP/1.1", 400),
        ("CONNECT localhost:1 HTTP/1.1", 405),
        ("POST /" + "x" * LIMITS.target_bytes + " HTTP/1.1", 414),
    ],
)
def test_a_first_line_that_is_none_is_refused(first: str, expected: int) -> None:
    assert status(first=first) == expected


def test_a_request_of_http11_has_a_host() -> None:
    assert status(host=None) == 400
    assert request(host=None, first="GET / HTTP/1.0").host is None


def test_transfer_encoding_is_unknown_to_http10() -> None:
    assert status("Transfer-Encoding: chunked", first="POST / HTTP/1.0") == 400


def test_an_absolute_target_says_the_host() -> None:
    head = request(first="GET http://example.org:80/a?b HTTP/1.1")
    assert (head.host, head.target) == (b"example.org:80", b"/a?b")


def test_nothing_but_100_continue_can_be_expected() -> None:
    assert status("Expect: the unexpected") == 417


def test_too_many_fields_are_refused() -> None:
    assert status(*(f"X-{number}: 1" for number in range(LIMITS.fields))) == 431


@pytest.mark.parametrize(
    ("lines", "upgrade"),
    [
        (["Connection: Upgrade", "Upgrade: websocket"], b"websocket"),
        (["Connection: keep-alive, upgrade", "Upgrade: websocket"], b"websocket"),
        (["Upgrade: websocket"], None),
        (["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: x"], None),
        (["Connection: Upgrade", "Upgrade: websocket", "Content-Length: 1"], None),
    ],
)
def test_an_upgrade_is_passed_on_if_both_sides_could_still_agree(lines: list[str], upgrade: bytes | None) -> None:
    assert request(*lines, first="GET / HTTP/1.1").upgrade == upgrade


@pytest.mark.parametrize(
    ("partial", "expected"),
    [
        (b"\x16\x03\x01\x02\x00", 400),
        (b" GET", 400),
        (b"GET /" + b"x" * LIMITS.target_bytes, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * LIMITS.head_bytes, 431),
    ],
)
def test_a_head_that_cannot_become_right_is_refused_before_its_end(partial: bytes, expected: int) -> None:
    with pytest.raises(HttpError) as refused:
        check_beginning(partial, LIMITS)
    assert refused.value.status == expected


def test_an_answer_is_understood() -> None:
    head = response("Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked", "Server: x")
    assert (head.status, head.reason, head.chunked, head.is_stream) == (200, b"OK", True, True)
    assert head.kept == [b"Content-Type: text/event-stream; charset=utf-8", b"Server: x"]


def test_an_answer_needs_no_reason() -> None:
    assert response(first="HTTP/1.1 200").reason == b""


def test_engines_do_not_say_who_may_read_their_answers() -> None:
    assert response("Access-Control-Allow-Origin: *", "Keep-Alive: timeout=5", "Connection: x-a", "X-A: 1").kept == []


@pytest.mark.parametrize(
    ("first", "lines"),
    [
        ("HTTP/2 200 OK", []),
        ("HTTP/1.1 2000 OK", []),
        ("HTTP/1.1 099 OK", []),
        ("ICY 200 OK", []),
        ("HTTP/1.1 200 OK", ["Content-Length: 1", "Content-Length: 1"]),
        ("HTTP/1.1 200 OK", ["Content-Length: 1", "Transfer-Encoding: chunked"]),
        ("HTTP/1.1 200 OK", ["Transfer-Encoding: gzip"]),
        ("HTTP/1.1 200 OK", ["X: folded", " line"]),
        ("HTTP/1.1 200 OK", [f"X-{number}: 1" for number in range(LIMITS.fields)]),
    ],
)
def test_what_is_no_answer_is_refused(first: str, lines: list[str]) -> None:
    with pytest.raises(BadResponseError):
        response(*lines, first=first)


def test_trailers_say_nothing_about_framing_or_whose_answer_it_is() -> None:
    lines = [b"X-Sum: 1", b"Content-Length: 3", b"set-cookie: a", b"Access-Control-Allow-Origin: *", b"X-Api-Key: k"]
    assert passed_on(lines) == [b"X-Sum: 1"]


@given(st.binary(max_size=300))
def test_no_bytes_are_more_than_refused(data: bytes) -> None:
    for block in (data + b"\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n" + data + b"\r\n\r\n"):
        with suppress(HttpError):
            read_request(block, LIMITS)
        with suppress(BadResponseError):
            read_response(block.replace(b"GET / HTTP/1.1", b"HTTP/1.1 200 OK"), LIMITS)


NAMES = st.text("abcXYZ-_0!", min_size=1, max_size=8)
VALUES = st.text([chr(code) for code in range(0x20, 0x100) if code != 0x7F], max_size=12)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=8))
def test_fields_that_mean_nothing_to_us_pass_byte_for_byte(fields: list[tuple[str, str]]) -> None:
    lines = [f"x-{name}:{value}" for name, value in fields]
    for _ in range(2):
        assert request(*lines).kept == [f"x-{name}: {value.strip(' ')}".encode("latin-1") for name, value in fields]


PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(PIECES, st.lists(st.integers(1, 30), min_size=1), st.sampled_from([b"", b"X-A: 1\r\nX-B: 2\r\n"]))
def test_chunks_are_the_same_however_they_arrive(pieces: list[bytes], steps: list[int], trailers: bytes) -> None:
    coded = b"".join(map(encode, pieces)) + b"0\r\n" + trailers + b"\r\nnext"
    chunks, payload, at, turn = Chunks(), b"", 0, 0
    while not chunks.ended:
        step = steps[turn % len(steps)]
        payload += chunks.feed(coded[at : at + step])
        at, turn = at + step, turn + 1
    assert payload == b"".join(pieces)
    assert chunks.left + coded[at:] == b"next"
    assert chunks.trailers == trailers.split(b"\r\n")[:-1]


def feed_all(coded: bytes, step: int) -> None:
    chunks = Chunks()
    for at in range(0, len(coded), step):
        chunks.feed(coded[at : at + step])


@pytest.mark.parametrize(
    "coded",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"1_0\r\n",
        b" 1\r\na\r\n",
        b"1 \r\na\r\n",
        b"1\na\n0\n\n",
        b"1\r\nab\r\n",
        b"1\r\na\n0\r\n\r\n",
        b"1;ext\nmore\r\na\r\n",
        b"1;e\x00\r\na\r\n",
        b"\r\n",
        b"ffffffffffffffffffff\r\n",
        b"1" * 2000,
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n folded: 1\r\n\r\n",
        b"0\r\nX: 1\n\r\n",
        b"0\r\n" + b"X: 1\r\n" * 5000,
    ],
)
def test_what_is_no_chunk_is_refused(coded: bytes) -> None:
    for step in (len(coded), 1):
        with pytest.raises(BadChunkError):
            feed_all(coded, step)


def test_extensions_of_chunks_are_read_over() -> None:
    chunks = Chunks()
    assert chunks.feed(b'3;name="value"\r\nabc\r\n0;x\r\n\r\n') == b"abc"
    assert chunks.ended


def tokens(*pieces: bytes) -> tuple[int, int] | None:
    tail = Tail(pieces[0])
    for piece in pieces[1:]:
        tail.add(piece)
    return tail.tokens()


def test_tokens_are_read_from_the_end_of_an_answer() -> None:
    usage = b'"usage": {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}}'
    assert tokens(b'{"text": "' + b"x" * 100_000 + b'",' + usage) == (3, 6)
    assert tokens(*(bytes([byte]) for byte in usage)) == (3, 6)
    assert tokens(b'{"text": "no usage"}') is None
    assert tokens(b'{"text": "\\"usage\\": {\\"prompt_tokens\\": 3}"}') is None


def test_anthropics_streams_have_the_prompt_at_their_beginning() -> None:
    begin = b'data: {"type": "message_start", "message": {"usage": {"input_tokens": 11, "output_tokens": 1}}}\n\n'
    end = b'data: {"type": "message_delta", "usage": {"output_tokens": 5}}\n\n'
    assert tokens(begin, b"x" * 5000, end) == (11, 5)


def test_only_what_may_say_it_is_looked_at() -> None:
    assert is_usage_type(b"application/json; charset=utf-8")
    assert is_usage_type(b"Text/Event-Stream")
    assert not is_usage_type(b"audio/mpeg")
    assert not is_usage_type(None)
