"""Checks the configuration: files, ports, and the engines' programs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from gpusvc.config import files as config
from gpusvc.config import keys
from gpusvc.config import presets as engines
from gpusvc.config.advice import all_advice
from gpusvc.doctor.finding import Finding, error, note, ok, warning
from gpusvc.errors import GpusvcError
from gpusvc.linux import sockets
from gpusvc.paths import Paths
from gpusvc.state import lease


def findings(paths: Paths) -> Iterator[Finding]:
    yield from _files(paths)
    yield from _ports(paths)
    yield _keys(paths)
    yield _engines()


def _files(paths: Paths) -> Iterator[Finding]:
    problems = config.check(paths)
    for problem in problems:
        where = f"{problem.file}: {problem.key}" if problem.key else str(problem.file)
        yield error("files", problem.message, where, problem.hint or "`gpusvc check` checks it again.")
    if problems:
        return
    try:
        told = all_advice(paths)
    except GpusvcError:
        told = []
    for each in told:
        yield warning("files", each.message, str(each.file), each.hint)
    number = len(config.model_names(paths))
    if number:
        yield ok("files", f"The files of {number} model{'s' if number != 1 else ''} are fine.")
    else:
        yield note("files", "No model is configured.", str(paths.models_directory), "`gpusvc add` makes the first one.")


def _ports(paths: Paths) -> Iterator[Finding]:
    """Find fixed ports that several models have, or at which something else listens."""
    try:
        host = config.load_host(paths)
        models = [
            model
            for name in config.model_names(paths)
            if (model := config.load_sound_model(paths, name, host)) is not None
        ]
        taken = {listener.port for listener in sockets.listeners()}
    except (GpusvcError, OSError):
        return
    fixed = [model for model in models if model.port]
    for model in fixed:
        twins = [other.name for other in fixed if other.port == model.port and other.name != model.name]
        if twins:
            sentence = (
                f"{model.name} and {', '.join(twins)} have the same port {model.port}: only one of them runs at a time."
            )
            yield warning("ports", sentence, fix="Leave port out of the file: each start then gets a free one.")
        if model.port in taken and lease.read(paths, model.name) is None:
            sentence = f"Another program listens on port {model.port}, which is the port of {model.name}."
            fix = f"`ss -ltnp sport = :{model.port}` names it."
            yield error("ports", sentence, fix=fix)
    if not fixed:
        yield ok("ports", "No model has a fixed port.")


def _keys(paths: Paths) -> Finding:
    file = keys.file_of(paths)
    try:
        status = file.stat()
        # The caller may read less than root, and the gateway runs as a user of its own.
        known = keys.read(file) if os.access(file, os.R_OK) else None
        group = keys.group()
    except FileNotFoundError:
        return ok("keys", "The gateway asks for no key: every client that reaches it may use all models.")
    except GpusvcError as problem:
        return error("keys", problem.message, fix=problem.hint)
    except OSError as problem:
        return error("keys", f"{file} cannot be looked at: {os.strerror(problem.errno or 0)}.")
    by_group = status.st_gid == group and status.st_mode & stat.S_IRGRP
    if not by_group and not status.st_mode & stat.S_IROTH:
        evidence = f"{file} belongs to the group {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}."
        fix = f"`chown root:{keys.GROUP} {file}` and `chmod 640 {file}`"
        return error(
            "keys", "The gateway cannot read its keys, so it refuses every client that sends one.", evidence, fix
        )
    number = "" if known is None else f" {len(known)}"
    return ok("keys", f"The gateway can read its{number} key{'' if known is not None and len(known) == 1 else 's'}.")


def _engines() -> Finding:
    found = []
    programs = {preset.command(engines.Served("m", ("m",), 1))[0] for preset in engines.PRESETS.values()}
    for program in sorted(programs - {"python3"}):  # which is there, and says nothing of the module that it would run
        try:
            found.append(engines.find_program(program, {}))
        except ValueError:
            continue
    if not found:
        sentence = "None of the engines that gpusvc has presets for is on the PATH of models."
        return note("engines", sentence, engines.ENGINE_PATH, "A model's command may be any program, by its full path.")
    return ok("engines", f"Engines that models may name: {', '.join(str(each) for each in found)}.")
