"""The GPUs that an engine's command asks for, as ``[gpu]`` of a model file says it.

An engine of gpusvc sees the GPUs that it gets and no others, and counts them from 0. So what picks GPUs by their number
leaves the command. What stays in it and does not fit the result is reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from gpusvc.config.model import OWNED_VARIABLES
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.importing import commandline, shell
from gpusvc.importing.draft import Draft

VISIBLE = "CUDA_VISIBLE_DEVICES"

DEVICE = ("-dev", "--device")
_MAIN = ("-mg", "--main-gpu")
_MODE = ("-sm", "--split-mode")
_SHARES = ("-ts", "--tensor-split")

# Each multiplies the number of GPUs.
_WAYS = (
    ("-tp", "--tensor-parallel-size", "--tp-size", "--tp", "--tensor-parallel"),
    ("-pp", "--pipeline-parallel-size", "--pp-size"),
)
_DATA = ("-dp", "--data-parallel-size", "--dp-size")
_DATA_HERE = ("-dpl", "--data-parallel-size-local")
# SGLang splits its tensor parallel GPUs into the data parallel ranks then, and takes no more of them.
_WITHIN_TENSOR = "--enable-dp-attention"

# As many as `count` below [gpu] takes.
_MOST = 1024

_CUDA = re.compile(r"CUDA([0-9]{1,4})")
_DEVICE_NAME = re.compile(r"[A-Za-z]+[0-9]+")
_ASSIGNED = re.compile(rf"(?:(?<=\s)|^)(?:export\s+)?({'|'.join(OWNED_VARIABLES)})=([^\s;&|()<>]*)")

_INDICES = "Here indices are those of nvidia-smi; CUDA's own order is another unless CUDA_DEVICE_ORDER said so."


class Report(NamedTuple):
    """One thing that is to be said: of a variable, or of an option of the command."""

    subject: str  # a variable's name or an option's
    reason: str


def settle(draft: Draft, command: Sequence[str], env: dict[str, str], reports: list[Report]) -> list[str]:
    """Put what ``command`` and ``env`` say of GPUs into ``draft``.

    Args:
        draft: gets ``gpu.count``, ``gpu.devices`` and ``env``.
        command: the engine's, or arguments of a preset.
        env: variables of the engine. Those of the command take precedence over them.
        reports: gets what is to be said.

    Returns:
        The command without what has become keys of the model file.
    """
    rest, assigned = _taken_out(list(command))
    variables = env | assigned
    draft.put("env", {name: value for name, value in variables.items() if name not in OWNED_VARIABLES})
    owned = [name for name in variables if name in OWNED_VARIABLES and name != VISIBLE]
    reports += [Report(name, f"{OWNED_VARIABLES[name]} Left out.") for name in owned]
    visible = _visible(variables[VISIBLE]) if VISIBLE in variables else None
    if visible is not None and any(isinstance(device, int) for device in visible):
        reports.append(Report(VISIBLE, f"It became [gpu] devices. {_INDICES}"))
    rest, chosen = _devices(rest, visible, reports)
    wanted = count(rest)
    if wanted is not None and wanted > _MOST:
        reports.append(Report("--tensor-parallel-size", f"{wanted} GPUs are more than a machine has. Left out."))
        wanted = None
    _put(draft, wanted, chosen, reports)
    return rest


# -- variables --------------------------------------------------------------------------------------------------------


def _taken_out(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command without its leading variables, and without those that gpusvc sets wherever they are set in it."""
    command, variables = commandline.peel(command)
    position = commandline.script_position(command)
    if position is not None:
        script = command[position]
        inner = commandline.peel(shell.split(script).words) if shell.is_simple(script) else None
        if inner is not None and inner.variables and position == len(command) - 1 and inner.command:
            # One command and its variables need no shell.
            engine = inner.command[1:] if inner.command[0] == "exec" and len(inner.command) > 1 else inner.command
            return engine, variables | inner.variables
        command[position], found = _without_assignments(script)
        return command, variables | found
    # Behind a wrapper, as `nice env CUDA_VISIBLE_DEVICES=1 COMMAND`.
    length = commandline.prefix_length(command)
    before = [word.partition("=") for word in command[:length]]
    variables |= {name: value for name, equals, value in before if equals and name in OWNED_VARIABLES}
    kept = ["".join(word) for word in before if not (word[1] and word[0] in OWNED_VARIABLES)]
    return kept + command[length:], variables


def _without_assignments(script: str) -> tuple[str, dict[str, str]]:
    """A script without the assignments of variables that gpusvc sets; those with a ``$`` in them stay."""
    found: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        name, value = match.group(1), match.group(2).strip("'\"")
        if "$" in value or "`" in value:
            return match.group()
        found[name] = value
        # `export` alone lists variables, `true` does nothing.
        return "true" if match.group().startswith("export") else ""

    return _ASSIGNED.sub(take, script), found


