"""Where the API key of an engine is found, and who gets it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpusvc.config.host import HostConfig
from gpusvc.config.model import ModelConfig, read_model
from gpusvc.config.table import Table
from gpusvc.errors import ConfigError
from gpusvc.importing.draft import Draft
from gpusvc.launcher import upstream_key
from gpusvc.paths import Paths
from gpusvc.state import upstream_key as copies

COMMAND = ["engine", "--port", "{port}"]


def config(source: str, command: list[str] | None = None, **more: object) -> ModelConfig:
    table = Table(Path("qwen.toml"), {"command": command or COMMAND, "upstream_key": source, **more})
    made = read_model(table, "qwen", HostConfig())
    assert table.problems == []
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "key"
    made.write_text("\n  secret \nanother\n")
    return made


def test_the_first_line_of_a_file_is_the_key(file: Path) -> None:
    assert upstream_key.find(config(str(file)), {}) == "secret"


def test_a_credential_of_the_unit_is_the_key(file: Path) -> None:
    assert upstream_key.find(config("key"), {"CREDENTIALS_DIRECTORY": str(file.parent)}) == "secret"


@pytest.mark.parametrize(
    ("option", "command", "key"),
    [
        ("--api-key", ["--api-key", "one"], "one"),
        ("--api-key", ["--api-key=one,two"], "one"),
        ("--api-key", ["--api-key", "old", "--api-key", "new"], "new"),
        ("--api-key-file", ["--api-key-file", "FILE"], "secret"),
        ("--api-key-file", ["--api-key-file=FILE"], "secret"),
    ],
)
def test_an_option_of_the_command_has_the_key(file: Path, option: str, command: list[str], key: str) -> None:
    words = [word.replace("FILE", str(file)) for word in command]
    assert upstream_key.find(config(option, [*COMMAND, *words]), {}) == key


def test_a_relative_file_is_in_the_directory_of_the_engine(file: Path) -> None:
    words = [*COMMAND, "--api-key-file", file.name]
    assert upstream_key.find(config("--api-key-file", words, working_directory=str(file.parent)), {}) == "secret"


@pytest.mark.parametrize("content", ["", "\n\n", "two words", "ungültig", "x" * 5000, "a\x00b"])
def test_what_fits_into_no_header_is_no_key(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        upstream_key.find(config(str(file)), {})
    assert content.strip()[:1000] not in str(caught.value) or not content.strip(), "no message shows it"


@pytest.mark.parametrize(
    ("source", "told"), [("/nowhere/key", "/nowhere/key"), ("key", "credential"), ("--api-key", "--api-key")]
)
def test_a_key_that_is_not_there_is_told(source: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        upstream_key.find(config(source), {})
    assert told in str(caught.value)


def test_a_key_that_stands_in_the_place_of_its_name_gets_into_no_message() -> None:
    with pytest.raises(ConfigError) as caught:
        upstream_key.find(config("sk-abcdef"), {})
    assert "abcdef" not in str(caught.value)


def test_a_pipe_is_no_file_with_a_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError):
        upstream_key.find(config(str(tmp_path / "pipe")), {})


@pytest.mark.parametrize("source", ["", "relative/path", "sk-abc.def", "-xyz", "---x", "two words"])
def test_what_names_no_place_is_a_problem_of_the_file(source: str) -> None:
    table = Table(Path("qwen.toml"), {"command": COMMAND, "upstream_key": source})
    read_model(table, "qwen", HostConfig())
    (problem,) = table.problems
    assert problem.key == "upstream_key"
    assert not source or source not in str(problem), "it may be the key itself"


def test_its_readers_get_the_key_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths(config=tmp_path, runtime=tmp_path, state=tmp_path)
    paths.lease_directory("qwen").mkdir(parents=True)
    monkeypatch.setattr("gpusvc.launcher.upstream_key._gid", lambda _: os.getgid())
    for key in ("first", "second"):
        upstream_key.publish(paths, "qwen", key)
        for reader in copies.READERS:
            assert copies.read(paths, "qwen", reader) == key
            assert stat.S_IMODE(copies.file_of(paths, "qwen", reader).stat().st_mode) == 0o640
    copies.forget(paths, "qwen")
    assert [copies.read(paths, "qwen", reader) for reader in copies.READERS] == [None, None]
    assert list(paths.lease_directory("qwen").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "carried"),
    [
        (["llama-server", "--api-key", "x"], "--api-key"),
        (["llama-server", "--api-key-file=/etc/k"], "--api-key-file"),
        (["vllm", "serve", "m", "--api-key=x"], "--api-key"),
        (["vllm", "serve", "m", "--api-keys", "x"], None),
    ],
)
def test_an_import_carries_the_key_over(words: list[str], carried: str | None) -> None:
    draft = Draft("qwen", "")
    draft.put("command", words)
    draft.carry_key()
    assert draft.get("upstream_key") == carried
