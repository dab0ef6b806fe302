"""The targets of tests/fuzz hold for good input, and for what becomes of it; a fuzzer looks further."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

names = pytest.mark.parametrize("name", sorted(TARGETS))


@names
def test_good_input_is_taken(name: str) -> None:
    assert [TARGETS[name].check(seed) for seed in TARGETS[name].seeds] == [True] * len(TARGETS[name].seeds)


@names
@given(data=st.data())
def test_what_becomes_of_it_breaks_no_promise(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    seed = bytearray(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(seed)))
        end = data.draw(st.integers(start, min(start + 8, len(seed))))
        seed[start:end] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b'"', b"\r\n", b"\0", b"{", b"\\", b"\xff"])
        )
    target.check(bytes(seed))


@names
@given(content=st.binary(max_size=60))
def test_neither_does_anything_else(name: str, content: bytes) -> None:
    TARGETS[name].check(content)
