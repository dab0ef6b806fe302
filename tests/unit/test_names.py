"""Names of models and of their units."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc import names
from gpusvc.errors import UsageError

NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9:_.-]{0,199}\Z")


@pytest.mark.parametrize("text", ["q", "7b", "qwen3-8b", "Qwen3:8B", "a..b", "x.service", "x" * names.MAX_LENGTH])
def test_it_is_a_name(text: str) -> None:
    assert names.is_name(text)
    assert names.parse_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "-q",
        "_q",
        ":q",
        ".hidden",
        "a/b",
        "../q",
        "a b",
        "a\n",
        "q\0",
        "é",
        "٣",
        "a@b",
        "a\\x2d",
        "x" * 201,
    ],
)
def test_it_is_no_name(text: str) -> None:
    assert not names.is_name(text)
    with pytest.raises(UsageError, match=r"cannot be a model's name\."):
        names.parse_name(text)


@pytest.mark.parametrize("text", ["model@qwen", "model@qwen.service"])
def test_a_unit_stands_for_its_model(text: str) -> None:
    assert names.parse_name(text) == "qwen"


@pytest.mark.parametrize("text", ["model@", "model@.service", "model@-q.service", "model@a@b"])
def test_a_unit_that_no_model_can_have_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        names.parse_name(text)


def test_a_refusal_does_not_repeat_a_novel() -> None:
    with pytest.raises(UsageError) as caught:
        names.parse_name("/" * 100_000)
    assert len(str(caught.value)) < 300


@given(NAMES)
def test_a_service_leads_back_to_its_model(name: str) -> None:
    assert names.of_service(names.service(name)) == name
    assert names.parse_name(names.service(name)) == name


@given(NAMES)
def test_units_are_names_that_systemd_takes_without_escaping(name: str) -> None:
    for unit in (names.service(name), names.scope(name)):
        assert len(unit) <= 255
        assert set(unit) <= set(string.ascii_letters + string.digits + ":-_.@")


@pytest.mark.parametrize(
    "unit", ["dbus.service", "model@.service", "model-qwen.scope", "model@qwen.socket", "xmodel@q.service"]
)
def test_other_units_are_no_models(unit: str) -> None:
    assert names.of_service(unit) is None


@given(st.text())
def test_no_text_raises_anything_but_a_usage_error(text: str) -> None:
    names.of_service(text)
    try:
        name = names.parse_name(text)
    except UsageError:
        assert not names.is_name(text)
    else:
        assert names.is_name(name)
