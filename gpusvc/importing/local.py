"""A model file for what is on this machine: a GGUF file, a directory of safetensors, or a command.

The engine's preset supplies what the engine needs. Unknown values are left out, so that the defaults apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpusvc.config import presets as engines
from gpusvc.errors import UsageError
from gpusvc.importing import commandline, gpu_options, vram
from gpusvc.importing.draft import Draft
from gpusvc.weights import description, gguf
from gpusvc.weights.description import FileKind

# The option of each engine that sets the length of the context.
_CONTEXT = {"llama-server": "-c", "vllm": "--max-model-len", "sglang": "--context-length"}

# Engines that serve a directory, by preference, and the program that shows that one is installed.
_SERVE_DIRECTORIES = {"vllm": "vllm", "sglang": "sglang"}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a person asked for besides the model. None, 0 or empty: nothing."""

    engine: str = ""
    args: tuple[str, ...] = ()
    context: int = 0  # tokens
    gpus: int | None = None
    vram: str = ""
    aliases: tuple[str, ...] = ()
    port: int = 0
    health: str | None = None
    user: str = ""


def is_model(path: Path) -> bool:
    """Return whether ``path`` counts as a model rather than as a program."""
    if path.is_dir():
        return True
    try:
        return path.suffix == ".gguf" or description.describe(path) is not None
    except OSError:
        return False


def of_path(name: str, path: Path, wishes: Wishes) -> Draft:
    """Return the draft for a model that a preset serves.

    Raises:
        UsageError: it is not a model that an engine serves.
        OSError: it cannot be read.
    """
    file = path.absolute()
    beside: tuple[str, ...] = ()
    if file.is_dir() and (ggufs := description.ggufs_in(file)):
        if len(ggufs) > 1:
            listed = ", ".join(found.name for found in ggufs)
            raise UsageError(f"{path} has several models: {listed}.", hint="Name one of the files.")
        projectors = description.projectors_in(file)
        beside = ("--mmproj", str(projectors[0])) if len(projectors) == 1 else ()
        file = ggufs[0]
    file = gguf.first_part(file)
    found = description.describe(file)
    if found is None:
        what = "a directory without GGUF or safetensors files" if file.is_dir() else "not a GGUF file"
        raise UsageError(f"{path} is {what}.", hint="For another engine give its command: gpusvc add NAME -- COMMAND")
    if found.kind in (FileKind.PROJECTOR, FileKind.ADAPTER):
        raise UsageError(
            f"{path} is the {found.kind} of a model, not a model.", hint="Name the model, and this file after --."
        )
    engine = wishes.engine or ("llama-server" if found.kind is FileKind.GGUF else _directory_engine())
    draft = Draft(name, str(found))
    draft.put("engine", engine)
    draft.put("model", str(file))
    context = (_CONTEXT[engine], str(wishes.context)) if wishes.context and engine in _CONTEXT else ()
    draft.extend("args", [*beside, *context, *wishes.args])
    _put_wishes(draft, wishes)
    _add_estimate(draft, wishes)
    return draft


def of_command(name: str, command: Sequence[str], wishes: Wishes) -> Draft:
    """Return the draft for a model that is a command.

    Raises:
        UsageError: an option is given that only presets have.
    """
    if wishes.engine or wishes.context:
        raise UsageError("--engine and --context are not for a command, which names its engine and its context itself.")
    reports: list[gpu_options.Report] = []
    draft = Draft(name, "")
    program, *arguments = gpu_options.settle(draft, command, {}, reports)
    if "/" in program:
        program = str(Path(program).absolute())
    draft.origin = "\n".join(f"{report.subject}: {report.reason}" for report in reports)
    draft.put("command", [program, *arguments])
    if not any(engines.PORT in argument for argument in command):
        draft.put("port", commandline.fixed_port(command))
    _put_wishes(draft, wishes)
    _add_estimate(draft, wishes)
    return draft


def _directory_engine() -> str:
    """Return vllm, or sglang if only that is installed."""
    for engine, program in _SERVE_DIRECTORIES.items():
        try:
            engines.find_program(program, {})
        except ValueError:
            continue
        return engine
    return "vllm"


def _put_wishes(draft: Draft, wishes: Wishes) -> None:
    draft.extend("aliases", wishes.aliases)
    draft.put("user", wishes.user or None)
    draft.put("port", wishes.port or draft.get("port"))
    draft.put("health", wishes.health)
    draft.carry_key()
    count = wishes.gpus if wishes.gpus is not None else draft.get("gpu.count")
    draft.put("gpu.count", count if count != 1 else None)
    draft.put("gpu.vram", wishes.vram or None)


def _add_estimate(draft: Draft, wishes: Wishes) -> None:
    """Say with how much VRAM the first start counts, and what for."""
    if not wishes.vram:
        found = vram.sentence(draft) or "How much VRAM it takes is unknown before its first run."
        draft.origin = f"{draft.origin}\n{found}".strip()
