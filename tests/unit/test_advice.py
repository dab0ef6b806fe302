"""What is told of a model's file although it is right."""

from __future__ import annotations

import os
import pwd

import pytest

from gpusvc.config.advice import all_advice
from gpusvc.paths import Paths

# Not root, which is advised against.
HEAD = f'user = "{pwd.getpwuid(os.geteuid() or pwd.getpwnam("nobody").pw_uid).pw_name}"\n'


def said(paths: Paths, text: str, mode: int = 0o644) -> list[str]:
    file = paths.model_file("qwen")
    file.write_text(HEAD + text)
    file.chmod(mode)
    return [problem.message for problem in all_advice(paths)]


def test_an_engine_that_is_told_its_port_at_an_address_that_is_reached_needs_no_advice(paths: Paths) -> None:
    for host in ("127.0.0.1", "0.0.0.0", "::", "::1", "localhost"):
        assert said(paths, f'command = ["sh", "--host", "{host}", "--port={{port}}"]') == []


def test_a_command_without_a_port_is_told_of_the_variable(paths: Paths) -> None:
    (message,) = said(paths, 'command = ["sh", "-c", "serve"]')
    assert message == "No argument has {port} in it, so the engine must listen on the port in the variable PORT."
    assert said(paths, 'command = ["sh", "-c", "serve"]\nport = 8080') == []


@pytest.mark.parametrize("option", ['"--host", "192.168.1.5"', '"--listen=192.168.1.5"', '"--bind", "fd00::5"'])
def test_an_address_at_which_clients_pass_the_gateway_by_is_named(paths: Paths, option: str) -> None:
    (message,) = said(paths, f'command = ["sh", {option}, "{{port}}"]')
    assert "other machines may use it past the gateway" in message


def test_the_last_address_counts(paths: Paths) -> None:
    assert said(paths, 'command = ["sh", "--host", "10.0.0.1", "--host", "127.0.0.1", "{port}"]') == []


def test_a_file_that_the_gateway_cannot_read_is_named_with_what_has_no_effect(paths: Paths) -> None:
    (message,) = said(paths, 'command = ["sh", "{port}"]', mode=0o600)
    assert message.startswith(
        "Its mode is 0600: the gateway, the API and the watchdog cannot read it, and go by defaults"
    )


def test_a_file_that_is_wrong_gets_no_advice(paths: Paths) -> None:
    assert said(paths, "port = -1") == []


def test_a_model_that_would_run_as_root_is_named_unless_the_host_allows_it(paths: Paths) -> None:
    paths.model_file("qwen").write_text('user = "root"\ncommand = ["sh", "{port}"]')
    (problem,) = all_advice(paths)
    assert problem.key == "user"
    assert problem.message.startswith("The model does not start")
    paths.host_file.write_text("allow_root_engines = true\n")
    assert all_advice(paths) == []
