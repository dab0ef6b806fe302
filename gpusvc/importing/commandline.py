"""Commands of engines, as people write them into configurations: taken apart, and asked what they say."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

from gpusvc.config.model import OWNED_VARIABLES
from gpusvc.gpu.selector import DeviceSelector
from gpusvc.importing.draft import Draft, Notes

_PORT = ("--port",)
_SPLIT = ("-tp", "--tensor-parallel-size", "--tp-size", "--tp", "--tensor-parallel")
_SHARES = ("-ts", "--tensor-split")
_DEVICE = ("-dev", "--device")

_VISIBLE = "CUDA_VISIBLE_DEVICES"

# They start a container somewhere else, and are only its remote control.
_CONTAINERS = {"docker", "podman", "nerdctl", "docker-compose"}


def split(text: str) -> list[str]:
    """The arguments of a command of several lines, as a shell would see them; lines of comment do not count.

    Raises:
        ValueError: a quotation mark has no counterpart.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    # What a shell would take for the end of the command, people mean as a space.
    return shlex.split(" ".join(line.rstrip().removesuffix("\\") for line in lines))


def option(command: Sequence[str], names: Collection[str]) -> str | None:
    """The value of an option, as ``NAME VALUE`` or ``NAME=VALUE``; the last one counts."""
    found = None
    for argument, following in zip(command, [*command[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            found = value if equals else following
    return found


def fixed_port(command: Sequence[str]) -> int | None:
    """The port that a command names, if it is a number."""
    port = option(command, _PORT)
    return int(port) if port is not None and port.isdecimal() and 0 < int(port) < 65536 else None


def gpus(command: Sequence[str]) -> int | None:
    """How many GPUs a command wants its model to be split over; 0: none; None: it does not say."""
    if option(command, _DEVICE) == "none":
        return 0
    ways = option(command, _SPLIT)
    if ways is not None and ways.isdecimal() and int(ways) > 0:
        return int(ways)
    shares = option(command, _SHARES)
    if shares is None:
        return None
    return sum(1 for share in shares.replace("/", ",").split(",") if share.strip().strip("0.")) or None


def is_container(command: Sequence[str]) -> bool:
    """Whether it has another program start the engine, out of the model's control group."""
    return bool(command) and PurePath(command[0]).name in _CONTAINERS


CONTAINER = (
    "A container is run by its daemon, outside the model's control group: gpusvc could neither keep it to its GPUs nor "
    "prove its end, and the model never counts as ready. Name the engine itself, or a runtime that keeps the processes "
    "below itself, as `podman run --cgroups=disabled` does."
)


def put_environment(draft: Draft, env: Mapping[str, str], notes: Notes, key: str) -> None:
    """Variables as a model's file has them: the GPUs that it sees stand in [gpu], what gpusvc sets itself nowhere."""
    kept = {name: value for name, value in env.items() if name not in OWNED_VARIABLES}
    draft.put("env", kept)
    for name, value in env.items():
        if name == _VISIBLE:
            _put_devices(draft, value, notes, key)
        elif name in OWNED_VARIABLES:
            notes.add(draft.name, f"{key}.{name}", f"{OWNED_VARIABLES[name]} Left out.")


def _put_devices(draft: Draft, visible: str, notes: Notes, key: str) -> None:
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    devices: list[int | str] = []
    for entry in entries:
        try:
            DeviceSelector.parse(int(entry) if entry.isdecimal() else entry)
        except ValueError:
            break  # CUDA's list ends with the first that it does not understand, such as -1
        devices.append(int(entry) if entry.isdecimal() else entry)
    draft.put("gpu.count", len(devices))
    draft.put("gpu.devices", devices)
    if any(isinstance(device, int) for device in devices):
        reason = "Here indices are those of nvidia-smi; CUDA's own order is another unless CUDA_DEVICE_ORDER said so."
        notes.add(draft.name, f"{key}.{_VISIBLE}", f"It became [gpu] devices. {reason}")
