"""What is in effect, and which file says so."""

from __future__ import annotations

import os
import pwd
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusvc.config.effective import DEFAULT, Setting, _duration, _size, effective
from gpusvc.config.files import HostConfig, InvalidFileError, load_host, load_model
from gpusvc.config.host import read_host
from gpusvc.config.model import read_model
from gpusvc.config.table import Table
from gpusvc.config.toml import inline
from gpusvc.errors import UnknownModelError
from gpusvc.paths import Paths
from gpusvc.quantity import MAX_DURATION_SECONDS, MAX_SIZE_BYTES, parse_duration, parse_size

BARE = f'user = "{pwd.getpwuid(os.geteuid()).pw_name}"\ncommand = ["/bin/sh"]\n'


def settings(paths: Paths, name: str | None = None) -> dict[str, Setting]:
    return {setting.key: setting for setting in effective(paths, name)}


def as_file(paths: Paths, name: str | None = None) -> str:
    return "\n".join(f"{each.key} = {each.value}" for each in effective(paths, name) if each.value is not None)


def test_a_host_without_a_file_has_every_default() -> None:
    paths = Paths(config=Path("/nonexistent"), runtime=Path("/nonexistent"), state=Path("/nonexistent"))
    table = Table(paths.host_file, {})
    read_host(table)
    found = settings(paths)
    assert sorted(found) == sorted(table.known_keys())
    assert {setting.source for setting in found.values()} == {DEFAULT}
    assert found["gpu.reserve"].value == '"512MiB"'
    assert found["watchdog.idle_timeout"].value == '"15min"'
    assert found["eviction.force_when_busy"].value == "false"


def test_what_the_host_file_says_is_told_apart_from_defaults(paths: Paths) -> None:
    paths.host_file.write_text('max_active = 0\n[gpu]\nexclude = [0, "*1030*"]\n[watchdog]\nidle_timeout = 0\n')
    found = settings(paths)
    assert {key for key, setting in found.items() if setting.source == str(paths.host_file)} == {
        "max_active",
        "gpu.exclude",
        "watchdog.idle_timeout",
    }
    assert found["gpu.exclude"].value == '["0", "*1030*"]'
    assert found["watchdog.idle_timeout"].value == '"0s"'


def test_a_model_has_every_key_but_args_and_the_probe(paths: Paths) -> None:
    paths.model_file("qwen").write_text(BARE)
    table = Table(paths.model_file("qwen"), {})
    read_model(table, "qwen", HostConfig())
    found = settings(paths, "qwen")
    assert sorted(found) == sorted(set(table.known_keys()) - {"args", "probe"})
    assert {key for key, setting in found.items() if setting.source != DEFAULT} == {"command", "user"}
    assert {key for key, setting in found.items() if setting.value is None} == {
        "engine",
        "model",
        "served_name",
        "upstream_key",
        "gpu.vram",
        "ram",
    }


def test_a_model_takes_from_the_host_what_it_does_not_say_itself(paths: Paths) -> None:
    host = paths.host_file
    host.write_text('release_timeout = 5\n[watchdog]\nidle_timeout = "1h"\nbusy_timeout = 0\n')
    model = paths.model_file("qwen")
    model.write_text(BARE + "busy_timeout = 60\n[gpu]\nvram = '9.5G'\n")
    found = settings(paths, "qwen")
    assert [found[key] for key in ("release_timeout", "idle_timeout", "busy_timeout", "busy_action")] == [
        Setting("release_timeout", '"5s"', str(host)),
        Setting("idle_timeout", '"1h"', str(host)),
        Setting("busy_timeout", '"1min"', str(model)),
        Setting("busy_action", '"restart"', DEFAULT),
    ]
    assert found["gpu.vram"] == Setting("gpu.vram", '"9728MiB"', str(model))


def test_the_command_of_a_preset_comes_from_the_file_that_names_the_preset(paths: Paths, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("")
    program.chmod(0o755)
    user = BARE.partition("\n")[0]
    file = paths.model_file("qwen")
    file.write_text(f'{user}\nengine = "vllm"\nmodel = "Qwen/Qwen3-8B"\nenv.PATH = "{tmp_path}"\n')
    command = settings(paths, "qwen")["command"]
    assert command.source == str(file)
    assert (command.value or "").startswith('["vllm", "serve", ')


def test_what_is_shown_may_stand_in_a_file_and_means_the_same(paths: Paths) -> None:
    paths.host_file.write_text(
        'isolation = "best-effort"\n[gpu]\nexclude = ["*GT 1030*"]\n[watchdog]\ninterval = 90.125\n'
        '[gateway]\nhosts = ["a"]\ntls_certificate = "/a"\ntls_key = "/b"\nmax_body = 1025\nupstream_timeout = 1.5\n'
    )
    host = load_host(paths)
    shown = as_file(paths)
    paths.host_file.write_text(shown)
    assert load_host(paths) == host

    odd = r"""
        env = { A = "ä\"\\\u007f\u0001\n", "b.c d" = "" }
        description = "'"
        served_name = "Qwen/Ä"
        concurrency = 2
        keep = true
        [filter]
        strip = ["a\"b"]
        set = { a = [1, [2.5, { "c d" = "é\n", e = {} }], []], b = false, big = 1e16, small = -1e-7, f = 0.0 }
        [scope]
        MemoryMax = "32G"
        IPAccounting = true
    """
    paths.model_file("qwen").write_text(BARE + odd)
    model = load_model(paths, "qwen", host)
    shown = as_file(paths, "qwen")
    paths.model_file("qwen").write_text(shown)
    assert load_model(paths, "qwen", host) == model


def test_nothing_is_in_effect_of_what_is_wrong(paths: Paths) -> None:
    with pytest.raises(UnknownModelError):
        effective(paths, "qwen")
    paths.model_file("qwen").write_text("pinned = 1")
    with pytest.raises(InvalidFileError):
        effective(paths, "qwen")
    paths.host_file.write_text("pinned = 1")
    with pytest.raises(InvalidFileError):
        effective(paths)


@given(st.floats(0, MAX_DURATION_SECONDS) | st.sampled_from([0.1, 90.5, 3600.0, 1e-7]))
def test_a_duration_is_exact_to_the_microsecond(seconds: float) -> None:
    assert abs(parse_duration(_duration(seconds)) - seconds) < 1e-6 + seconds * 1e-12


@given(st.integers(0, MAX_SIZE_BYTES) | st.integers(0, 60).map(lambda power: 2**power))
def test_a_size_is_exact(size: int) -> None:
    assert parse_size(_size(size)) == size


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_is_toml(text: str) -> None:
    assert tomllib.loads(f"x = {inline({text: (text,)})}") == {"x": {text: [text]}}
