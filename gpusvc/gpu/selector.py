"""How configuration names GPUs: by index, by UUID or by a pattern of the product's name."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase

from gpusvc.quantity import shown
from gpusvc.record import Record

# nvmlDeviceGetUUID() returns "GPU-" or "MIG-" and then 36 characters.
_UUID_PREFIXES = ("gpu-", "mig-")
_UUID_LENGTH = 40


class SelectorKind(StrEnum):
    INDEX = "index"
    UUID = "uuid"
    NAME = "name"


class DeviceSelector(Record):
    """One entry of ``devices`` or ``exclude``."""

    kind: SelectorKind
    pattern: str  # in lower case; for an index its digits

    @classmethod
    def parse(cls, value: str | int) -> DeviceSelector:
        """Read an index (``0``, ``"0"``), a UUID or its beginning (``"GPU-8a3f"``), or a name (``"*4090*"``).

        Raises:
            ValueError: one sentence on what is wrong.
        """
        pattern = str(value).strip().lower() if isinstance(value, str) or abs(value) < 10**6 else "-"
        if pattern.isascii() and pattern.isdigit() and len(pattern) <= 4:
            return cls(SelectorKind.INDEX, str(int(pattern)))
        if not pattern or pattern.lstrip("+-").isdigit() or pattern in ("-", *_UUID_PREFIXES):
            raise ValueError(f"{shown(value)} is not a GPU: give an index, a UUID or a name pattern.")
        kind = SelectorKind.UUID if pattern.startswith(_UUID_PREFIXES) else SelectorKind.NAME
        return cls(kind, pattern)

    def matches(self, *, index: int, uuid: str, name: str) -> bool:
        """Return whether it selects the GPU of this NVML index, UUID and product name, in any case of letters."""
        match self.kind:
            case SelectorKind.INDEX:
                return int(self.pattern) == index
            case SelectorKind.UUID:
                return fnmatchcase(uuid.lower(), self.pattern + "*")
            case SelectorKind.NAME:
                return fnmatchcase(name.lower(), self.pattern)

    @property
    def is_single(self) -> bool:
        """Whether it selects one GPU at most."""
        return self.kind is SelectorKind.INDEX or (
            self.kind is SelectorKind.UUID and len(self.pattern) >= _UUID_LENGTH and "*" not in self.pattern
        )
