"""A first estimate of a model's VRAM, from the files that its command names. A run that was seen knows better.

It reads headers, at most 64 MiB of each file, and no weights. A header that makes no sense gives no estimate, and no
estimate is not an estimate of zero.

The estimate is the least that the engine needs. If it is too low, the engine runs out of memory once and gpusvc learns
from it; if it is too high, a model that fits is refused for ever. So a context that the command does not ask for counts
as a short one, to which engines fall back (llama.cpp's --fit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpusvc.weights import gguf, llama_memory, vllm_memory
from gpusvc.weights.command import EngineCommand
from gpusvc.weights.parts import Estimate

_MAX_BYTES = 1 << 46


def estimate(command: Sequence[str], env: Mapping[str, str]) -> Estimate | None:
    """Return what the files that ``command`` names suggest, or None if they suggest nothing.

    Args:
        command: of the engine, with absolute paths.
        env: what its configuration adds to its environment.
    """
    asked = EngineCommand(command, {**env, **_assigned(command)})
    try:
        paths = asked.paths((llama_memory.MODEL,))
        named = llama_memory.paths_beside(paths, asked)
        ggufs = [path for path in named if not path.is_dir() and gguf.is_gguf(path)]
        if ggufs:
            found = llama_memory.of_ggufs(ggufs, asked)
        else:
            found = next(filter(None, (vllm_memory.of_safetensors(path, asked) for path in paths)), None)
    except (OSError, ValueError):
        return None
    return found if found is not None and 0 < found.bytes < _MAX_BYTES else None


def _assigned(command: Sequence[str]) -> dict[str, str]:
    """Return the variables that a command sets itself, as in ``env LLAMA_ARG_CTX_SIZE=8192 llama-server``."""
    pairs = (argument.partition("=") for argument in command if argument.startswith("LLAMA_ARG_"))
    return {name: value for name, equals, value in pairs if equals}
