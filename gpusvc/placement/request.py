"""What placement knows of models: the request, the models that are there, their claims, and the starts that wait."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gpusvc.record import Record
from gpusvc.state import footprints

# Stands for host memory where bytes are counted by the GPU's UUID.
HOST_MEMORY = footprints.HOST_MEMORY


class Request(Record):
    """What a model asks for. ``needs`` is in bytes by the GPU's UUID; without an entry it is unknown.

    An entry for HOST_MEMORY is met beside those of the GPUs.
    """

    model: str
    count: int
    devices: tuple[str, ...] = ()
    needs: Mapping[str, int] = MappingProxyType({})
    declared_ram_bytes: int = 0
    """How much of the need for host memory is declared. The rest was learned or estimated."""
    exclusive: frozenset[str] = frozenset()
    clears: bool = False
    """Evict all idle models of the chosen GPUs: the need was unknown, and the model ran out of memory."""


class Claim(Record):
    """Bytes of one GPU that a model was promised and has not taken: it is loading, or its release is not proven."""

    model: str
    gpu_uuid: str
    bytes: int
    loading: bool
    is_open: bool = False
    """The need is unknown: until the model is ready, it may take all that is free on the GPU or becomes free."""


class Resident(Record):
    """Another model that counts as active. ``gives`` is what its end gives back, in bytes by the GPU's UUID."""

    model: str
    gives: Mapping[str, int]
    priority: int
    last_use: float
    """The time of the last use, by one clock for all residents."""
    busy: bool
    pinned: bool = False
    loading: bool = False
    leaving: bool = False
    """It is being evicted, or its engine has ended and its release is being proven: it will be gone soon."""
    stuck: bool = False
    """Its release is not proven, and nobody works on that: it stays."""
    spared: bool = False
    """This start may not evict it: it is a restart by systemd that no request waits for."""
    exclusive: frozenset[str] = frozenset()

    @property
    def is_settled(self) -> bool:
        """Whether it is ready and stays until somebody evicts it, and eviction is allowed."""
        return not (self.pinned or self.loading or self.leaving or self.stuck or self.spared)

    @property
    def worth(self) -> tuple[int, float, str]:
        """The order of eviction: the least value goes first."""
        return (self.priority, self.last_use, self.model)


class Wish(Record):
    """What a waiting start will take: bytes by the GPU's UUID, and the models that leave for it."""

    model: str
    bytes: Mapping[str, int]
    victims: tuple[str, ...]
    priority: int = 0
    exclusive: frozenset[str] = frozenset()
    is_model: bool = True
    """False: room for another program. It does not count for ``max_active``."""


def exclude_each_other(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two models may not run together, by the entries of their ``exclusive``.

    ``GROUP`` excludes everything else in the group; ``GROUP/SIDE`` everything but the same side of the group.
    """
    if not one or not other:
        return False
    sides = dict(_group_and_side(entry) for entry in other)
    return any(group in sides and not (side and side == sides[group]) for group, side in map(_group_and_side, one))


def _group_and_side(entry: str) -> tuple[str, str]:
    group, _, side = entry.partition("/")
    return group, side
