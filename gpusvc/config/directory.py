"""Changes in the directory of model files: each file is written whole or not at all, and replaces none by accident.

A program that reads a file meanwhile sees the old one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from gpusvc import files
from gpusvc.config import files as config
from gpusvc.config.files import Problem
from gpusvc.errors import GpusvcError, PermissionDeniedError, UsageError
from gpusvc.paths import Paths
from gpusvc.record import replace

_MODE = 0o644


def check(paths: Paths, texts: Mapping[str, str]) -> list[Problem]:
    """All that would be wrong with these files, by the models' names, if they were there; also between them."""
    with tempfile.TemporaryDirectory(prefix="gpusvc-") as name:
        # Files of these names, as what a file is called says what it is.
        directory = Path(name)
        drafts = [directory / paths.model_file(model).name for model in texts]
        for file, text in zip(drafts, texts.values(), strict=True):
            file.write_text(text, encoding="utf-8", errors="surrogateescape")
        problems = config.check(paths, drafts) if drafts else []
    return [replace(problem, file=paths.models_directory / problem.file.name) for problem in problems]


def install(paths: Paths, name: str, text: str, *, force: bool) -> Path:
    """Write a model's file. The file.

    Raises:
        UsageError: there is one already, and it is not to be replaced.
        PermissionDeniedError: the caller may not.
    """
    file = paths.model_file(name)
    with _translated(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.written_beside(file, text, mode=_MODE, durable=True) as new:
            if force:
                new.replace(file)
            else:
                # Unlike a rename, a link fails where something is, whoever made it in the meantime.
                os.link(new, file)
    return file


def install_all(paths: Paths, texts: Mapping[str, str], *, replacing: Collection[str] = ()) -> None:
    """Write files of several models, by their names: all of them, or none.

    Args:
        paths: where they belong.
        texts: what they say.
        replacing: the models whose files are there and are replaced.

    Raises:
        UsageError: there is a file that is not to be replaced.
        PermissionDeniedError: the caller may not.
    """
    with contextlib.ExitStack() as undoing, contextlib.ExitStack() as writing:
        drafts = []
        for name, text in texts.items():
            file = paths.model_file(name)
            # A link stays one: what it leads to may be under version control.
            file = Path(os.path.realpath(file)) if name in replacing else file
            writing.enter_context(_translated(file))
            file.parent.mkdir(parents=True, exist_ok=True)
            new = writing.enter_context(files.written_beside(file, text, mode=_MODE, durable=True))
            drafts.append((name, file, new))
        for name, file, new in drafts:
            with _translated(file):
                if name in replacing:
                    status = file.stat()
                    before = file.read_text(encoding="utf-8", errors="surrogateescape")
                    undoing.callback(_put_back, file, before, status)
                    new.chmod(stat.S_IMODE(status.st_mode))
                    _keep_owner(new, status)
                    new.replace(file)
                else:
                    os.link(new, file)
                    undoing.callback(file.unlink, missing_ok=True)
        undoing.pop_all()


def _put_back(file: Path, text: str, status: os.stat_result) -> None:
    """Make ``file`` what it was."""
    with files.written_beside(file, text, mode=stat.S_IMODE(status.st_mode), durable=True) as old:
        _keep_owner(old, status)
        old.replace(file)


def _keep_owner(file: Path, status: os.stat_result) -> None:
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(file, status.st_uid, status.st_gid)


def replace_text(paths: Paths, name: str, text: str) -> None:
    """Put another text in place of a model's file, which keeps its mode and its owner.

    Raises:
        PermissionDeniedError: the caller may not.
    """
    # A link stays one: what it leads to may be under version control.
    file = Path(os.path.realpath(paths.model_file(name)))
    with _translated(file):
        status = file.stat()
        with files.written_beside(file, text, mode=stat.S_IMODE(status.st_mode), durable=True) as new:
            _keep_owner(new, status)
            new.replace(file)


def remove(paths: Paths, name: str) -> None:
    """Raises PermissionDeniedError if the caller may not."""
    file = paths.model_file(name)
    with _translated(file):
        file.unlink()
        files.sync_directory(file.parent)


def require_writable(paths: Paths) -> None:
    """Raises PermissionDeniedError unless the caller may change it; for who would otherwise find out halfway."""
    directory = paths.models_directory
    if directory.is_dir() and not os.access(directory, os.W_OK):
        raise _denied(directory)


@contextlib.contextmanager
def _translated(file: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{file} is there already.", hint="--force replaces it.") from None
    except PermissionError:
        raise _denied(file) from None
    except OSError as error:
        raise GpusvcError(f"{file} cannot be changed: {error.strerror}.") from None


def _denied(file: Path) -> PermissionDeniedError:
    return PermissionDeniedError(f"You may not change {file}.", hint="Try again as root, or with sudo.")
