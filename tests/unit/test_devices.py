"""How configuration names GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.gpu.selector import DeviceSelector
from gpusvc.quantity import shown

UUID = "GPU-8a3f9e2c-1111-2222-3333-444455556666"
NAME = "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    "text", [1, "1", " 1 ", "01", UUID, UUID.lower(), "GPU-8a3f", "gpu-8A", "GPU-*6666", "*4090*", "*rtx*", NAME]
)
def test_it_means_the_gpu(text: str | int) -> None:
    assert DeviceSelector.parse(text).matches(index=1, uuid=UUID, name=NAME)


@pytest.mark.parametrize("text", [0, 10, "11", "GPU-9", "MIG-8a3f", "*3090*", "4090", "RTX 4090", "nvidia"])
def test_it_means_another_gpu(text: str | int) -> None:
    assert not DeviceSelector.parse(text).matches(index=1, uuid=UUID, name=NAME)


@pytest.mark.parametrize("text", ["", " ", "-1", -1, "+1", "12345", 12345, 10**5000, "GPU-", "mig-", "-"], ids=shown)
def test_what_is_no_gpu_is_refused_in_a_sentence(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"^.{3,200}\.$"):
        DeviceSelector.parse(text)


@pytest.mark.parametrize(
    ("text", "single"), [(0, True), (UUID, True), ("GPU-8a3f", False), ("*4090*", False), (UUID[:-1] + "*", False)]
)
def test_it_knows_whether_it_can_mean_several(text: str | int, *, single: bool) -> None:
    assert DeviceSelector.parse(text).is_single is single


@given(st.text() | st.integers(), st.text())
def test_no_value_raises_anything_but_value_error(value: str | int, name: str) -> None:
    try:
        selector = DeviceSelector.parse(value)
    except ValueError:
        return
    selector.matches(index=0, uuid=UUID, name=name)
