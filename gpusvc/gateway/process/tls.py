"""TLS by certificate files, which may change while the gateway runs: renewed ones hold for new connections.

Whoever has no files lets a proxy in front do it; docs/gateway.md has examples.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

from gpusvc.errors import ConfigError

_Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate with its chain and its key, as PEM files, and the context that serves them."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """
        Raises:
            ConfigError: they cannot be read, are no PEM files, or do not belong together.
        """
        self._certificate = certificate
        self._key = key
        self._seen = self._loaded = self._stamp()
        self.context = _load(_new_context(), certificate, key)
        """For every server of this process. What refresh() loads holds for connections that are made after it."""

    def refresh(self, report: Callable[[ConfigError], None]) -> None:
        """Load the files again if they have changed, and have not since the last look: a renewal replaces one by one.

        ``report`` hears of files that are not right; then the old ones stay.
        """
        stamp = self._stamp()
        is_settled, self._seen = stamp == self._seen, stamp
        if stamp == self._loaded or not is_settled:
            return
        self._loaded = stamp
        try:
            # First where it harms nothing: a context keeps the half of a pair that it could load.
            _load(_new_context(), self._certificate, self._key)
            _load(self.context, self._certificate, self._key)
        except ConfigError as error:
            report(error)

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(file) for file in (self._certificate, self._key))


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # A client that renegotiates has us work for it, and nobody needs it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> ssl.SSLContext:
    for name, file in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            hint = "The user gpusvc-gateway has to be able to read it." if isinstance(error, PermissionError) else None
            raise ConfigError(f"{name} {file} cannot be read: {os.strerror(error.errno or 0)}.", hint=hint) from None
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _PasswordWantedError:
        raise ConfigError(
            f"tls_key {key} is encrypted.", hint="The gateway has nobody to ask for a password."
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls_key {key} is not the key of tls_certificate {certificate}.") from None
        culprit = f"tls_certificate {certificate}" if not _has_certificate(certificate) else f"tls_key {key}"
        raise ConfigError(
            f"{culprit} is no PEM file, or not of the right kind.",
            hint="tls_certificate takes the certificate and then its chain, tls_key the private key.",
        ) from None
    except OSError as error:
        raise ConfigError(f"{certificate} and {key} cannot be read: {os.strerror(error.errno or 0)}.") from None
    return context


class _PasswordWantedError(Exception):
    pass


def _no_password() -> str:
    """Called for an encrypted key; without it OpenSSL would ask at the terminal."""
    raise _PasswordWantedError


def _has_certificate(file: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (ssl.SSLError, OSError):
        return False
    return True


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()  # of what links lead to: that is what is replaced
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
