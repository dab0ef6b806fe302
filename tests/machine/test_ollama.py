"""Ollama's API at its own port: the socket that a generator of systemd sets up, and keep_alive down to the watchdog."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM, Generation.FORKY)

SOCKETS = ("gpusvc-gateway.socket", "gpusvc-ollama.socket")
GATEWAY = "http://127.0.0.1:8484"
OLLAMA = "http://127.0.0.1:11434"


@pytest.fixture
def ollama(machine: Host) -> Iterator[Host]:
    """A machine whose gateway listens at Ollama's port too, as the guide says."""
    machine.write("/etc/gpusvc/gpusvc.toml", "[gateway]\nollama_port = 11434\n[watchdog]\ninterval = '200ms'\n")
    machine.curl(f"{GATEWAY}/health")  # the service runs already
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "gpusvc-gateway.socket")
    yield machine
    machine.remove("/etc/gpusvc/gpusvc.toml")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "gpusvc-gateway.socket")
    assert not machine.is_active("gpusvc-ollama.socket")


def chat(machine: Host, name: str, url: str = OLLAMA, **more: Any) -> list[dict[str, Any]]:
    asked = {"model": name, "messages": [{"role": "user", "content": "the water"}], **more}
    return [json.loads(line) for line in machine.curl(f"{url}/api/chat", "-d", json.dumps(asked)).splitlines()]


def test_the_port_of_the_configuration_is_systemds(ollama: Host) -> None:
    assert all(map(ollama.is_active, SOCKETS))
    assert "ollama_port in /etc/gpusvc/gpusvc.toml" in ollama.run("systemctl", "cat", SOCKETS[1]).stdout
    assert ollama.curl(f"{OLLAMA}/") == "Ollama is running"
    assert "<html" in ollama.curl(f"{GATEWAY}/")
    ollama.write_model("qwen")
    lines = chat(ollama, "qwen:latest")
    assert "".join(line["message"]["content"] for line in lines) == "You said: the water"
    assert lines[-1]["load_duration"] > 0
    assert "".join(line["message"]["content"] for line in chat(ollama, "qwen", GATEWAY)) == "You said: the water"
    assert ollama.run("systemctl", "stop", SOCKETS[0]).returncode == 0
    assert not any(map(ollama.is_active, SOCKETS))
    ollama.run("systemctl", "start", SOCKETS[0])
    assert all(map(ollama.is_active, SOCKETS))


def test_another_program_at_the_port_costs_that_port_alone(ollama: Host) -> None:
    ollama.run("systemctl", "stop", "gpusvc-gateway.socket")
    ollama.run("systemd-run", "--unit=squatter", "test-engine", "--model", "x", "--port", "11434")
    ollama.wait_until(lambda: ollama.run("curl", "-s", f"{OLLAMA}/health", check=False).returncode == 0, "it listens")
    ollama.run("systemctl", "start", "gpusvc-gateway.socket")
    assert json.loads(ollama.curl(f"{GATEWAY}/health")) == {"status": "ok"}
    assert not ollama.is_active("gpusvc-ollama.socket")
    ollama.run("systemctl", "stop", "squatter")
    ollama.run("systemctl", "reset-failed")


def test_keep_alive_reaches_the_watchdog_and_ends_with_the_model(ollama: Host) -> None:
    ollama.write_model("qwen", keys='idle_timeout = "1h"')
    chat(ollama, "qwen", keep_alive="2s")
    ollama.wait_until(lambda: not ollama.is_active("model@qwen.service"), "it is unloaded when it is idle")
    chat(ollama, "qwen")
    assert json.loads(ollama.curl(f"{GATEWAY}/gpusvc/models/qwen"))["idle_timeout_seconds"] == 3600
    chat(ollama, "qwen", keep_alive=-1)
    ollama.wait_until(
        lambda: json.loads(ollama.curl(f"{GATEWAY}/gpusvc/models/qwen"))["idle_timeout_seconds"] == 0, "it is kept"
    )
    ollama.run("systemctl", "restart", "gpusvc-api.service", "gpusvc-gateway.service", "gpusvc-watchdog.service")
    assert "Kept by" in ollama.run("gpusvc", "status", "qwen").stdout
    (loaded,) = json.loads(ollama.curl(f"{OLLAMA}/api/ps"))["models"]
    assert loaded["expires_at"].startswith("2286")
    asked = json.dumps({"model": "qwen", "keep_alive": 0})
    assert json.loads(ollama.curl(f"{OLLAMA}/api/generate", "-d", asked))["done_reason"] == "unload"
    assert not ollama.is_active("model@qwen.service")
    assert ollama.remains("qwen") == []
