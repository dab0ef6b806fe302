"""Which browsers' pages are let in."""

from __future__ import annotations

import pytest

from gpusvc.config.host import HostGateway
from gpusvc.gateway.entry.origin import Guard
from gpusvc.gateway.http.replies import Headers, HttpError, Reply

CHAT = b"https://chat.example.org"
OPEN = Guard(HostGateway(), keyed=False)
LISTED = Guard(HostGateway(hosts=("gpu.example.org",), cors_origins=(CHAT.decode(),)), keyed=False, names=("Tower",))
ALL = Guard(HostGateway(cors_origins=("*",)), keyed=False)


def judge(
    guard: Guard,
    method: bytes = b"POST",
    target: bytes = b"/v1/chat/completions",
    *,
    host: bytes | None = b"localhost:8484",
    origin: bytes | None = None,
    site: bytes | None = None,
    mode: bytes | None = None,
) -> Headers:
    found = guard.judge(method, target, host=host, origin=origin, fetch_site=site, fetch_mode=mode)
    assert not isinstance(found, Reply)
    return found


def refused(guard: Guard, method: bytes = b"POST", target: bytes = b"/unload", **headers: bytes | None) -> int:
    with pytest.raises(HttpError) as caught:
        judge(guard, method, target, **headers)
    return caught.value.status


@pytest.mark.parametrize(
    "host",
    [
        None,
        b"localhost",
        b"LOCALHOST:8484",
        b"localhost.:8484",
        b"gpu.localhost",
        b"127.0.0.1:8484",
        b"127.1.2.3",
        b"[::1]:8484",
        b"192.168.1.5:8484",
        b"[fd00::1]",
    ],
)
def test_the_loopback_and_addresses_are_known_hosts(host: bytes | None) -> None:
    assert judge(OPEN, host=host) == ()
    assert judge(OPEN, host=host) == ()  # also when it was seen before


@pytest.mark.parametrize("host", [b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"tower"])
def test_a_name_that_could_be_anybodys_is_refused(host: bytes) -> None:
    assert refused(OPEN, host=host) == 403


@pytest.mark.parametrize(
    "host", [b"0.0.0.0:8484", b"0.0.0.0", b"[::]:8484", b"[0:0:0:0:0:0:0:0]", b"[::ffff:0.0.0.0]:8484", b"999.1.1.1"]
)
def test_an_address_that_means_no_interface_is_refused(host: bytes) -> None:
    assert refused(OPEN, host=host) == 403
    assert refused(OPEN, b"GET", b"/", host=host) == 403


@pytest.mark.parametrize("host", [b"", b"a b", b"user@localhost", b"localhost/x", b"localhost:x", b"[::1", b"a,b"])
def test_a_host_that_is_none_is_refused(host: bytes) -> None:
    assert refused(OPEN, host=host) == 400


@pytest.mark.parametrize("host", [b"gpu.example.org:443", b"GPU.EXAMPLE.ORG.", b"tower:8484"])
def test_names_that_are_listed_or_the_machines_own_are_known(host: bytes) -> None:
    assert judge(LISTED, host=host) == ()


def test_where_requests_need_a_key_any_host_will_do() -> None:
    assert judge(Guard(HostGateway(), keyed=True), host=b"evil.example") == ()


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (b"localhost:8484", b"http://localhost:8484"),
        (b"Localhost:8484", b"http://localhost:8484"),
        (b"gpu.example.org", b"https://gpu.example.org"),
        (b"gpu.example.org:443", b"https://gpu.example.org"),
        (b"gpu.example.org", b"http://gpu.example.org:80"),
        (b"[::1]:8484", b"http://[::1]:8484"),
    ],
)
def test_the_gateways_own_pages_are_let_in(host: bytes, origin: bytes) -> None:
    assert judge(LISTED, host=host, origin=origin) == ()


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"http://localhost:3000",
        b"http://localhost",
        b"null",
        b"",
        b"://localhost:8484",
        b"app://localhost:8484",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_pages_of_other_origins_are_refused(method: bytes, origin: bytes) -> None:
    assert refused(OPEN, method, origin=origin) == 403
    assert refused(Guard(HostGateway(), keyed=True), method, origin=origin) == 403


