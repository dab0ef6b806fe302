"""Where requests go, by method and target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.keys import Right
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.routes import Route, Target, dialect_of, names_in, route
from gpusvc.gateway.http.replies import Dialect, HttpError
from gpusvc.gateway.http.target import in_origin_form


def to_model(path: bytes, name: str | None = None, dialect: Dialect = Dialect.OPENAI) -> Route:
    return Route(Target.MODEL, Right.USE, dialect, name, path)


def status_of(method: bytes, target: bytes) -> int:
    with pytest.raises(HttpError) as caught:
        route(method, target)
    return caught.value.status


@pytest.mark.parametrize("prefix", [b"/v1", b""])
@pytest.mark.parametrize(
    "path",
    """
    /chat/completions /completions /responses /responses/resp_1/input_items /embeddings /audio/speech
    /audio/transcriptions /audio/translations /images/generations /images/edits /rerank /moderations /files/a%2Fb
    /completion /infill /tokenize /apply-template /slots /slots/0?action=save /props /lora-adapters /score /pooling
    /sdapi/v1/txt2img /anything
    """.split(),  # noqa: SIM905
)
def test_any_path_goes_to_a_model_as_it_is(prefix: bytes, path: str) -> None:
    target = prefix + path.encode()
    assert route(b"POST", target) == route(b"GET", target) == to_model(target)


@pytest.mark.parametrize(
    "path", [b"/v1/messages", b"/v1/messages/count_tokens", b"/messages", b"/v1/messages?beta=true"]
)
def test_anthropic_paths_are_answered_in_its_dialect(path: bytes) -> None:
    assert route(b"POST", path) == to_model(path, dialect=Dialect.ANTHROPIC)
    assert dialect_of(path) is dialect_of(b"/upstream/qwen" + path) is Dialect.ANTHROPIC
    assert route(b"POST", b"/upstream/qwen" + path).dialect is Dialect.ANTHROPIC
    assert dialect_of(b"/v1/messagesx") is dialect_of(b"/v1/chat/completions") is Dialect.OPENAI


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (b"model=qwen", "qwen"),
        (b"a=1&model=Qwen%2FQwen3+8B&model=other", "Qwen/Qwen3 8B"),
        (b"model=%C3%A4", "ä"),
        (b"model=%ff", "\ufffd"),
        (b"model=&models=x", None),
        (b"xmodel=a", None),
        (b"MODEL=a", None),
        (b"", None),
    ],
)
def test_the_query_may_name_the_model_and_is_sent_on(query: bytes, name: str | None) -> None:
    assert route(b"GET", b"/props?" + query) == to_model(b"/props?" + query, name)


def test_metrics_are_the_gateways_but_for_those_of_a_model() -> None:
    assert route(b"GET", b"/metrics") == Route(Target.MANAGEMENT, Right.METRICS, Dialect.OPENAI, None, b"/metrics")
    assert route(b"GET", b"/metrics?model=qwen") == to_model(b"/metrics?model=qwen", "qwen")


@pytest.mark.parametrize("path", [b"/v1/models", b"/models", b"/v1/models?details"])
def test_the_list_of_models_is_read_only(path: bytes) -> None:
    assert route(b"GET", path).target is route(b"HEAD", path).target is Target.MODELS
    with pytest.raises(HttpError) as caught:
        route(b"POST", path)
    assert (caught.value.status, caught.value.headers) == (405, ((b"allow", b"GET, HEAD"),))


@pytest.mark.parametrize("path", [b"/v1/models/Qwen/Qwen3", b"/models/Qwen%2FQwen3"])
def test_a_model_of_the_list_may_have_slashes_encoded_or_not(path: bytes) -> None:
    found = route(b"GET", path)
    assert (found.target, found.name, found.right) == (Target.MODEL_CARD, "Qwen/Qwen3", Right.USE)


@pytest.mark.parametrize(
    "target",
    """
    / /?x=1 /gpusvc /gpusvc/models/qwen/start /gpusvc/static/page.css /running /unload /api/models/unload
    /api/models/unload/qwen /backend/shutdown /openapi.json
    """.split(),  # noqa: SIM905
)
def test_management_needs_the_admins_right(target: str) -> None:
    found = route(b"POST", target.encode())
    assert (found.target, found.right, found.path) == (Target.MANAGEMENT, Right.ADMIN, target.encode())


@pytest.mark.parametrize("target", [b"/gpusvcx", b"/running/x", b"/%67pusvc/models", b"/GPUSVC/models", b"/unload/x"])
def test_nothing_that_only_looks_like_it_is_management(target: bytes) -> None:
    assert route(b"POST", target).target is Target.MODEL


def test_health_is_for_everybody() -> None:
    assert route(b"GET", b"/health?x").right is None
    assert route(b"OPTIONS", b"*").target is route(b"HEAD", b"/healthz").target is Target.HEALTH
    assert status_of(b"POST", b"/health") == 405


@pytest.mark.parametrize("target", [b"/favicon.ico", b"/robots.txt", b"/.well-known/x", b"/apple-touch-icon.png"])
def test_what_browsers_ask_for_unasked_loads_no_model(target: bytes) -> None:
    assert status_of(b"GET", target) == 404


# An engine's own pages


@pytest.mark.parametrize(
    ("target", "name", "path"),
    [
        (b"/upstream/qwen/", "qwen", b"/"),
        (b"/upstream/qwen/v1/models?x=1", "qwen", b"/v1/models?x=1"),
        (b"/upstream/qwen", "qwen", b""),
        (b"/upstream/qwen?x=1", "qwen", b"?x=1"),
        (b"/upstream/qwen//a%2Fb", "qwen", b"//a%2Fb"),
        (b"/upstream/Qwen%2FQwen3/a", "Qwen/Qwen3", b"/a"),
        (b"/upstream/q:4_K.M-x/gpusvc/models", "q:4_K.M-x", b"/gpusvc/models"),
    ],
)
def test_upstream_names_the_model_in_the_path(target: bytes, name: str, path: bytes) -> None:
    assert route(b"GET", target) == Route(Target.NAMED, Right.USE, Dialect.OPENAI, name, path)


@pytest.mark.parametrize("target", [b"/upstream/", b"/upstream//x"])
def test_upstream_without_a_name_leads_nowhere(target: bytes) -> None:
    assert status_of(b"GET", target) == 404


def test_a_name_may_go_over_as_many_slashes_as_names_have() -> None:
    named = route(b"GET", b"/upstream/Qwen/Qwen3%208B/a/b?c/d")
    assert list(names_in(named, 1)) == [
        ("Qwen", b"/Qwen3%208B/a/b?c/d"),
        ("Qwen/Qwen3 8B", b"/a/b?c/d"),
    ]
    assert [name for name, _ in names_in(named, 9)][2:] == ["Qwen/Qwen3 8B/a", "Qwen/Qwen3 8B/a/b"]
    assert list(names_in(route(b"GET", b"/upstream/a/"), 9)) == [("a", b"/")]
    assert list(names_in(route(b"GET", b"/upstream/a%2Fb/c"), 1)) == [("a/b", b"/c")]


def test_a_missing_slash_is_redirected_to_by_any_method() -> None:
    redirect = routes.to_pages("Qwen/\r\nX: y", b"?a")
    assert redirect.status == 308
    assert redirect.headers == ((b"location", b"/upstream/Qwen%2F%0D%0AX%3A%20y/?a"),)


# Targets that go nowhere


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"v1/models",
        b"/a b",
        b"/a\x00",
        b"/a\r\nb",
        b"/\x7f",
        b"/\xc3\xa4",
        b"/a#b",
        b"/a\\..\\b",
        b"/a?\xff",
        b"/a?b#c",
        b"/a%",
        b"/a%4",
        b"/a%zz",
        b"/a%00b",
        b"/a%0d%0a",
        b"/a%7F",
        b"/.",
        b"/..",
        b"/../gpusvc/models",
        b"/v1/../gpusvc/models",
        b"/v1/./models",
        b"/upstream/qwen/../../gpusvc",
        b"/upstream/..",
        b"/upstream/%2e%2e/gpusvc",
        b"/a/%2E./b",
        b"/a/..%2fgpusvc",
        b"/a%2f..%2fb",
        b"/a/..%5cb",
        b"*",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_target_that_could_be_read_in_two_ways_is_refused(method: bytes, target: bytes) -> None:
    assert status_of(method, target) == 400


@pytest.mark.parametrize(
    "target", [b"/v1/files/a%2Fb", b"/...", b"/.hidden/x", b"/a..b", b'/a?f={"b":[1|2]}^`\'', b"/a?%"]
)
def test_what_is_only_odd_goes_through(target: bytes) -> None:
    assert route(b"GET", target) == to_model(target)


def test_slashes_at_the_beginning_are_one() -> None:
    assert route(b"POST", b"//v1/chat/completions") == to_model(b"/v1/chat/completions")
    assert route(b"POST", b"///gpusvc/models").target is Target.MANAGEMENT


@pytest.mark.parametrize(("method", "status"), [(b"TRACE", 405), (b"CONNECT", 405), (b"BREW", 501), (b"get", 501)])
def test_methods_that_nobody_serves_are_refused(method: bytes, status: int) -> None:
    assert status_of(method, b"/v1/chat/completions") == status


@pytest.mark.parametrize(
    ("target", "authority", "path"),
    [
        (b"http://gpu:8484/v1/models?a", b"gpu:8484", b"/v1/models?a"),
        (b"HTTP://gpu", b"gpu", b"/"),
        (b"https://[::1]?a=/", b"[::1]", b"/?a=/"),
        (b"http://gpu/http://other/", b"gpu", b"/http://other/"),
    ],
)
def test_a_target_with_scheme_and_authority_is_taken_apart(target: bytes, authority: bytes, path: bytes) -> None:
    assert in_origin_form(b"GET", target) == (authority, path)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        (b"CONNECT", b"gpu:443", 405),
        (b"GET", b"gpu:443", 400),
        (b"GET", b"*", 400),
        (b"GET", b"ftp://gpu/", 400),
        (b"GET", b"http://user@gpu/", 400),
        (b"GET", b"http:///x", 400),
        (b"GET", b"", 400),
    ],
)
def test_other_forms_of_a_target_are_refused(method: bytes, target: bytes, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        in_origin_form(method, target)
    assert caught.value.status == status


def test_the_target_of_a_ping_is_a_star() -> None:
    assert in_origin_form(b"OPTIONS", b"*") == (None, b"*")


# What holds for all input


TARGETS = st.binary() | st.lists(
    st.sampled_from(
        [b"/", b"..", b".", b"%2e", b"%2F", b"%5c", b"upstream", b"gpusvc", b"v1", b"models", b"?", b"qwen"]
    )
).map(lambda parts: b"/" + b"".join(parts))


@given(st.sampled_from([b"GET", b"POST", b"OPTIONS", b"PUT"]), TARGETS)
def test_no_target_leads_out_of_where_it_goes(method: bytes, target: bytes) -> None:
    try:
        found = route(method, target)
    except HttpError as error:
        assert error.status in (400, 404, 405)  # noqa: PT017 - either outcome is right
        return
    path = found.path.partition(b"?")[0]
    decoded = path.lower().replace(b"%2e", b".").replace(b"%2f", b"/").replace(b"%5c", b"/")
    assert not {b".", b".."} & set(decoded.split(b"/"))
    assert all(0x20 < character < 0x7F for character in found.path)
    assert path.startswith(b"/") or (found.target is Target.NAMED and not path)
    if found.target is Target.MANAGEMENT:
        assert found.right in (Right.ADMIN, Right.METRICS)


@given(st.sampled_from(sorted(routes._POSTED)))
def test_the_short_cut_gives_what_the_long_way_gives(target: bytes) -> None:
    assert route(b"POST", target) == route(b"GET", target)
