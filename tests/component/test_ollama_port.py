"""``ollama_port``: what the generator makes of it for systemd, and which socket the gateway takes for Ollama's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpusvc.gateway.process import listening
from tests.component.conftest import ROOT


def generated(directory: Path, text: str | None) -> tuple[dict[str, str], str]:
    """What the user's generator writes for a gpusvc.toml with this text, by path, and what it complains of."""
    config, out = directory / "config/gpusvc", directory / "out"
    config.mkdir(parents=True)
    out.mkdir()
    if text is not None:
        (config / "gpusvc.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, ROOT / "packaging/gpusvc-generator", out, out, out],
        env={"PYTHONPATH": str(ROOT), "SYSTEMD_SCOPE": "user", "XDG_CONFIG_HOME": str(config.parent), "HOME": "/"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(out))] = f"-> {path.readlink().name}"
        elif path.is_file():
            found[str(path.relative_to(out))] = path.read_text()
    return found, done.stderr


def test_a_port_is_a_socket_that_starts_with_the_gateways(tmp_path: Path) -> None:
    found, complaints = generated(tmp_path, "[gateway]\nollama_port = 11435\n")
    file = tmp_path / "config/gpusvc/gpusvc.toml"
    assert found == {
        "gpusvc-gateway.socket.wants/gpusvc-ollama.socket": "-> gpusvc-ollama.socket",
        "gpusvc-ollama.socket.d/50-ollama-port.conf": f"# By gpusvc-generator, from ollama_port in {file}.\n"
        "[Socket]\nListenStream=\nListenStream=127.0.0.1:11435\n",
    }
    assert complaints == ""


@pytest.mark.parametrize(
    "text", [None, "", "[gateway]\n", "[gateway]\nollama_port = 0\n", "[gateway]\nollama_port = 65536\n",
             '[gateway]\nollama_port = "11434"\n', "[gateway]\nollama_port = true\n"]
)  # fmt: skip
def test_without_a_port_there_is_nothing(tmp_path: Path, text: str | None) -> None:
    assert generated(tmp_path, text) == ({}, "")


@pytest.mark.parametrize("text", ["[gateway", "gateway = 1\n"])
def test_a_file_that_cannot_be_read_is_one_complaint(tmp_path: Path, text: str) -> None:
    found, complaints = generated(tmp_path, text)
    assert found == {}
    assert complaints.startswith("<4>")
    assert len(complaints.splitlines()) == 1


def test_ollamas_socket_is_known_by_its_name_or_its_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        both, port = [one, other], other.getsockname()[1]
        assert listening.of_ollama(both, port, {}) == {other.fileno()}
        assert listening.of_ollama(both, 0, {}) == frozenset()
        named = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": ":".join(["x"] * (one.fileno() - 3) + ["ollama"])}
        assert listening.of_ollama(both, 0, named) == {one.fileno()}
        assert listening.of_ollama(both, 0, {**named, "LISTEN_PID": "1"}) == frozenset()
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(tmp_path / "sock"))
            assert listening.of_ollama([unix], port, {}) == frozenset()


def test_a_gateway_without_systemds_sockets_opens_the_port_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        free = found.getsockname()[1]
    monkeypatch.setattr(listening, "ADDRESS", ("127.0.0.1", 0))
    usual, ollama = listening.take({}, free)
    with usual, ollama:
        assert ollama.getsockname() == ("127.0.0.1", free)
        assert listening.of_ollama([usual, ollama], free, {}) == {ollama.fileno()}
