"""What each layer of a model keeps for the tokens that it has seen; plain numbers, whatever file they came from."""

from __future__ import annotations

from typing import NamedTuple

# No model has more; a header that says so is damaged.
MAX_COUNT = 1 << 32
MAX_LAYERS = 1 << 14


class Layer(NamedTuple):
    """One layer. All zero: it keeps nothing, or shares what another layer keeps."""

    keys: int = 0  # numbers for each token of context
    values: int = 0
    window: int = 0  # tokens that it looks back; 0: the whole context
    state_bytes: int = 0  # of a recurrent layer, for each sequence, however long it is
    heads: int = 0  # of the cache, among which tensor parallelism divides it; 0: it cannot be divided


class Shape(NamedTuple):
    """A model's layers, first to last, and the context that it was trained for, in tokens."""

    layers: tuple[Layer, ...]
    context: int


def count_of(value: object) -> int | None:
    """Return ``value`` if it is a whole number that a model could have of anything, else None."""
    return value if type(value) is int and 0 < value < MAX_COUNT else None


def is_windowed(index: int, period: int, *, dense_first: bool = False) -> bool:
    """Return whether a layer has a sliding window, where one of every ``period`` layers has none."""
    return index % period != (0 if dense_first else period - 1)
