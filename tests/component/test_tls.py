"""TLS with real certificates, and what is said of files that are not right."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gpusvc.errors import ConfigError
from gpusvc.gateway.process.tls import Certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates: needs openssl")


def make(directory: Path, name: str, *options: str) -> tuple[Path, Path]:
    """A certificate for ``name``, and its key."""
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2", "-subj", f"/CN={name}")
    subprocess.run(
        ["openssl", "req", *kind, "-keyout", str(key), "-out", str(certificate), *(options or ["-nodes"])],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    directory = tmp_path_factory.mktemp("certificates")
    return {name: make(directory, name) for name in ("old.example", "new.example")}


@pytest.fixture
def served(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """Files that a gateway serves, and that a test may change."""
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    replace(files, pairs["old.example"])
    return files


def replace(files: tuple[Path, Path], pair: tuple[Path, Path]) -> None:
    """As renewal does it: new files in the place of the old ones."""
    for file, source in zip(files, pair, strict=True):
        new = file.with_suffix(".new")
        shutil.copyfile(source, new)
        new.rename(file)


def name_served(context: ssl.SSLContext, *, maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> str:
    """Whose certificate a new client is shown."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            context.wrap_socket(ours, server_side=True).close()
        except (ssl.SSLError, OSError):
            ours.close()

    server = threading.Thread(target=serve)
    server.start()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.maximum_version = maximum
    client.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with client.wrap_socket(theirs) as connection:
            assert connection.selected_alpn_protocol() == "http/1.1"
            shown = connection.getpeercert(binary_form=True)
    finally:
        theirs.close()
        server.join()
    assert shown is not None
    return "old.example" if b"old.example" in shown else "new.example"


def reports() -> tuple[list[str], Callable[[ConfigError], None]]:
    said: list[str] = []
    return said, lambda error: said.append(str(error))


def test_a_renewed_certificate_is_shown_to_new_clients(
    served: tuple[Path, Path], pairs: dict[str, tuple[Path, Path]]
) -> None:
    said, report = reports()
    certificate = Certificate(*served)
    assert name_served(certificate.context) == "old.example"
    replace(served, pairs["new.example"])
    certificate.refresh(report)
    certificate.refresh(report)
    assert name_served(certificate.context) == "new.example"
    assert said == []


def test_half_a_renewal_is_waited_out(served: tuple[Path, Path], pairs: dict[str, tuple[Path, Path]]) -> None:
    said, report = reports()
    certificate = Certificate(*served)
    replace((served[0], served[0].with_name("other")), pairs["new.example"])
    certificate.refresh(report)
    assert name_served(certificate.context) == "old.example"
    replace(served, pairs["new.example"])
    certificate.refresh(report)
    certificate.refresh(report)
    assert name_served(certificate.context) == "new.example"
    assert said == []


def test_files_that_turn_wrong_are_told_once_and_change_nothing(
    served: tuple[Path, Path], pairs: dict[str, tuple[Path, Path]]
) -> None:
    said, report = reports()
    certificate = Certificate(*served)
    replace((served[0], served[0].with_name("other")), pairs["new.example"])
    for _ in range(4):
        certificate.refresh(report)
    assert name_served(certificate.context) == "old.example"
    assert said == [f"tls_key {served[1]} is not the key of tls_certificate {served[0]}."]


def test_old_versions_of_tls_are_refused(served: tuple[Path, Path]) -> None:
    context = Certificate(*served).context
    assert name_served(context, maximum=ssl.TLSVersion.TLSv1_2) == "old.example"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises(ssl.SSLError):
        name_served(context, maximum=ssl.TLSVersion.TLSv1_1)


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, pairs: dict[str, tuple[Path, Path]]) -> None:
    (certificate, key), (_, other_key) = pairs["old.example"], pairs["new.example"]
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    _, encrypted = make(tmp_path, "secret.example", "-passout", "pass:hello")
    for files, wanted in {
        (tmp_path / "none", key): f"tls_certificate {tmp_path}/none cannot be read: No such file or directory.",
        (certificate, tmp_path / "none"): f"tls_key {tmp_path}/none cannot be read: No such file or directory.",
        (certificate, other_key): f"tls_key {other_key} is not the key of tls_certificate {certificate}.",
        (nonsense, key): f"tls_certificate {nonsense} is no PEM file",
        (certificate, nonsense): f"tls_key {nonsense} is no PEM file",
        (key, certificate): f"tls_certificate {key} is no PEM file",
        (certificate, encrypted): f"tls_key {encrypted} is encrypted.",
        (tmp_path, key): f"tls_certificate {tmp_path} cannot be read: Is a directory.",
    }.items():
        with pytest.raises(ConfigError) as caught:
            Certificate(*files)
        assert str(caught.value).startswith(wanted)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read_names_who_should(served: tuple[Path, Path]) -> None:
    served[1].chmod(0)
    with pytest.raises(ConfigError, match="gpusvc-gateway"):
        Certificate(*served)
