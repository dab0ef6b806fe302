"""The GPUs that an engine's command asks for, as keys below ``[gpu]`` of a model file.

An engine of gpusvc sees only the GPUs that it gets, and counts them from 0. So options that pick GPUs by number leave
the command. Options that stay and do not fit the result are reported.
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
# With it SGLang divides its tensor parallel GPUs among the data parallel ranks, and takes no more GPUs.
_WITHIN_TENSOR = "--enable-dp-attention"

# The largest `count` below [gpu].
_MOST = 1024

_CUDA = re.compile(r"CUDA([0-9]{1,4})")
_DEVICE_NAME = re.compile(r"[A-Za-z]+[0-9]+")
_ASSIGNED = re.compile(rf"(?:(?<=\s)|^)(?:export\s+)?({'|'.join(OWNED_VARIABLES)})=([^\s;&|()<>]*)")

_INDICES = "Here indices are those of nvidia-smi; CUDA's own order is another unless CUDA_DEVICE_ORDER said so."


class Report(NamedTuple):
    """A note on a variable, or on an option of the command."""

    subject: str  # a variable's name or an option's
    reason: str


def settle(draft: Draft, command: Sequence[str], env: dict[str, str], reports: list[Report]) -> list[str]:
    """Put the GPUs that ``command`` and ``env`` pick into ``draft``.

    Args:
        draft: gets ``gpu.count``, ``gpu.devices`` and ``env``.
        command: the engine's, or arguments of a preset.
        env: variables of the engine. Variables in the command override them.
        reports: gets the notes.

    Returns:
        The command without the options that became keys of the model file.
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
    """Return the command and its variables, without leading ones and without those that gpusvc sets itself."""
    command, variables = commandline.peel(command)
    position = commandline.script_position(command)
    if position is not None:
        script = command[position]
        inner = commandline.peel(shell.split(script).words) if shell.is_simple(script) else None
        if inner is not None and inner.variables and position == len(command) - 1 and inner.command:
            # A single command with variables needs no shell.
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
    """Return a script without assignments of gpusvc's own variables; values with a ``$`` stay."""
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
    """Return the devices of a list. As for CUDA, the list ends at the first invalid entry, such as -1."""
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
    """Take --device and --main-gpu out of a command of llama-server if they pick GPUs by number."""
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
    """Return the visible GPUs that have these numbers; None if one is missing."""
    if visible is None:
        return tuple(numbers)
    return tuple(visible[number] for number in numbers) if max(numbers) < len(visible) else None


def _main(
    command: list[str], chosen: tuple[int | str, ...] | None, reports: list[Report]
) -> tuple[list[str], tuple[int | str, ...] | None]:
    """Handle --main-gpu: it picks the only GPU of a model that is not split, else the GPU for small tensors."""
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
    """Return the number of GPUs that the options split the engine over; None if they do not say it."""
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
    """Return a number of at most five digits and above 0; None for other texts."""
    return int(text) if text is not None and text.isdecimal() and 0 < len(text) < 6 and int(text) > 0 else None


# -- the result -------------------------------------------------------------------------------------------------------


def _put(draft: Draft, wanted: int | None, devices: tuple[int | str, ...] | None, reports: list[Report]) -> None:
    """Put the number of GPUs and the devices into the draft. None: the command does not say it."""
    if devices is None:
        draft.put("gpu.count", wanted if wanted != 1 else None)
        return
    if wanted is not None and wanted > len(devices):
        reason = f"The command wants {wanted} GPUs, and may have {len(devices)}: see count and devices below [gpu]."
        reports.append(Report(VISIBLE, reason))
    # An engine that takes fewer GPUs than it sees takes the first ones.
    taken = devices if wanted is None else devices[:wanted]
    draft.put("gpu.count", len(taken))
    draft.put("gpu.devices", list(dict.fromkeys(taken)))
