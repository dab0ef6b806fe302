"""The service manager over D-Bus, and what a service tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpusvc.systemd.manager import Manager

__all__ = ["Manager"]


def __getattr__(name: str) -> Any:
    """Hand out ``Manager``: a launcher of version 0.1.0 that is still running imports it from here when it ends."""
    if name == "Manager":
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  ``gpusvc.systemd.notify`` needs no D-Bus

        return Manager
    raise AttributeError(name)
