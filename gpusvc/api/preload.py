"""ExecStart= of gpusvc-preload.service: starts the models with ``preload = true``, without waiting for them."""

from __future__ import annotations

import sys

from gpusvc import names
from gpusvc.config.files import model_names
from gpusvc.config.serving import load_serving
from gpusvc.errors import GpusvcError
from gpusvc.log import log
from gpusvc.paths import Paths


def preloaded(paths: Paths) -> list[str]:
    """Return the models with ``preload = true``, sorted. A file with errors is logged and left out."""
    found = []
    for name in model_names(paths):
        try:
            if load_serving(paths, name).preload:
                found.append(name)
        except GpusvcError as error:
            log(4, str(error))
    return found


def main() -> int:
    """Return the exit status: 0 even if a model could not be started; its own unit reports that."""
    try:
        chosen = preloaded(Paths.here())
        if not chosen:
            return 0
        from gpusvc.systemd.manager import Manager  # noqa: PLC0415  most machines preload nothing

        with Manager() as manager:
            for name in chosen:
                try:
                    manager.enqueue("Start", names.service(name), replace=False)
                    log(6, f"{name} is started: its file says preload.")
                except GpusvcError as error:
                    log(4, str(error))
    except GpusvcError as error:
        log(3, str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
