"""API keys of the gateway: which key a request has, and what the key allows. Only hashes of keys are stored.

A secret has 256 random bits. So a plain SHA-256 is enough: no attacker can try out that many secrets, and a slow hash
would protect nothing. A look-up compares hashes, which a client cannot choose, and not the bytes that it sent; so its
time tells nothing about a secret.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import grp
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from gpusvc import files, names
from gpusvc.config import toml
from gpusvc.config.table import InvalidFileError, Problem, Table, did_you_mean, parse
from gpusvc.errors import ConfigError, GpusvcError, UsageError
from gpusvc.paths import Paths, is_user_instance
from gpusvc.state import locks

# Secrets begin with it, so that people and scanners for leaked secrets recognise them.
PREFIX = "gpusvc-"

# The group that may read the file.
GROUP = "gpusvc-gateway"

# The systemd credential (LoadCredential=) that may hold more keys, in the same format.
CREDENTIAL = "gpusvc-keys"

_SECRET_BYTES = 32
_MAX_NAME = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 1024 * 1024

# Another `gpusvc key` writes for milliseconds.
_LOCK_SECONDS = 10.0

_HEAD = """\
# API keys of gpusvc-gateway.service(8), as `gpusvc key` writes them: hashes, which no key can be made from.
# As long as this file is there, a request needs one of these keys.
"""


class Right(StrEnum):
    """What a key allows."""

    USE = "use"  # its models
    METRICS = "metrics"  # GET /metrics
    ADMIN = "admin"  # everything, of all models


@dataclass(frozen=True, slots=True)
class Key:
    """One key. ``digest`` is the SHA-256 of its secret, in hexadecimal."""

    name: str
    digest: str
    models: tuple[str, ...] = ()  # names, not aliases; empty: all
    rights: tuple[Right, ...] = (Right.USE,)

    @property
    def is_limited(self) -> bool:
        """Whether there are models that it does not allow."""
        return Right.ADMIN not in self.rights and (bool(self.models) or Right.USE not in self.rights)

    def may(self, right: Right) -> bool:
        """Return whether the key has this right."""
        return right in self.rights or Right.ADMIN in self.rights

    def may_use(self, model: str) -> bool:
        """Return whether the key allows requests for this model. ``model`` is its name and not an alias."""
        return Right.ADMIN in self.rights or (Right.USE in self.rights and (not self.models or model in self.models))


class Keys:
    """The keys of several files, for a server.

    If a file vanishes or becomes invalid, its last valid keys count until the server restarts. A new file that is
    invalid has no valid keys, and requests need one.
    """

    def __init__(self, files: Sequence[Path], keys: Mapping[Path, tuple[Key, ...]]) -> None:
        self._files = tuple(files)
        self._kept = dict(keys)
        self._stamps: dict[Path, object] = {}
        self._unread: set[Path] = set()  # tried again: this process may have had no descriptor left
        self._by_digest: dict[bytes, Key] = {}
        self.configured = False
        """Whether a file of keys exists, so that requests need a key. The file may have no key."""
        self._index()

    @classmethod
    def read(cls, files: Iterable[Path]) -> Self:
        """Read the keys.

        Args:
            files: the files that may exist.

        Raises:
            InvalidFileError: a file exists and is invalid.
        """
        keys = cls(tuple(files), {})
        problem = keys._look()
        if problem is not None:
            raise problem
        return keys

    def refresh(self, report: Callable[[ConfigError], None]) -> None:
        """Read the files that have changed. It costs a stat(2) for each file. ``report`` gets each problem once."""
        problem = self._look()
        if problem is not None:
            report(problem)

    def authenticate(self, authorization: bytes | None, x_api_key: bytes | None) -> Key | None:
        """Return the key in one of a request's two headers; None if there is no valid one.

        ``Authorization`` may be ``Bearer`` or ``Basic``, for browsers: then the password is the key.
        """
        if authorization is not None:
            found = self._find(authorization[7:] if authorization[:7] == b"Bearer " else _secret_in(authorization))
            if found is not None:
                return found
        return None if x_api_key is None else self._find(x_api_key)

    def of_digest(self, digest: str) -> Key | None:
        """Return the key whose secret has this SHA-256, in hexadecimal; None if it exists no more."""
        return self._by_digest.get(bytes.fromhex(digest))

    def _find(self, secret: bytes) -> Key | None:
        return self._by_digest.get(hashlib.sha256(secret.strip(), usedforsecurity=True).digest())

    def _look(self) -> InvalidFileError | None:
        """Read the files that have changed. Return the first problem."""
        problem: InvalidFileError | None = None
        for file in self._files:
            stamp = _stamp(file)
            is_new = stamp != self._stamps.get(file)
            if stamp is None or (not is_new and file not in self._unread):
                continue
            self._unread.discard(file)
            try:
                self._kept[file] = tuple(read(file))
            except FileNotFoundError:
                continue
            except InvalidFileError as error:
                if isinstance(error.__cause__, OSError):
                    self._unread.add(file)
                if is_new:
                    problem = problem or error
                self._kept.setdefault(file, ())  # a file that was never valid has no keys
            self._stamps[file] = stamp
        self._index()
        return problem

    def _index(self) -> None:
        self._by_digest = {bytes.fromhex(key.digest): key for keys in self._kept.values() for key in keys}
        self.configured = bool(self._kept)


def file_of(paths: Paths) -> Path:
    """Return the file that ``gpusvc key`` writes."""
    return paths.config / "keys.toml"


def files_of(paths: Paths, environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files that may hold keys for a service with this environment."""
    directory = environment.get("CREDENTIALS_DIRECTORY")
    return (file_of(paths), *([Path(directory, CREDENTIAL)] if directory else []))


