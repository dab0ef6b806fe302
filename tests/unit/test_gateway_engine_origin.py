"""Tickets and cookies for the engines' own origins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpusvc.config import keys
from gpusvc.config.keys import Key, Keys
from gpusvc.gateway.entry.engine_origin import Sessions, hide_session, model_in
from gpusvc.gateway.entry.tickets import UsedTickets
from gpusvc.gateway.http.request_head import RequestHead

SECRET = b"s" * 32


class Bench:
    def __init__(self, directory: Path) -> None:
        self.key, _ = keys.make("me")
        file = directory / "keys.toml"
        file.write_text(keys.text([self.key]))
        self.seconds = 1000.0
        self.sessions = Sessions(SECRET, Keys.read([file]), UsedTickets(), now=lambda: self.seconds)

    def target(self, model: str = "qwen", key: Key | None = None) -> bytes:
        location = self.sessions.location(head(), b"http", model, b"/x?a=1", key or self.key)
        assert location is not None
        assert location.startswith(b"http://" + model.encode() + b".localhost:8484/x?a=1&")
        return location.partition(b":8484")[2]

    def cookie(self, target: bytes) -> bytes:
        redirect = self.sessions.redeem(head(target), "qwen")
        assert redirect is not None
        headers = dict(redirect.headers)
        assert headers[b"location"] == b"/x?a=1"
        assert b"HttpOnly" in headers[b"set-cookie"]
        return headers[b"set-cookie"].partition(b";")[0]


def head(target: bytes = b"/", cookie: bytes | None = None) -> RequestHead:
    made = RequestHead(b"GET", target, False)
    made.host = b"127.0.0.1:8484"
    if cookie is not None:
        made.kept.append(b"Cookie: a=b; " + cookie)
    return made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("host", "model"),
    [
        (None, None),
        (b"localhost:8484", None),
        (b"127.0.0.1", None),
        (b"qwen.localhost:8484", "qwen"),
        (b"qwen2.5.localhost", "qwen2.5"),
        (b"qwen.localhost.evil.example", None),
        (b".localhost", None),
    ],
)
def test_a_host_below_localhost_is_a_model(host: bytes | None, model: str | None) -> None:
    assert model_in(host) == model


def test_a_ticket_becomes_a_cookie_that_stands_for_its_key(bench: Bench) -> None:
    cookie = bench.cookie(bench.target())
    found = bench.sessions.key_of(head(cookie=cookie), "qwen")
    assert found is not None
    assert found.name == "me"
    bench.seconds += 13 * 3600
    assert bench.sessions.key_of(head(cookie=cookie), "qwen") is None


def test_a_ticket_is_for_one_use_one_model_and_a_short_time(bench: Bench) -> None:
    target = bench.target()
    assert bench.sessions.redeem(head(target), "whisper") is None
    bench.cookie(target)
    assert bench.sessions.redeem(head(target), "qwen") is None
    late = bench.target()
    bench.seconds += 31
    assert bench.sessions.redeem(head(late), "qwen") is None


def test_a_ticket_is_for_one_use_in_all_workers() -> None:
    used = UsedTickets()
    reader, writer = os.pipe()
    workers = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            firsts = sum(used.take(b"ticket %d" % number, now=1000.0, expires=1030.0) for number in range(100))
            os.write(writer, b"%d\n" % firsts)
            os._exit(0)
        workers.append(pid)
    os.close(writer)
    for pid in workers:
        os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as results:
        assert sum(int(line) for line in results) == 100
    assert not used.take(b"ticket 7", now=1030.0, expires=1060.0)
    assert used.take(b"ticket 7", now=1030.1, expires=1060.0), "it is not valid any more, so that its place is free"


def test_no_used_ticket_is_forgotten_while_it_is_valid() -> None:
    used = UsedTickets()
    number = 0
    while used.take(b"%d" % number, now=1000.0, expires=1030.0):
        number += 1
    assert number > 1000
    assert not used.take(b"0", now=1029.0, expires=1059.0)
    assert used.take(b"another", now=1031.0, expires=1061.0)


def test_a_ticket_is_no_cookie_and_a_cookie_no_ticket(bench: Bench) -> None:
    ticket = bench.target().rpartition(b"=")[2]
    assert bench.sessions.key_of(head(cookie=b"gpusvc-session=" + ticket), "qwen") is None
    value = bench.cookie(bench.target()).partition(b"=")[2]
    assert bench.sessions.redeem(head(b"/?gpusvc-ticket=" + value), "qwen") is None


@pytest.mark.parametrize("value", [b"", b"1", b"9999999999.%b.x" % (b"0" * 64), b"9" * 5000, b"\xff.\xff.\xff"])
def test_a_forged_cookie_stands_for_nobody(bench: Bench, value: bytes) -> None:
    assert bench.sessions.key_of(head(cookie=b"gpusvc-session=" + value), "qwen") is None


def test_a_key_that_was_revoked_ends_its_sessions(bench: Bench, tmp_path: Path) -> None:
    other, _ = keys.make("other")
    foreign = bench.target(key=other)
    assert bench.sessions.redeem(head(foreign), "qwen") is None


def test_an_engine_gets_its_own_cookies_only(bench: Bench) -> None:
    asked = head(cookie=b"gpusvc-session=x; c=d")
    hide_session(asked)
    assert asked.kept == [b"Cookie: a=b; c=d"]


def test_a_name_that_is_no_host_and_a_host_that_is_not_local_have_no_origin(bench: Bench) -> None:
    assert bench.sessions.location(head(), b"http", "a/b", b"/", None) is None
    remote = head()
    remote.host = b"192.168.1.5:8484"
    assert bench.sessions.location(remote, b"http", "qwen", b"/", None) is None