def _visible(text: str) -> tuple[int | str, ...]:
    """CUDA's list ends with the first entry that CUDA does not understand, such as -1."""
    devices: list[int | str] = []
    for entry in (part.strip() for part in text.split(",")):
        if not entry:
            continue
        try:
            DeviceSelector.parse(int(entry) if entry.isdecimal() and len(entry) < 5 else entry)
        except ValueError:
            break
        devices.append(int(entry) if entry.isdecimal() else entry)
    return tuple(devices[:_MOST])


# -- options ----------------------------------------------------------------------------------------------------------


def _devices(
    command: list[str], visible: tuple[int | str, ...] | None, reports: list[Report]
) -> tuple[list[str], tuple[int | str, ...] | None]:
    """Take --device and --main-gpu of llama-server off, as far as they pick GPUs by number."""
    listed = [part.strip() for part in (commandline.value(command, DEVICE) or "").split(",") if part.strip()]
    if listed == ["none"]:
        return command, ()
    numbers = [int(match.group(1)) for part in listed if (match := _CUDA.fullmatch(part))]
    chosen = visible
    if listed and len(numbers) == len(listed):
        picked = _pick(numbers, visible)
        if picked is None:
            reports.append(Report("--device", f"{','.join(listed)} are not among the GPUs of {VISIBLE}. Left out."))
        else:
            reports.append(Report("--device", f"It became [gpu] devices. {_INDICES}"))
            chosen = picked
        command = commandline.without(command, DEVICE)
    elif listed and all(_DEVICE_NAME.fullmatch(part) for part in listed):
        reports.append(Report("--device", "Only CUDA's devices are known here; see [gpu] devices."))
    return _main(command, chosen, reports)


def _pick(numbers: Sequence[int], visible: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
    """Those of the visible GPUs that have these numbers; None if one is not there."""
    if visible is None:
        return tuple(numbers)
    return tuple(visible[number] for number in numbers) if max(numbers) < len(visible) else None


def _main(
    command: list[str], chosen: tuple[int | str, ...] | None, reports: list[Report]
) -> tuple[list[str], tuple[int | str, ...] | None]:
    """--main-gpu picks the one GPU of a model that is not split, and else the first among equals."""
    text = commandline.value(command, _MAIN)
    if text is None or not text.isdecimal() or len(text) > 4:
        return command, chosen
    main = int(text)
    if commandline.value(command, _MODE) == "none":
        picked = _pick([main], chosen)
        if picked is None:
            reports.append(Report("--main-gpu", f"GPU {main} is not among those that the engine saw. Left out."))
        return commandline.without(command, _MAIN), chosen if picked is None else picked
    if main == 0:
        return command, chosen
    # With gpusvc the numbers go up to count - 1.
    if chosen is not None and main < len(chosen):
        return command, chosen
    if (count(command) or 0) > main:
        return command, chosen
    reports.append(Report("--main-gpu", "The engine counts the GPUs that it gets from 0; see [gpu] devices. Left out."))
    return commandline.without(command, _MAIN), chosen


def count(command: Sequence[str]) -> int | None:
    """How many GPUs the options of a command say that the engine is split over; None if they do not say."""
    words = commandline.options_of(command)
    factors = [_whole(commandline.value(words, names)) for names in _WAYS]
    here = _whole(commandline.value(words, _DATA_HERE))
    data = here if here is not None else _whole(commandline.value(words, _DATA))
    if _WITHIN_TENSOR not in words:
        factors.append(data)
    said = [factor for factor in factors if factor is not None]
    if said:
        return math.prod(said)
    shares = commandline.value(words, _SHARES)
    if shares is None:
        return None
    return sum(1 for share in shares.replace("/", ",").split(",") if share.strip().strip("0.")) or None


def _whole(text: str | None) -> int | None:
    """A number of at most five digits and more than 0; None for all else."""
    return int(text) if text is not None and text.isdecimal() and 0 < len(text) < 6 and int(text) > 0 else None


# -- the result -------------------------------------------------------------------------------------------------------


def _put(draft: Draft, wanted: int | None, devices: tuple[int | str, ...] | None, reports: list[Report]) -> None:
    """None: nothing says how many, or which ones may be taken."""
    if devices is None:
        draft.put("gpu.count", wanted if wanted != 1 else None)
        return
    if wanted is not None and wanted > len(devices):
        reason = f"The command wants {wanted} GPUs, and may have {len(devices)}: see count and devices below [gpu]."
        reports.append(Report(VISIBLE, reason))
    # An engine that takes fewer than it sees takes the first.
    taken = devices if wanted is None else devices[:wanted]
    draft.put("gpu.count", len(taken))
    draft.put("gpu.devices", list(dict.fromkeys(taken)))
