"""Durations and sizes as people write them.

Durations follow systemd.time(7): ``10s``, ``15min``, ``2h30m``, ``1h 30min``, ``500ms``; a bare number is seconds.
Sizes follow systemd and nvidia-smi: ``9GiB``, ``512M``, ``9.5G``; every unit is a power of 1024, also ``KB``, ``MB``
and ``GB``, because a "24 GB" card has 24 GiB; a bare number is bytes.
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MAX_SIZE_BYTES = 2**60
MAX_DURATION_SECONDS = 100 * 365.25 * 86400

_SECONDS = {
    spelling: seconds
    for seconds, spellings in (
        (1e-6, "usec us µs μs"),  # both micro signs, U+00B5 and U+03BC, as systemd accepts them
        (1e-3, "msec ms"),
        (1.0, "seconds second sec s"),
        (60.0, "minutes minute min m"),
        (3600.0, "hours hour hr h"),
        (86400.0, "days day d"),
        (7 * 86400.0, "weeks week w"),
        (30.44 * 86400, "months month M"),
        (365.25 * 86400, "years year y"),
    )
    for spelling in spellings.split()
}

_PREFIXES = "KMGTP"
_BYTES: dict[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: 1024**power for power, prefix in enumerate(_PREFIXES, start=1) for suffix in ("", "B", "IB")
}

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)[ \t]*([A-Za-zµμ]*)[ \t]*")


def parse_duration(value: str | float) -> float:
    """Return seconds, from a text such as ``2h30m``, or from a number of seconds.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    seconds = _duration_of_text(value) if isinstance(value, str) else value
    if not 0 <= seconds <= MAX_DURATION_SECONDS:  # also false for NaN
        raise ValueError(f"{shown(value)} is out of range: a duration is between 0 and 100 years.")
    return float(seconds)


def _duration_of_text(text: str) -> float:
    total = 0.0
    rest = text.strip()
    position = 0
    while part := _PART.match(rest, position):
        number, unit = part.groups()
        if not unit and part.span() != (0, len(rest)):
            raise ValueError(f"{shown(text)} is not a duration: {number} has no unit.")
        if unit and unit not in _SECONDS:
            raise ValueError(f"{shown(text)} is not a duration: {shown(unit)} is no unit of time.")
        total += float(number) * _SECONDS.get(unit, 1.0)
        position = part.end()
    if position == 0 or position < len(rest):
        raise ValueError(f"{shown(text)} is not a duration.")
    return total


def parse_size(value: str | int) -> int:
    """Return bytes, from a text such as ``9.5G``, or from a number of bytes.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    size = _size_of_text(value) if isinstance(value, str) else value
    if not 0 <= size <= MAX_SIZE_BYTES:
        raise ValueError(f"{shown(value)} is out of range: a size is between 0 and 1024 PiB.")
    return round(size)


def _size_of_text(text: str) -> int | float:
    part = _PART.fullmatch(text.strip())
    if part is None:
        raise ValueError(f"{shown(text)} is not a size.")
    number, unit = part.groups()
    factor = _BYTES.get(unit.upper())
    if factor is None:
        raise ValueError(f"{shown(text)} is not a size: {shown(unit)} is no unit of bytes.")
    approximate = float(number) * factor
    # Whole numbers stay exact. Very long ones stay floats and are refused as too large: int() raises for them.
    return approximate if "." in number or approximate > MAX_SIZE_BYTES else int(number) * factor


def format_duration(seconds: float) -> str:
    """Return ``250ms``, ``1.2s``, ``1h 30min``: milliseconds below a minute, seconds above; never negative."""
    milliseconds = max(0, round(seconds * 1000))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    rest = round(milliseconds / 1000)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts)


def format_size(size: int) -> str:
    """Return ``9.0 GiB``, ``512.0 MiB``, ``17 B``: one decimal, in the largest unit that gives 1 or more."""
    if abs(size) < KIB:
        return f"{size} B"
    value = float(size)
    for prefix in _PREFIXES:
        value /= 1024
        if abs(value) < 1023.95 or prefix == _PREFIXES[-1]:  # 1023.96 would print as 1024.0
            break
    return f"{value:.1f} {prefix}iB"


def format_amount(size: int | None) -> str:
    """As format_size(), with a phrase for None (unknown)."""
    return "an unknown amount" if size is None else format_size(size)


def shown(value: object) -> str:
    """Return ``value`` as a message quotes it: its repr, at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…" + text[-1]
