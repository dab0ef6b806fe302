"""The kernel's OOM killer among the processes of a control group: whether it came, and for whose limit.

Of the machine's memory; what a GPU has is no business of the kernel's.
"""

from __future__ import annotations

from collections.abc import Mapping


def account(events: Mapping[str, int], limit: str | None) -> str | None:
    """What to say of a group whose processes the kernel killed for want of memory; None if it killed none.

    Args:
        events: the group's memory.events, which count since it was made: ``oom``, that a limit of its own was
            reached, and ``oom_kill``, that one of its processes was killed, for whatever limit.
        limit: the MemoryMax= that its model file sets.
    """
    if not events.get("oom_kill"):
        return None
    if events.get("oom"):
        reached = "its memory limit" if limit is None else f"its memory limit (MemoryMax={limit})"
        return f"the kernel's OOM killer came, as it reached {reached}"
    return "the kernel's OOM killer came, as memory ran out beyond its own limits: in a slice above it, or altogether"
