"""Load and check the configuration files: the host's file and those of the models.

``host.py`` and ``model.py`` define the keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpusvc import names
from gpusvc.config import aliases, machine
from gpusvc.config.host import (
    BusyAction,
    HostConfig,
    HostEviction,
    HostGateway,
    HostGpu,
    HostWatchdog,
    Isolation,
    Placement,
    read_host,
)
from gpusvc.config.model import GpuRequest, ModelConfig, read_model, read_run
from gpusvc.config.table import InvalidFileError, Problem, Table, did_you_mean, read_table
from gpusvc.errors import GpusvcError, PermissionDeniedError, UnknownModelError
from gpusvc.paths import Paths
from gpusvc.quantity import shown

__all__ = [
    "BusyAction",
    "GpuRequest",
    "HostConfig",
    "HostEviction",
    "HostGateway",
    "HostGpu",
    "HostWatchdog",
    "InvalidFileError",
    "Isolation",
    "ModelConfig",
    "Placement",
    "Problem",
    "check",
    "load_host",
    "load_model",
    "load_sound_model",
    "load_startable_model",
    "model_names",
]

SUFFIX = ".toml"

Value = TypeVar("Value")


def load_host(paths: Paths) -> HostConfig:
    """Return the host's policy; the defaults if there is no file.

    Raises:
        InvalidFileError: (a ConfigError) the file cannot be right; it names all that is wrong.
    """
    try:
        return _load(paths.host_file, read_host)
    except FileNotFoundError:
        return HostConfig()


def load_model(paths: Paths, name: str, host: HostConfig) -> ModelConfig:
    """Return a model's configuration. Reads no other model's file, and does not check whether the model could start.

    Raises:
        UnknownModelError: there is no such file.
        InvalidFileError: (a ConfigError) the file cannot be right; it names all that is wrong.
    """
    return _load_model(paths, name, partial(read_model, name=name, host=host), partial(read_run, name=name, host=host))


def load_startable_model(paths: Paths, name: str, host: HostConfig) -> ModelConfig:
    """Return a model's configuration, checked for a start.

    Raises:
        UnknownModelError: there is no such file.
        InvalidFileError: (a ConfigError) the file cannot be right, it names something that this machine lacks, or
            another model has one of its names; the error names all that is wrong.
    """

    def read(table: Table) -> ModelConfig:
        model = _read_checked(table, name, host)
        aliases.check(paths, model, table)
        return model

    def read_checked_run(table: Table) -> ModelConfig:
        model = read_run(table, name, host)
        machine.check(model, table)
        return model

    return _load_model(paths, name, read, read_checked_run)


def load_sound_model(paths: Paths, name: str, host: HostConfig) -> ModelConfig | None:
    """Return load_model()'s result; None if the file is gone or wrong, as it may be while the model runs."""
    try:
        return load_model(paths, name, host)
    except GpusvcError:
        return None


def model_names(paths: Paths) -> list[str]:
    """Return the names of all models that have a file, sorted.

    Raises:
        PermissionDeniedError: the directory may not be read.
        GpusvcError: it cannot be read, for another reason.
    """
    return sorted(file.name.removesuffix(SUFFIX) for file in _model_files(paths) if _name_of(file) is not None)


def check(paths: Paths, files: Sequence[Path] = ()) -> list[Problem]:
    """Return the problems of these files, or without ``files`` those of the host's file and of all models.

    A file named ``gpusvc.toml`` is the host's, unless it is in the directory of models; any other is a model's. Aliases
    are compared with those of all models that have a file.
    """
    problems: list[Problem] = []
    try:
        host = load_host(paths)
    except InvalidFileError as error:
        host = HostConfig()
        problems += () if files else error.problems

    models: list[tuple[str, Path]] = []
    for file in files or _listed(paths, problems):
        if file.name == paths.host_file.name and file.absolute().parent != paths.models_directory.absolute():
            problems += _problems(file, read_host)
        elif (name := _name_of(file)) is not None:
            models.append((name, file))
        else:
            problems.append(_misnamed(file))

    # A given file takes the place of the installed one of the same name.
    everybody = {name: paths.model_file(name) for name in _names_or_none(paths)} | dict(models)
    named = {name: aliases.in_file(file) for name, file in everybody.items()}
    checked = {name for name, _ in models}

    for name, file in models:
        problems += _problems(file, partial(_read_checked, name=name, host=host))
        problems += [
            Problem(file, None if contest.position is None else f"aliases[{contest.position}]", contest.message)
            for contest in aliases.contested(name, named[name], named)
            if contest.position is not None or contest.other not in checked
        ]
    return problems


def _read_checked(table: Table, name: str, host: HostConfig) -> ModelConfig:
    model = read_model(table, name, host)
    machine.check(model, table)
    return model


def _load_model(
    paths: Paths, name: str, read: Callable[[Table], ModelConfig], read_run: Callable[[Table], ModelConfig]
) -> ModelConfig:
    """Return the model of its file, made by ``read``, or else of a `gpusvc run`, made by ``read_run``."""
    if names.is_name(name):
        try:
            return _load(paths.model_file(name), read)
        except FileNotFoundError:
            pass
        try:
            return _load(paths.run_file(name), read_run)
        except FileNotFoundError:
            pass
    raise _unknown(paths, name)


def _load(file: Path, read: Callable[[Table], Value]) -> Value:
    """Return what ``read`` makes of a file. Raises FileNotFoundError, or InvalidFileError for a wrong file."""
    table = read_table(file)
    value = read(table)
    table.finish()
    return value


def _model_files(paths: Paths) -> list[Path]:
    """Return the files in the directory of models, sorted; none if there is no directory."""
    try:
        files = sorted(paths.models_directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise PermissionDeniedError(
            f"{paths.models_directory} may not be read.", hint="Run the command as root."
        ) from error
    except OSError as error:  # too many open files, say: unknown is not empty
        why = os.strerror(error.errno or 0)
        raise GpusvcError(f"{paths.models_directory} cannot be read: {why}.") from error
    # Editors put hidden files beside the files that they edit.
    return [file for file in files if file.name.endswith(SUFFIX) and not file.name.startswith(".")]


def _name_of(file: Path) -> str | None:
    """Return the name of the model that a file defines; None if the file's name cannot be one."""
    name = file.name.removesuffix(SUFFIX)
    return name if file.name.endswith(SUFFIX) and names.is_name(name) else None


def _unknown(paths: Paths, name: str) -> UnknownModelError:
    known = _names_or_none(paths)
    hint = did_you_mean(name, known)
    if hint is None and names.is_name(name):
        hint = f"Its file would be {paths.model_file(name)}; see gpusvc-model(5)."
    return UnknownModelError(f"There is no model {shown(name)}.", hint=hint)


def _names_or_none(paths: Paths) -> list[str]:
    try:
        return model_names(paths)
    except PermissionDeniedError:
        return []


def _listed(paths: Paths, problems: list[Problem]) -> list[Path]:
    try:
        return _model_files(paths)
    except PermissionDeniedError as error:
        problems.append(Problem(paths.models_directory, None, "It may not be read.", error.hint))
        return []


def _misnamed(file: Path) -> Problem:
    hint = "A name is letters, digits, ':', '_', '.' or '-', and begins with a letter or digit; see aliases for others."
    return Problem(file, None, "A model's file must be called NAME.toml, and this name cannot be a model's.", hint)


def _problems(file: Path, read: Callable[[Table], object]) -> Iterable[Problem]:
    try:
        _load(file, read)
    except InvalidFileError as error:
        return error.problems
    except FileNotFoundError:
        return [Problem(file, None, "There is no such file.")]
    return []