def test_pages_of_listed_origins_are_let_in_and_may_read_the_answer() -> None:
    assert judge(LISTED, origin=CHAT) == (
        (b"access-control-allow-origin", CHAT),
        (b"vary", b"Origin"),
        (b"access-control-expose-headers", b"retry-after, x-request-id"),
    )
    assert refused(LISTED, origin=CHAT + b":8443") == 403
    assert refused(LISTED, origin=b"http://chat.example.org") == 403
    assert (b"access-control-allow-origin", b"*") in judge(ALL, origin=b"null")


def test_a_rebound_name_is_no_origin_of_ours() -> None:
    assert refused(OPEN, host=b"evil.example:8484", origin=b"http://evil.example:8484") == 403


@pytest.mark.parametrize("site", [b"cross-site", b"same-site"])
def test_images_and_links_of_other_sites_do_nothing(site: bytes) -> None:
    assert refused(OPEN, b"GET", b"/unload", site=site, mode=b"no-cors") == 403
    assert refused(OPEN, b"GET", b"/unload", site=site, mode=b"navigate") == 403
    assert refused(OPEN, b"GET", b"/unload?/", site=site, mode=b"navigate") == 403
    assert refused(OPEN, b"POST", b"/", site=site, mode=b"navigate") == 403
    assert refused(OPEN, b"GET", b"/", site=site, mode=b"no-cors") == 403


def test_a_link_to_the_status_page_works() -> None:
    assert judge(OPEN, b"GET", b"/?model=qwen", site=b"cross-site", mode=b"navigate") == ()


@pytest.mark.parametrize("site", [b"none", b"same-origin"])
def test_what_a_person_types_and_our_own_pages_ask_for_is_let_in(site: bytes) -> None:
    assert judge(OPEN, b"GET", b"/upstream/qwen/", site=site, mode=b"navigate") == ()
    assert judge(OPEN, b"POST", b"/gpusvc/models/qwen/stop", site=site, mode=b"navigate") == ()


def test_a_form_of_our_own_that_hides_its_origin_is_let_in() -> None:
    assert judge(OPEN, origin=b"null", site=b"same-origin") == ()


def preflight(guard: Guard, origin: bytes, headers: bytes | None, private: bytes | None = None) -> dict[bytes, bytes]:
    reply = guard.judge(
        b"OPTIONS",
        b"/v1/chat/completions",
        host=b"localhost:8484",
        origin=origin,
        request_method=b"POST",
        request_headers=headers,
        private_network=private,
    )
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body) == (204, b"")
    return dict(reply.headers)


def test_a_preflight_is_granted_what_it_asks_for() -> None:
    asked = b"authorization,content-type, x-stainless-os"
    assert preflight(LISTED, CHAT, asked, b"true") == {
        b"access-control-allow-origin": CHAT,
        b"vary": b"Origin",
        b"access-control-allow-methods": b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
        b"access-control-allow-headers": asked,
        b"access-control-allow-private-network": b"true",
        b"access-control-max-age": b"600",
    }


@pytest.mark.parametrize("asked", [None, b"", b"a\r\nb", b"a b", b"a,,b"])
def test_a_preflight_that_asks_for_no_headers_gets_none(asked: bytes | None) -> None:
    assert b"access-control-allow-headers" not in preflight(ALL, CHAT, asked)


def test_a_preflight_of_a_stranger_is_refused() -> None:
    with pytest.raises(HttpError):
        preflight(OPEN, CHAT, b"authorization")


def test_an_options_without_a_question_goes_on() -> None:
    assert judge(ALL, b"OPTIONS", origin=CHAT)[0] == (b"access-control-allow-origin", b"*")
    assert judge(OPEN, b"OPTIONS") == ()
