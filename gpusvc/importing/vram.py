"""What a model file says of the VRAM that its model counts with before its first run.

It is a comment and not the key ``vram``: the key would hold for good, and a run that was seen knows better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gpusvc.config import presets as engines
from gpusvc.importing.draft import Draft
from gpusvc.quantity import format_size
from gpusvc.weights.estimate import estimate

# An import of hundreds of models is not to wait for their files.
_ALL_SECONDS = 1.0


def sentence(draft: Draft) -> str | None:
    """Return a sentence with the estimate for a draft; None if its files tell nothing or its file names the VRAM."""
    command = _command(draft)
    if command is None or draft.get("gpu.vram") is not None or draft.get("gpu.count") == 0:
        return None
    env = draft.get("env")
    found = estimate(command, {str(name): str(value) for name, value in env.items()} if isinstance(env, dict) else {})
    if found is None:
        return None
    if found.gpu_share is not None:
        return f"Its command lets it take {found.gpu_share:.0%} of the VRAM of each GPU. It needs {found.reason}"
    return f"Before its first run it counts as {format_size(found.bytes)} of VRAM: {found.reason}"


def add_all(drafts: Iterable[Draft], clock: Callable[[], float]) -> None:
    """Add the sentences to what drafts say of their origin, for as many drafts as can be estimated in a short time.

    Args:
        drafts: of an import.
        clock: seconds of a clock that never goes back.
    """
    end = clock() + _ALL_SECONDS
    for draft in drafts:
        if clock() >= end:
            return
        found = sentence(draft)
        if found is not None:
            draft.origin = f"{draft.origin}\n{found}"


def _command(draft: Draft) -> list[str] | None:
    """Return the engine's command; None if the preset is unknown."""
    command, args, model = draft.get("command"), draft.get("args"), draft.get("model")
    if isinstance(command, list):
        return [str(word) for word in command]
    preset = engines.PRESETS.get(str(draft.get("engine")))
    if preset is None or not isinstance(model, str):
        return None
    served = engines.Served(model, (draft.name,), 1)
    return [*preset.command(served), *(str(word) for word in (args if isinstance(args, list) else []))]
