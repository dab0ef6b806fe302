"""One run of a model: the state that the phases of the launcher share."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from gpusvc.config.files import load_host, load_startable_model
from gpusvc.config.presets import PRESETS, Preset
from gpusvc.errors import ConfigError
from gpusvc.gpu import nodes
from gpusvc.gpu.reading import total
from gpusvc.gpu.visible import DeviceIds, visible_devices
from gpusvc.journal import events
from gpusvc.linux.users import User
from gpusvc.paths import is_user_instance
from gpusvc.quantity import format_amount
from gpusvc.state import lease as leases
from gpusvc.state.lease import Lease

if TYPE_CHECKING:
    import socket

    from gpusvc.config.files import HostConfig
    from gpusvc.gpu.driver import Driver
    from gpusvc.gpu.reading import Gpu
    from gpusvc.journal.relay import Relay
    from gpusvc.launcher.parked import ParkedEngine
    from gpusvc.paths import Paths
    from gpusvc.systemd.notify import Notifier


# Its members may use all models. An engine is no member, whoever its user is.
USER_GROUP = "gpusvc"


class Run:
    """What is known of the run so far.

    Raises:
        UnknownModelError: the model has no file.
        ConfigError: the host's file or the model's file has an error, or the user does not exist.
    """

    def __init__(
        self,
        name: str,
        paths: Paths,
        parked: ParkedEngine,
        relay: Relay,
        notifier: Notifier,
        *,
        is_second_try: bool,
    ) -> None:
        self.name = name
        self.paths = paths
        self.parked = parked
        self.relay = relay
        self.notifier = notifier
        self.is_second_try = is_second_try
        self.host = load_host(paths)
        self.config = load_startable_model(paths, name, self.host)
        self.user = _engine_user(self.config.user, self.host, has_caller=self.config.caller is not None)
        self.began_seconds = time.monotonic()
        self.began_at = time.time()
        self.lease = Lease(model=name, port=0, gpus=(), created=self.began_at)
        self.gpus: tuple[Gpu, ...] = ()
        self.driver: Driver | None = None
        """None: the model needs no GPU."""
        self.caller: socket.socket | None = None
        """The connection to the `gpusvc run` that this program belongs to; None: a model server."""
        self.reads_ahead = False
        """Whether the weights are being read into the page cache."""
        self.upstream_key: str | None = None
        """The API key that the engine asks for, also at its health path; None: it asks for none."""
        self.is_guess = False
        """Whether the model's need for VRAM was only guessed."""
        self.is_fenced = True
        """Whether a device filter keeps the engine off other GPUs."""

    def write_lease(self) -> None:
        """Raises GpusvcError if the file system does not take it."""
        leases.write(self.paths, self.lease)

    def emit(self, kind: events.EventType, sentence: str, *, level: int = 6, reason: str | None = None) -> None:
        """Write an event about the model to the journal, with its GPUs and the VRAM that it holds."""
        events.emit(
            kind,
            sentence,
            model=self.name,
            gpu=[gpu.index for gpu in self.lease.gpus],
            bytes=total(gpu.used_bytes for gpu in self.lease.gpus),
            reason=reason,
            level=level,
        )

    def identifier(self) -> str:
        """SYSLOG_IDENTIFIER= of the engine's lines in the journal."""
        return os.path.basename(self.config.command[0])  # noqa: PTH119  the name as given, without a Path

    def allowed_nodes(self) -> tuple[str, ...]:
        """The device nodes that the engine may open."""
        minors = [gpu.minor for gpu in self.gpus if gpu.minor is not None]
        further = [node for node in self.config.gpu.nodes if os.path.exists(node)]  # noqa: PTH110
        return (*nodes.of_gpus(minors, [gpu.pci_bus_id for gpu in self.gpus]), *further)

    def own_indices(self) -> frozenset[int] | None:
        """The GPUs that readings of this run need; None: all, as its engine may be on others.

        A GPU that hangs must not delay the models on the other GPUs, so they do not ask the driver about it.
        """
        return frozenset(gpu.index for gpu in self.gpus) if self.lease.fenced else None

    @property
    def preset(self) -> Preset | None:
        return PRESETS.get(self.config.engine or "")

    def visible_devices(self, *, fenced: bool) -> str:
        """CUDA_VISIBLE_DEVICES of the engine, with a device filter or without one."""
        ids = self.config.gpu.device_ids
        if ids is DeviceIds.AUTO and self.preset is not None and self.preset.takes_ordinals:
            ids = DeviceIds.ORDINAL
        return visible_devices(self.gpus, ids, fenced=fenced)

    def place(self) -> str:
        """The GPUs of the model, in words."""
        return " and ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in self.gpus) or "no GPU"

    def ready_sentence(self) -> str:
        """Where the model answers, on which GPUs, and how much VRAM it holds."""
        fence = "" if self.is_fenced else " No device filter keeps it off other GPUs."
        if self.caller is not None:
            return f"Running on {self.place()}.{fence}"
        address = self.lease.address or ""
        host = f"[{address}]" if ":" in address else address
        sentence = f"Ready at http://{host}:{self.lease.port} on {self.place()}"
        used = [gpu.used_bytes for gpu in self.lease.gpus]
        if used:
            sentence += f" with {format_amount(total(used))} of VRAM"
        return f"{sentence}.{fence}"


def _engine_user(name: str, host: HostConfig, *, has_caller: bool) -> User:
    """Return the engine's user.

    Raises:
        ConfigError: there is no such user, or an engine must not run as that user. Root may run a program as root with
            `gpusvc run` (``has_caller``), as without gpusvc.
    """
    user = User.named(name)
    if is_user_instance():
        return user
    if user.uid == 0 and not (has_caller or host.allow_root_engines):
        raise ConfigError(
            f"The engine would run as {name}: root can ask systemd over D-Bus for everything, without any capability.",
            hint="Name another user in the model's file, or set `allow_root_engines = true` in gpusvc.toml.",
        )
    return user.without_group(USER_GROUP)
