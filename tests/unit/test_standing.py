"""What a model takes, as far as was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from gpusvc.status.standing import Standing, learned_bytes

GIB = 1 << 30

PEAKS = {"4090": 9 * GIB, "A100": 10 * GIB}


@pytest.mark.parametrize(
    ("peaks", "gpu_names", "count", "expected"),
    [
        (PEAKS, ["4090"], 1, 9 * GIB),
        (PEAKS, ["4090", "A100"], 2, 19 * GIB),
        (PEAKS, ["H100"], 1, None),
        (PEAKS, [None], 1, 10 * GIB),
        (PEAKS, [], 2, 20 * GIB),
        (PEAKS | {"host memory": 99 * GIB}, [], 1, 10 * GIB),
        ({}, ["4090"], 1, None),
        ({}, [], 1, None),
    ],
    ids=[
        "its GPU's type",
        "each of its GPUs by its type",
        "never seen on this type",
        "a GPU that NVML does not name: the most of all types",
        "stopped: the most of all types, for each GPU",
        "stopped: host memory is no GPU",
        "never seen",
        "stopped, and never seen",
    ],
)
def test_what_was_learned_is_told_for_all_gpus_together(
    peaks: Mapping[str, int], gpu_names: Sequence[str | None], count: int, expected: int | None
) -> None:
    assert learned_bytes(peaks, gpu_names, count) == expected


@pytest.mark.parametrize(
    ("by_file", "by_hand", "pinned"),
    [(None, False, False), (False, False, False), (True, False, True), (None, True, True), (False, True, True)],
)
def test_a_model_is_pinned_by_its_file_or_by_hand(by_file: bool | None, by_hand: bool, pinned: bool) -> None:
    standing = Standing(
        in_use=False,
        last_use=None,
        pinned_by_file=by_file,
        pinned_by_hand=by_hand,
        priority=None,
        declared_bytes=None,
        learned_bytes=None,
    )
    assert standing.pinned is pinned
