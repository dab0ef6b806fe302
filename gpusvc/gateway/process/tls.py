"""TLS with certificate files, which may change while the gateway runs: new connections use renewed files.

Without certificate files, a proxy in front can do TLS; docs/gateway.md has examples.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path

from gpusvc import files
from gpusvc.errors import ConfigError
from gpusvc.files import Stamp

_Stamps = tuple[Stamp | None, ...]


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
        """The context for all servers of this process. Later connections use what refresh() loads."""

    def refresh(self, report: Callable[[ConfigError], None]) -> None:
        """Load the files again if they have changed since they were loaded, but not since the last call.

        A renewal replaces one file after the other: a change in progress is not loaded. ``report`` is called
        if the files are not valid; the old ones then stay in use.
        """
        stamp = self._stamp()
        is_settled, self._seen = stamp == self._seen, stamp
        if stamp == self._loaded or not is_settled:
            return
        self._loaded = stamp
        try:
            # Try the files in a new context first: a context keeps the certificate of a pair whose key fails to load.
            _load(_new_context(), self._certificate, self._key)
            _load(self.context, self._certificate, self._key)
        except ConfigError as error:
            report(error)

    def _stamp(self) -> _Stamps:
        return tuple(_stamp(file) for file in (self._certificate, self._key))


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Renegotiation costs the server work, and no client needs it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> ssl.SSLContext:
    for name, file in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            with file.open("rb") as stream:
                stream.read(1)
        except OSError as error:
            hint = "The user gpusvc-gateway needs read access to it." if isinstance(error, PermissionError) else None
            raise ConfigError(f"{name} {file} cannot be read: {os.strerror(error.errno or 0)}.", hint=hint) from None
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _PasswordWantedError:
        raise ConfigError(
            f"tls_key {key} is encrypted.", hint="The gateway cannot ask for a password: use a key without one."
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
    """Refuse to give a password for an encrypted key. Without this callback OpenSSL would ask at the terminal."""
    raise _PasswordWantedError


def _has_certificate(file: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except (ssl.SSLError, OSError):
        return False
    return True


def _stamp(file: Path) -> Stamp | None:
    try:
        return files.stamp(file)  # follows links: a renewal replaces their targets
    except OSError:
        return None
