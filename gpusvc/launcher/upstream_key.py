"""The key named by ``upstream_key``: read as root, and given to the daemons that send requests to the engine.

The key is in no lease, event, message or reading of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpusvc import files
from gpusvc.config.model import ModelConfig
from gpusvc.errors import ConfigError, GpusvcError
from gpusvc.paths import Paths, is_user_instance
from gpusvc.state import upstream_key as copies

_MOST_BYTES = 65536


def find(config: ModelConfig, environment: Mapping[str, str]) -> str:
    """Return the key of a model with ``upstream_key``.

    Args:
        config: of the model.
        environment: of the launcher; CREDENTIALS_DIRECTORY is where systemd puts credentials.

    Raises:
        ConfigError: there is none, or it is not one that fits into a header.
    """
    source = config.upstream_key or ""
    if source.startswith("-"):
        value = _option(config.command, source)
        if value is None:
            raise _unusable(f"The command has no option {source} with a value.")
        # The engine reads a relative path from its own directory.
        text = _read(config.working_directory / value) if source.endswith("-file") else value.replace(",", "\n")
    elif source.startswith("/"):
        text = _read(Path(source))
    else:
        directory = environment.get("CREDENTIALS_DIRECTORY")
        if directory is None:
            # Without the name: who mistakes this for the place of the key itself must not find it in the journal.
            hint = f"`systemctl edit model@{config.name}` with LoadCredential=NAME:FILE in [Service] adds one."
            raise _unusable("The model's unit has no such credential.", hint)
        text = _read(Path(directory, source))
    key = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not key or not (key.isascii() and key.isprintable()) or " " in key or len(key) > copies.LONGEST_BYTES:
        raise _unusable("What it names is no key: one line of ASCII characters without spaces.")
    return key


def publish(paths: Paths, name: str, key: str) -> None:
    """Give ``key`` to those who send requests to the engine of ``name``.

    Needs no capability but CAP_SETGID, as state.use.prepare().

    Raises:
        GpusvcError: the files cannot be made.
    """
    before = os.getegid()
    try:
        for reader in copies.READERS:
            gid = before if is_user_instance() else _gid(reader[1])
            file = copies.file_of(paths, name, reader)
            os.setegid(gid)
            try:
                with files.written_beside(file, key, mode=0o640, durable=False, gid=gid) as draft:
                    draft.replace(file)
            finally:
                os.setegid(before)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise GpusvcError(f"The upstream key of {name} cannot be passed on: {reason}.") from error


def _option(command: Sequence[str], option: str) -> str | None:
    """The value of ``option``: of several the last one, as engines have it."""
    value = None
    for argument, following in zip(command, (*command[1:], None), strict=True):
        if argument == option:
            value = following
        elif argument.startswith(option + "="):
            value = argument.removeprefix(option + "=")
    return value


def _read(file: Path) -> str:
    try:
        return files.read(file, limit_bytes=_MOST_BYTES, follow_links=True).decode("utf-8", "replace")
    except PermissionError:
        hint = "Root's launcher reads it with root's own rights: `chown root`, mode 0600."
        raise _unusable(f"{file} may not be read.", hint) from None
    except OSError as error:
        raise _unusable(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise _unusable(f"{file} is not a file, or too large.") from None


def _gid(group: str) -> int:
    import grp  # noqa: PLC0415  few models have a key

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return 0


def _unusable(sentence: str, hint: str | None = None) -> ConfigError:
    return ConfigError(f"upstream_key: {sentence}", hint=hint)
