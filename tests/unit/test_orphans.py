"""Which processes on a GPU are left over from a server, by name and parentage."""

from __future__ import annotations

import pytest

from gpusvc.doctor.orphans import recognise
from gpusvc.linux.processes import Portrait, Process

PID_1 = (1, "systemd")
SESSION = (900, "systemd")
SHELL = (950, "bash")


def portrait(
    name: str, command: str, *ancestors: tuple[int, str], user: str = "alice", leads_session: bool = False
) -> Portrait:
    return Portrait(Process(4711, 1), name, command, user, ancestors, leads_session)


@pytest.mark.parametrize(
    ("name", "command", "server"),
    [
        ("VLLM::EngineCore", "VLLM::EngineCore", "vLLM"),
        ("ollama", "/usr/local/bin/ollama runner --model /root/.ollama/models/blobs/sha256-1 --port 41234", "Ollama"),
        ("llama-server", "/usr/lib/ollama/llama-server --model x", "Ollama"),
        ("sglang::schedul", "sglang::scheduler", "SGLang"),
        ("main", "/usr/share/localai/backends/llama-cpp/main --addr 127.0.0.1:40123", "LocalAI"),
        ("llama-server", "llama-server -m /srv/q.gguf --port 5801", "llama-server"),
    ],
)
def test_a_part_of_a_server_whose_manager_is_gone_is_an_orphan(name: str, command: str, server: str) -> None:
    assert recognise(portrait(name, command, PID_1)) == (server, None)
    assert recognise(portrait(name, command, SESSION, PID_1)) == (server, None)


def test_a_part_whose_manager_lives_is_no_orphan() -> None:
    engine_core = portrait("VLLM::EngineCore", "VLLM::EngineCore", (800, "vllm"), SHELL, PID_1)
    assert recognise(engine_core) == ("vLLM", "vllm (800)")
    runner = portrait("ollama", "ollama runner --model x", (700, "ollama"), PID_1)
    assert recognise(runner) == ("Ollama", "ollama (700)")


def test_the_main_process_of_a_service_is_no_orphan_though_its_parent_is_systemd() -> None:
    service = portrait("llama-server", "llama-server -m /srv/q.gguf", PID_1, leads_session=True)
    assert recognise(service) == ("llama-server", "systemd (1)")


def test_a_part_that_made_a_session_of_its_own_is_an_orphan_all_the_same() -> None:
    assert recognise(portrait("VLLM::EngineCore", "VLLM::EngineCore", PID_1, leads_session=True)) == ("vLLM", None)


def test_a_server_that_somebody_started_in_a_shell_is_no_orphan() -> None:
    assert recognise(portrait("llama-server", "llama-server -m q.gguf", SHELL, PID_1)) == ("llama-server", "bash (950)")


def test_a_program_that_nobody_knows_is_never_taken_for_an_orphan() -> None:
    assert recognise(portrait("python3", "python3 train.py", PID_1)) == (None, "systemd (1)")
    assert recognise(portrait("Xorg", "/usr/lib/xorg/Xorg :0", PID_1)) == (None, "systemd (1)")
