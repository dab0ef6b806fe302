"""Whether the kernel's OOM killer killed a process of a control group, and which memory limit was reached.

This is about the machine's memory. The kernel's OOM killer does not manage VRAM.
"""

from __future__ import annotations

from collections.abc import Mapping


def account(events: Mapping[str, int], limit: str | None) -> str | None:
    """Return a phrase about the processes of a group that the kernel killed to free memory; None if it killed none.

    Args:
        events: the group's memory.events, counted since the group was made. ``oom``: a limit of the group itself was
            reached. ``oom_kill``: one of its processes was killed, whichever limit was reached.
        limit: the MemoryMax= that its model file sets.
    """
    if not events.get("oom_kill"):
        return None
    if events.get("oom"):
        reached = "its memory limit" if limit is None else f"its memory limit (MemoryMax={limit})"
        return f"the kernel's OOM killer killed a process of it, because it reached {reached}"
    return (
        "the kernel's OOM killer killed a process of it, because memory ran out outside its own limits:"
        " in a slice above it, or on the whole machine"
    )