def read(file: Path) -> list[Key]:
    """Return the keys in a file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidFileError: it cannot be read, or something in it is wrong.
    """
    try:
        with os.fdopen(files.open_regular(file, follow_links=True), "rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
        values = parse(content)
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = f"It should be root:{GROUP}, mode 0640." if isinstance(error, PermissionError) else None
        raise _invalid(file, f"It cannot be read: {os.strerror(error.errno or 0)}.", hint) from error
    except RecursionError as error:
        raise _invalid(file, "It is nested too deeply.") from error
    except ValueError as error:  # wrong TOML or UTF-8, a number of thousands of digits, or no regular file
        raise _invalid(file, f"It is no TOML: {error}.") from error
    if len(content) > _MAX_FILE_BYTES:
        raise _invalid(file, "It is larger than 1 MiB.")
    table = Table(file, values)
    keys = [_key(name, table) for name in values]
    seen: dict[str, str] = {}
    for key in keys:
        if key.digest and seen.setdefault(key.digest, key.name) != key.name:
            table.problem(key.name, f"It is the same key as {seen[key.digest]!r}.")
    table.finish()
    return keys


def check_name(name: str) -> None:
    """Check the name of a key.

    Raises:
        UsageError: no key can have this name.
    """
    if len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
        raise UsageError(
            f"{name[:_MAX_NAME]!r} cannot be a key's name.",
            hint=f"A name is up to {_MAX_NAME} letters, digits, '_', '.' or '-', beginning with a letter or digit.",
        )


def make(name: str, *, models: Sequence[str] = (), rights: Sequence[Right] = (Right.USE,)) -> tuple[Key, str]:
    """Return a new key and its secret. The secret is stored nowhere."""
    check_name(name)
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return Key(name, digest, tuple(dict.fromkeys(models)), tuple(dict.fromkeys(rights))), secret


def group() -> int:
    """Return the group that the file belongs to.

    Raises:
        GpusvcError: there is no such group.
    """
    if is_user_instance():
        return os.getgid()
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        raise GpusvcError(
            f"The group {GROUP} does not exist; the gateway reads its keys as this group.",
            hint="The package creates it; `systemd-sysusers` creates missing groups.",
        ) from None


@contextlib.contextmanager
def editing(file: Path, gid: int) -> Iterator[dict[str, Key]]:
    """Yield the keys of the file by name, for the block to change. One process at a time.

    Then the file is written as root:``gid`` with mode 0640, unless the block raised.

    Raises:
        InvalidFileError: the file is invalid.
        PermissionDeniedError, GpusvcError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with files.changing(file):
            files.make_directory(file.parent)  # this may be a user's first command
            stack.enter_context(locks.held(_lock_of(file), timeout_seconds=_LOCK_SECONDS))
        try:
            keys = {key.name: key for key in read(file)}
        except FileNotFoundError:
            keys = {}
        yield keys
        with (
            files.changing(file),
            files.written_beside(file, text(keys.values()), mode=0o640, durable=True, gid=gid) as draft,
        ):
            draft.replace(file)


def _lock_of(file: Path) -> Path:
    # Not the directory, which every user can open and so lock.
    return file.with_name(f".{file.name}.lock")


def text(keys: Iterable[Key]) -> str:
    """Return the text of the file."""
    tables = {
        key.name: {"sha256": key.digest, **({"models": key.models} if key.models else {}), "rights": key.rights}
        for key in keys
    }
    return f"{_HEAD}\n{toml.document(tables)}" if tables else _HEAD


def _key(name: str, top: Table) -> Key:
    """Return the key of one table of the file. Problems are recorded in ``table``."""
    table = top.table(name)
    if len(name) > _MAX_NAME or _NAME.fullmatch(name) is None:
        top.problem(name, "That cannot be a key's name.")
    digest = table.text("sha256", "")
    if not _DIGEST.fullmatch(digest):
        table.problem("sha256", "It must be 64 hexadecimal digits.", "`gpusvc key add` makes it.")
        digest = ""
    models = table.texts("models")
    for position, model in enumerate(models or ()):
        if not names.is_name(model):
            table.problem(f"models[{position}]", "That is no model's name.")
    if models == ():
        table.problem("models", "It is empty.", "Leave it out to allow all models.")
    rights = table.texts("rights")
    known = [str(right) for right in Right]
    for position, right in enumerate(rights or ()):
        if right not in known:
            table.problem(f"rights[{position}]", f"It is none of {', '.join(known)}.", did_you_mean(right, known))
    chosen = (Right.USE,) if rights is None else tuple(Right(right) for right in rights if right in known)
    return Key(name, digest, models or (), chosen)


def _secret_in(authorization: bytes) -> bytes:
    """Return the secret of a header that does not begin with exactly "Bearer "; b"" if it has none."""
    scheme, _, value = authorization.strip().partition(b" ")
    match scheme.lower():
        case b"bearer":
            return value
        case b"basic":
            try:
                return base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
        case _:
            return b""


def _stamp(file: Path) -> object:
    """Return a value that changes with the file; None if there is no file."""
    try:
        return files.stamp(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.errno  # read() reports it, once


def _invalid(file: Path, message: str, hint: str | None = None) -> InvalidFileError:
    return InvalidFileError([Problem(file, None, message, hint)])
