"""Durations and sizes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.quantity import (
    GIB,
    MAX_DURATION_SECONDS,
    MAX_SIZE_BYTES,
    MIB,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    shown,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("2h30m", 9000),
        ("15min", 900),
        ("1h 30min", 5400),
        ("1h30min", 5400),
        (" 5 min ", 300),
        ("2 hours 1minute", 7260),
        ("48hr", 172800),
        ("55s500ms", 55.5),
        ("300ms20s 5day", 432020.3),
        ("1.5h", 5400),
        ("1y 12month", 365.25 * 86400 + 12 * 30.44 * 86400),
        ("1w 2d", 9 * 86400),
        ("5M", 5 * 30.44 * 86400),
        ("5m", 300),
        ("7us", 7e-6),
        ("7µs", 7e-6),
        ("7μs", 7e-6),
        ("30", 30),
        ("0", 0),
        (30, 30),
        (0.25, 0.25),
    ],
)
def test_a_duration_is_written_as_in_systemd(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "s",
        "-5s",
        "5 parsecs",
        "1h30",
        "1h 30",
        "5,5s",
        "1..5s",
        ".5s",
        "5S",
        "inf",
        "infinity",
        "nan",
        "1e3s",
        "٣s",
        "5s;",
        "200y",
        "9" * 5000,
        "9" * 5000 + "s",
        -1,
        -0.5,
        math.nan,
        math.inf,
        10**400,
    ],
    ids=shown,
)
def test_what_is_no_duration_is_refused_in_a_sentence(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"^.{3,200}\.$"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("9GiB", 9 * GIB),
        ("512M", 512 * MIB),
        ("9.5G", 9 * GIB + GIB // 2),
        ("9.5 GB", 9 * GIB + GIB // 2),
        ("24gb", 24 * GIB),
        ("1k", 1024),
        ("1T", 1024 * GIB),
        ("1024PiB", MAX_SIZE_BYTES),
        ("17", 17),
        ("17B", 17),
        ("0", 0),
        (17, 17),
        ("1152921504606846975B", MAX_SIZE_BYTES - 1),
    ],
)
def test_a_size_is_in_powers_of_1024(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1G", "1 E", "1Gb/s", "1G 1M", "1,5G", "nan", "inf", "0x10", "٣G", "9" * 5000, -1, 2**61, 10**5000],
    ids=shown,
)
def test_what_is_no_size_is_refused_in_a_sentence(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"^.{3,200}\.$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (0.0004, "0s"),
        (0.25, "250ms"),
        (0.9996, "1s"),
        (1.2, "1.2s"),
        (59.9996, "1min"),
        (90, "1min 30s"),
        (5400, "1h 30min"),
        (90061.4, "1d 1h 1min 1s"),
    ],
)
def test_a_duration_is_shown_as_systemd_would_take_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (9 * GIB, "9.0 GiB"),
        (GIB - 1, "1.0 GiB"),
        (-GIB, "-1.0 GiB"),
        (2**62, "4096.0 PiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, int(MAX_DURATION_SECONDS)))
def test_whole_seconds_survive_being_shown_and_read(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.floats(0, MAX_DURATION_SECONDS - 1))
def test_a_duration_that_is_shown_and_read_is_off_by_less_than_what_is_not_shown(seconds: float) -> None:
    tolerance = 0.000501 if seconds < 59 else 0.5011
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=tolerance, rel=0)


@given(st.integers(0, MAX_SIZE_BYTES))
def test_a_size_that_is_shown_and_read_is_off_by_less_than_a_twentieth_of_its_unit(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.0501)


@given(st.integers(0, MAX_SIZE_BYTES))
def test_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


@given(st.text() | st.from_regex(r"[0-9. ]*[a-zµ]*", fullmatch=True))
def test_no_text_raises_anything_but_value_error(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert str(error).endswith(".")  # noqa: PT017 - either outcome is right


def test_what_is_long_is_cut_where_it_is_shown() -> None:
    assert shown("x" * 1000) == "'" + "x" * 56 + "…'"
    assert "digits" in shown(10**5000)
