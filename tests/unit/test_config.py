"""The files of the configuration: what they give, and what is said of those that cannot be right."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusvc.config.files import (
    BusyAction,
    HostConfig,
    HostEviction,
    HostGateway,
    HostGpu,
    HostWatchdog,
    InvalidFileError,
    Isolation,
    ModelConfig,
    Placement,
    check,
    load_host,
    load_model,
    load_startable_model,
    model_names,
)
from gpusvc.config.serving import Serving
from gpusvc.errors import ConfigError, PermissionDeniedError, UnknownModelError
from gpusvc.paths import Paths
from gpusvc.quantity import GIB, MIB

ROOT = Path(__file__).parents[2]
USER = pwd.getpwuid(os.geteuid()).pw_name
HEAD = f'user = "{USER}"\n'
HINT = "A name is letters, digits, ':', '_', '.' or '-', and begins with a letter or digit; see aliases for others."
BARE = HEAD + 'command = ["/bin/sh"]\n'


def write(paths: Paths, name: str, text: str | bytes) -> Path:
    file = paths.model_file(name)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def write_host(paths: Paths, text: str) -> Path:
    paths.host_file.write_text(text)
    return paths.host_file


def model(paths: Paths, text: str, host: HostConfig | None = None) -> ModelConfig:
    write(paths, "qwen", text)
    return load_model(paths, "qwen", host or HostConfig())


def problems_of(paths: Paths, text: str | bytes) -> list[str]:
    """What is said of a model's file, each without the file."""
    file = write(paths, "qwen", text)
    found = [str(problem) for problem in check(paths, [file])]
    assert all(problem.startswith(f"{file}: ") for problem in found)
    return [problem.removeprefix(f"{file}: ") for problem in found]


# What the files give


def test_a_host_without_a_file_has_the_defaults(paths: Paths) -> None:
    assert load_host(paths) == HostConfig(
        isolation=Isolation.REQUIRED,
        max_active=0,
        release_timeout_seconds=30,
        gpu=HostGpu(512 * MIB, (), Placement.PACK, 0),
        eviction=HostEviction(30, 1, False),
        watchdog=HostWatchdog(1, 900, 300, BusyAction.RESTART, 10),
        gateway=HostGateway(1, 512, 900, False, (), (), None, None, False, 30, GIB, 0),
    )


def test_a_host_file_is_read(paths: Paths) -> None:
    write_host(
        paths,
        """
        isolation = "best-effort"
        max_active = 1
        release_timeout = "1min 30s"
        [gpu]
        reserve = "1.5G"
        exclude = [0, "GPU-8a3f", "*GT 1030*"]
        placement = "spread"
        max_active = 3
        [eviction]
        retries = 0
        interval = "250ms"
        force_when_busy = true
        [watchdog]
        interval = "5s"
        idle_timeout = "2h30m"
        busy_timeout = 0
        busy_action = "stop"
        pressure_time = "1m"
        [gateway]
        workers = 2
        max_waiting = 0
        activation_timeout = "2min"
        loading_events = true
        cors_origins = ["https://Chat.example.org:8443", "*", "chrome-extension://abcdef", "http://[::1]:3000"]
        hosts = ["GPU.example.org.", "[fd00::1]"]
        tls_certificate = "/etc/tls/a.pem"
        tls_key = "/etc/tls/a.key"
        allow_without_keys = true
        drain_timeout = 0
        max_body = "64MiB"
        upstream_timeout = "1h"
        """,
    )
    assert load_host(paths) == HostConfig(
        isolation=Isolation.BEST_EFFORT,
        max_active=1,
        release_timeout_seconds=90,
        gpu=HostGpu(3 * GIB // 2, ("0", "GPU-8a3f", "*GT 1030*"), Placement.SPREAD, 3),
        eviction=HostEviction(0, 0.25, True),
        watchdog=HostWatchdog(5, 9000, 0, BusyAction.STOP, 60),
        gateway=HostGateway(
            workers=2,
            max_waiting=0,
            activation_timeout_seconds=120,
            loading_events=True,
            cors_origins=("https://chat.example.org:8443", "*", "chrome-extension://abcdef", "http://[::1]:3000"),
            hosts=("gpu.example.org", "[fd00::1]"),
            tls_certificate=Path("/etc/tls/a.pem"),
            tls_key=Path("/etc/tls/a.key"),
            allow_without_keys=True,
            drain_timeout_seconds=0,
            max_body_bytes=64 * MIB,
            upstream_timeout_seconds=3600,
        ),
    )


def test_a_model_needs_no_more_than_a_command(paths: Paths) -> None:
    config = model(paths, BARE)
    assert (config.name, config.description, config.command) == ("qwen", "qwen", ("/bin/sh",))
    assert (config.engine, config.model, config.aliases, config.env, config.scope) == (None, None, (), {}, {})
    assert (config.port, config.health, config.working_directory) == (0, "/health", Path("/"))
    assert (config.start_timeout_seconds, config.stop_timeout_seconds) == (600, 10)
    assert (config.release_timeout_seconds, config.health_timeout_seconds) == (30, 60)
    assert (config.idle_timeout_seconds, config.busy_timeout_seconds) == (900, 300)
    assert (config.busy_action, config.priority, config.pinned, config.exclusive) == (BusyAction.RESTART, 0, False, ())
    assert (config.gpu.count, config.gpu.devices, config.gpu.vram_bytes) == (1, (), None)


def test_every_key_of_a_model_is_read(paths: Paths, tmp_path: Path) -> None:
    config = model(
        paths,
        f"""
        description = "Qwen3 8B"
        command = ["sh", "-c", "serve", "--port={{port}}", '{{"a": 1}}']
        aliases = ["Qwen/Qwen3-8B"]
        user = "{USER}"
        env = {{ HF_HOME = "/srv/hf", OMP_NUM_THREADS = 8 }}
        working_directory = "{tmp_path}"
        port = 8081
        health = ""
        start_timeout = "2h30m"
        stop_timeout = 5
        release_timeout = "15min"
        health_timeout = 0
        idle_timeout = 0
        busy_timeout = "1h 30min"
        busy_action = "none"
        priority = -5
        pinned = true
        exclusive = ["image", "large/a"]
        served_name = "qwen3"
        concurrency = 4
        show_logs = false
        preload = true
        keep = true
        [filter]
        strip = ["temperature"]
        set = {{ max_tokens = 100, stop = ["a", {{ b = 1.5 }}], stream = true }}
        [gpu]
        count = 2
        devices = [0, "1", "*4090*"]
        vram = "9.5GiB"
        [scope]
        MemoryMax = "32G"
        CPUWeight = 20
        IPAccounting = true
        """,
    )
    assert config.description == "Qwen3 8B"
    assert config.command == ("sh", "-c", "serve", "--port={port}", '{"a": 1}')
    assert config.aliases == ("Qwen/Qwen3-8B",)
    assert config.env == {"HF_HOME": "/srv/hf", "OMP_NUM_THREADS": "8"}
    assert config.working_directory == tmp_path
    assert (config.port, config.health) == (8081, "")
    assert (config.start_timeout_seconds, config.stop_timeout_seconds) == (9000, 5)
    assert (config.release_timeout_seconds, config.health_timeout_seconds) == (900, 0)
    assert (config.idle_timeout_seconds, config.busy_timeout_seconds) == (0, 5400)
    assert (config.busy_action, config.priority, config.pinned) == (BusyAction.NONE, -5, True)
    assert config.exclusive == ("image", "large/a")
    assert config.serving == Serving(
        name="qwen",
        description="Qwen3 8B",
        aliases=("Qwen/Qwen3-8B",),
        served_name="qwen3",
        concurrency=4,
        show_logs=False,
        keep=True,
        preload=True,
        strip=("temperature",),
        set={"max_tokens": 100, "stop": ["a", {"b": 1.5}], "stream": True},
    )
    assert (config.gpu.count, config.gpu.devices, config.gpu.vram_bytes) == (2, ("0", "1", "*4090*"), 19 * GIB // 2)
    assert config.scope == {"MemoryMax": "32G", "CPUWeight": "20", "IPAccounting": "yes"}


def test_a_preset_becomes_a_command_with_the_args_at_its_end(paths: Paths, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    text = f'engine = "llama-server"\nmodel = "{gguf}"\nargs = ["-c", "8192"]\nenv.PATH = "{program.parent}"\n'
    config = model(paths, HEAD + text)
    assert config.command[:3] == ("llama-server", "-m", str(gguf))
    assert config.command[-2:] == ("-c", "8192")
    assert (config.engine, config.model) == ("llama-server", str(gguf))


def test_what_the_host_says_is_the_default_of_a_model(paths: Paths) -> None:
    host = HostConfig(release_timeout_seconds=7, watchdog=HostWatchdog(1, 60, 0, BusyAction.STOP, 10))
    config = model(paths, BARE, host)
    assert (config.release_timeout_seconds, config.idle_timeout_seconds, config.busy_timeout_seconds) == (7, 60, 0)
    assert config.busy_action is BusyAction.STOP
    text = 'release_timeout = 3\nidle_timeout = 0\nbusy_timeout = 5\nbusy_action = "restart"'
    config = model(paths, BARE + text, host)
    assert (config.release_timeout_seconds, config.idle_timeout_seconds, config.busy_timeout_seconds) == (3, 0, 5)
    assert config.busy_action is BusyAction.RESTART


def test_the_digest_changes_with_what_decides_the_footprint_only(paths: Paths) -> None:
    digest = model(paths, BARE).digest()
    assert len(digest) == 8
    assert model(paths, BARE + 'description = "x"\nport = 8080\npinned = true\n[gpu]\nvram = "9G"').digest() == digest
    others = ['env = { A = "b" }', "[gpu]\ncount = 2"]
    digests = {digest} | {model(paths, BARE + other).digest() for other in others}
    digests.add(model(paths, BARE.replace('"/bin/sh"', '"/bin/sh", "-c"')).digest())
    assert len(digests) == 4


def test_models_are_the_files_that_can_be_models(paths: Paths) -> None:
    for name in ("b.toml", "a.toml", ".#a.toml", "a.toml~", "a.toml.dpkg-old", "two words.toml", "README"):
        (paths.models_directory / name).write_text(BARE)
    assert model_names(paths) == ["a", "b"]


def test_without_a_directory_there_are_no_models(paths: Paths) -> None:
    paths.models_directory.rmdir()
    assert model_names(paths) == []
    assert check(paths) == []


# What is said of those that cannot be right


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("comand = []", "comand: There is no such key. Did you mean 'command'?"),
        ("xyzzy = 1", "xyzzy: There is no such key."),
        ("[gpu]\nvrma = 1", "gpu.vrma: There is no such key. Did you mean 'vram'?"),
        ('vram = "9G"', "vram: There is no such key. It belongs in [gpu]."),
        ("[gpu]\nport = 1", "gpu.port: There is no such key. It belongs at the top, before the first [table]."),
        ('"a\\nb" = 1', r"'a\nb': There is no such key."),
        ("description = 1", "description: It must be a string, not an integer."),
        ('description = "a\\nb"', "description: It must be one line of printable characters."),
        ('description = "a\\u0000"', "description: It contains a NUL character."),
        ('aliases = "x"', 'aliases: It must be a list of strings, not a string. Write it as a list: ["…", "…"].'),
        ('aliases = ["x", 1]', "aliases[1]: It must be a string, not an integer."),
        ('aliases = ["x", "x"]', "aliases[1]: 'x' is listed twice."),
        ('aliases = ["qwen"]', "aliases[0]: 'qwen' is the model's name already."),
        ('aliases = [" "]', "aliases[0]: ' ' is empty, or has spaces around it or characters that cannot be printed."),
        ("port = 65536", "port: 65536 is out of range: it must be between 0 and 65535."),
        ("port = -1", "port: -1 is out of range: it must be between 0 and 65535."),
        ("port = true", "port: It must be an integer, not a boolean."),
        ("port = 80.0", "port: It must be an integer, not a number."),
        ("port = 2024-01-01", "port: It must be an integer, not a date or time."),
        ('health = "health"', "health: 'health' does not begin with '/'. Write a path, or \"\" for none."),
        ('health = "/a b"', "health: '/a b' has characters that a URL cannot have."),
        ('health = "/\\r\\n"', r"health: '/\r\n' has characters that a URL cannot have."),
        ("start_timeout = nan", "start_timeout: nan is out of range: a duration is between 0 and 100 years."),
        ("start_timeout = inf", "start_timeout: inf is out of range: a duration is between 0 and 100 years."),
        ("stop_timeout = 0", "stop_timeout: 0 is too short: it must be 1ms or more."),
        ('release_timeout = "0s"', "release_timeout: '0s' is too short: it must be 1ms or more."),
        ("stop_timeout = -1", "stop_timeout: -1 is out of range: a duration is between 0 and 100 years."),
        ('stop_timeout = "-1s"', "stop_timeout: '-1s' is not a duration."),
        ("stop_timeout = true", "stop_timeout: It must be a duration, not a boolean."),
        ("stop_timeout = []", "stop_timeout: It must be a duration, not a list."),
        ('health_timeout = "1ns"', "health_timeout: '1ns' is not a duration: 'ns' is no unit of time."),
        ('idle_timeout = "15ms"', "idle_timeout: '15ms' is too short: it must be 100ms or more."),
        ("idle_timeout = false", "idle_timeout: It must be a duration, not a boolean."),
        ("busy_timeout = 0.01", "busy_timeout: 0.01 is too short: it must be 100ms or more."),
        ('busy_action = "kill"', "busy_action: 'kill' is none of restart, stop, none."),
        ("priority = 1001", "priority: 1001 is out of range: it must be between -1000 and 1000."),
        ("priority = -1001", "priority: -1001 is out of range: it must be between -1000 and 1000."),
        ('priority = "high"', "priority: It must be an integer, not a string."),
        ("pinned = 1", "pinned: It must be a boolean, not an integer. Write true or false, without quotes."),
        ('pinned = "yes"', "pinned: It must be a boolean, not a string. Write true or false, without quotes."),
        ("[gpu]\npinned = true", "gpu.pinned: There is no such key. It belongs at the top, before the first [table]."),
        ('exclusive = "image"', "exclusive: It must be a list of strings, not a string."),
        ('exclusive = ["x", "x"]', "exclusive[1]: 'x' is listed twice."),
        ('exclusive = ["a b"]', "exclusive[0]: 'a b' cannot name a group. It is written as a model's name: letters,"),
        ('exclusive = [""]', "exclusive[0]: '' cannot name a group."),
        ('exclusive = ["x/"]', "exclusive[0]: 'x/' cannot name a group."),
        ('exclusive = ["x/a", "x/b"]', "exclusive[1]: 'x' is listed twice."),
        ('working_directory = "srv"', "working_directory: 'srv' is not an absolute path."),
        ('working_directory = "/dev/null"', "working_directory: '/dev/null' is not a directory."),
        ('working_directory = "/a/b"', "working_directory: '/a/b' cannot be used: No such file or directory."),
        ("env = []", "env: It must be a table, not a list. Write [env], and its keys below."),
        ("env = { A = 1.5 }", "env.A: It must be a string or an integer, not a number."),
        ('env = { "A=B" = "" }', "env.A=B: 'A=B' cannot name a variable."),
        ('env = { "" = "" }', "env.: '' cannot name a variable."),
        ('env = { A = "\\u0000" }', "env.A: It contains a NUL character."),
        ('gpu = { nodes = ["/dev/nvidia1"] }', "gpu.nodes[0]: '/dev/nvidia1' belongs to a GPU."),
        ('gpu = { nodes = ["/dev/dri/renderD128"] }', "gpu.nodes[0]: '/dev/dri/renderD128' belongs to a GPU."),
        ('gpu = { nodes = ["uverbs0"] }', "gpu.nodes[0]: 'uverbs0' is not the path of a device node."),
        ('gpu = { nodes = ["/dev/../etc/passwd"] }', "gpu.nodes[0]: '/dev/../etc/passwd' is not the path"),
        (
            'env = { CUDA_VISIBLE_DEVICES = "0" }',
            "env.CUDA_VISIBLE_DEVICES: It cannot be set. gpusvc sets it to the GPUs",
        ),
        ('env = { CUDA_DEVICE_ORDER = "0" }', "env.CUDA_DEVICE_ORDER: It cannot be set."),
        ('env = { NOTIFY_SOCKET = "0" }', "env.NOTIFY_SOCKET: It cannot be set."),
        ("env = { PORT = 80 }", "env.PORT: It cannot be set."),
        ("gpu = 1", "gpu: It must be a table, not an integer. Write [gpu], and its keys below."),
        ("[gpu]\ncount = -1", "gpu.count: -1 is out of range: it must be between 0 and 1024."),
        ("[gpu]\ndevices = 0", "gpu.devices: It must be a list of GPUs, not an integer."),
        ("[gpu]\ndevices = [-1]", "gpu.devices[0]: -1 is not a GPU: give an index, a UUID or a name pattern."),
        ('[gpu]\ndevices = ["", {}]', "gpu.devices[1]: It must be an integer or a string, not a table."),
        ('[gpu]\ndevices = [0, "0"]', "gpu.devices[1]: '0' is listed twice."),
        ("[gpu]\ncount = 2\ndevices = [0]", "gpu.devices: It names fewer GPUs (1) than count asks for (2)."),
        ('[gpu]\ncount = 0\nvram = "1G"', "gpu.vram: It means nothing where count is 0."),
        ("[gpu]\ncount = 0\ndevices = [0]", "gpu.devices: It means nothing where count is 0."),
        ("[gpu]\nvram = 9", "gpu.vram: 9 is too little: it must be 1.0 MiB or more. Did you mean 9GiB?"),
        ("[gpu]\nvram = 0", "gpu.vram: 0 is too little: it must be 1.0 MiB or more."),
        ("[gpu]\nvram = 9.5", "gpu.vram: It must be a size, not a number. Write 9GiB, 512M or 9.5G, in quotes."),
        ('[gpu]\nvram = "9 parsecs"', "gpu.vram: '9 parsecs' is not a size: 'parsecs' is no unit of bytes."),
        (
            "[scope]\nMemoryMaximum = 1",
            "scope.MemoryMaximum: It is no property of systemd.resource-control(5). Did you",
        ),
        ("[scope]\nNice = 1", "scope.Nice: It is no property of systemd.resource-control(5). Set it on model@"),
        ("[scope]\nMemoryLimit = 1", "scope.MemoryLimit: It belongs to cgroup v1. Use MemoryMax."),
        ('[scope]\nDeviceAllow = "x"', "scope.DeviceAllow: gpusvc decides this property itself."),
        ('[scope]\nSlice = "x"', "scope.Slice: gpusvc decides this property itself."),
        ("[scope]\nKillMode = 1", "scope.KillMode: gpusvc decides this property itself. gpusvc decides how a model is"),
        ("[scope]\nMemoryMax = 1.5", "scope.MemoryMax: It must be a string or an integer or a boolean, not a number."),
        ('[scope]\nMemoryMax = "1G\\n"', r"scope.MemoryMax: '1G\n' has characters that cannot be printed."),
        ('args = ["x"]', "args: It cannot stand beside command. Give either command, or engine, model and args."),
        ('engine = "vllm"', "engine: It cannot stand beside command."),
        ('served_name = ""', "served_name: '' is empty, or has characters that cannot be printed."),
        ("concurrency = -1", "concurrency: -1 is out of range: it must be between 0 and 65536."),
        ('keep = "no"', "keep: It must be a boolean, not a string."),
        ('strip = ["a"]', "strip: There is no such key. It belongs in [filter]."),
        ('[filter]\nstrip = ["model"]', "filter.strip[0]: The engine needs the model's name. served_name says"),
        ('[filter]\nstrip = ["a", "a"]', "filter.strip[1]: 'a' is listed twice."),
        ('[filter]\nset = { model = "a" }', "filter.set.model: It decides which model a request is for. Use served_n"),
        (
            "[filter]\nset = 1",
            "filter.set: It must be a table, not an integer. Write [filter.set], and its keys below.",
        ),
        ("[filter]\nset = { a = [{ b = nan }] }", "filter.set.a: JSON cannot express nan."),
        ("[filter]\nset.a = { b = 1979-05-27 }", "filter.set.a: JSON cannot express a date or time."),
    ],
)
def test_a_wrong_key_is_named_with_what_is_wrong(paths: Paths, text: str, said: str) -> None:
    (first, *more) = problems_of(paths, BARE + text)
    assert first.startswith(said) or any(problem.startswith(said) for problem in more)
    assert all(problem.endswith((".", "?")) for problem in (first, *more))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "command: It is missing. Say what to run, or give engine and model."),
        ('model = "x"', "model: It means nothing without engine. Presets: llama-server, vllm, sglang."),
        ('args = ["x"]', "args: It means nothing without engine. Presets: llama-server, vllm, sglang."),
        ("command = []", "command: It names no program."),
        ('command = [""]', "command: It names no program."),
        ('command = "sh"', "command: It must be a list of strings, not a string."),
        ('command = ["sh", 80]', "command[1]: It must be a string, not an integer."),
        ('command = ["sh", "\\u0000"]', "command[1]: It contains a NUL character."),
        ('command = ["sh", "{PORT}"]', "command: '{PORT}' is not replaced by anything. The one placeholder is {port}."),
        ('command = ["./engine"]', "command: './engine' is a relative path"),
        ('command = ["/no/engine"]', "command: '/no/engine' cannot be run: No such file or directory."),
        ('command = ["no-such-engine"]', "command: There is no program 'no-such-engine' in /usr/local/sbin:"),
        (
            'engine = "vlm"\nmodel = "x"',
            "engine: 'vlm' is no preset: there are llama-server, vllm, sglang. Did you mean",
        ),
        ('engine = "vllm"', "model: It is missing. Say which model the engine serves"),
        ('engine = "vllm"\nmodel = "a b"', "model: 'a b' is neither an absolute path nor a repository"),
        ('engine = "vllm"\nmodel = "x"\nenv.PATH = "/none"', "engine: There is no program 'vllm' in /none."),
        ('engine = "vllm"\nmodel = "x"\nargs = ["{PORT}"]', "args: '{PORT}' is not replaced by anything."),
        ('engine = 1\nmodel = "x"', "engine: It must be a string, not an integer."),
    ],
)
def test_it_must_be_clear_what_to_run(paths: Paths, text: str, said: str) -> None:
    assert any(problem.startswith(said) for problem in problems_of(paths, HEAD + text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a = 1\nb = = 2\n", "It is not valid TOML at line 2, column 5: invalid value."),
        (b"a = 1\na = 2\n", "It is not valid TOML at line 2, column 6: cannot overwrite a value."),
        (b"a = [1,\n", "It is not valid TOML at end of document"),
        (b"a = 1\nb = '\xff'\n", "Line 2 is not UTF-8. Save the file as UTF-8."),
        (b"a = " + b"[" * 5000, "It is nested too deeply."),
        (b"a = " + b"9" * 5000, "It is not valid TOML"),
        (b"#" * (1024 * 1024 + 1), "It is larger than 1 MiB, which no configuration is."),
    ],
)
def test_a_file_that_is_no_toml_is_named_with_the_place(paths: Paths, text: bytes, said: str) -> None:
    (problem,) = problems_of(paths, text)
    assert problem.startswith(said)
    assert problem.endswith(".")


def test_an_unknown_user_is_named(paths: Paths) -> None:
    assert problems_of(paths, 'command = ["sh"]\nuser = "nobody-at-all"') == ["user: There is no user 'nobody-at-all'."]


def test_all_that_is_wrong_is_told_in_one_go(paths: Paths) -> None:
    text = (
        BARE
        + 'port = -1\nhealth = "x"\nnonsense = 1\nstop_timeout = "soon"\n[gpu]\ncount = "two"\n[scope]\nSlice = "x"'
    )
    said = problems_of(paths, text)
    keys = [problem.partition(":")[0] for problem in said]
    assert sorted(keys) == ["gpu.count", "health", "nonsense", "port", "scope.Slice", "stop_timeout"]
    assert keys[0] == "nonsense"  # first, as a misspelt key is often the cause of the rest
    with pytest.raises(InvalidFileError) as caught:
        load_model(paths, "qwen", HostConfig())
    assert isinstance(caught.value, ConfigError)
    assert caught.value.permanent
    assert len(caught.value.problems) == 6
    assert caught.value.message == caught.value.problems[0].sentence
    assert caught.value.hint is not None
    assert "5 more problems" in caught.value.hint


def test_a_host_file_is_held_to_the_same(paths: Paths) -> None:
    file = write_host(paths, 'isolation = "requird"\nrelease_timeout = 0\n[gpu]\nreserve = "-1G"\nexclud = []')
    with pytest.raises(InvalidFileError):
        load_host(paths)
    assert [str(problem) for problem in check(paths)] == [
        f"{file}: isolation: 'requird' is none of required, best-effort. Did you mean 'required'?",
        f"{file}: release_timeout: 0 is too short: it must be 1ms or more.",
        f"{file}: gpu.exclud: There is no such key. Did you mean 'exclude'?",
        f"{file}: gpu.reserve: '-1G' is not a size. Write 9GiB, 512M or 9.5G.",
    ]
    assert check(paths, [file]) == check(paths)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_active = -1", "max_active: -1 is out of range: it must be 0 or more."),
        ("max_active = true", "max_active: It must be an integer, not a boolean."),
        ('placement = "pack"', "placement: There is no such key. It belongs in [gpu]."),
        ('[gpu]\nplacement = "packed"', "gpu.placement: 'packed' is none of pack, spread. Did you mean 'pack'?"),
        ("[gpu]\nmax_active = -1", "gpu.max_active: -1 is out of range: it must be 0 or more."),
        ("eviction = 1", "eviction: It must be a table, not an integer. Write [eviction], and its keys below."),
        ("[eviction]\nretries = -1", "eviction.retries: -1 is out of range: it must be between 0 and 1000000."),
        ("[eviction]\ninterval = 0", "eviction.interval: 0 is too short: it must be 10ms or more."),
        ('[eviction]\nforce_when_busy = "no"', "eviction.force_when_busy: It must be a boolean, not a string. Write"),
        ("[eviction]\nforce = true", "eviction.force: There is no such key."),
        ("[watchdog]\ninterval = 0", "watchdog.interval: 0 is too short: it must be 100ms or more."),
        ('[watchdog]\nidle_timeout = "15ms"', "watchdog.idle_timeout: '15ms' is too short: it must be 100ms or more."),
        ('[watchdog]\nbusy_timeout = "x"', "watchdog.busy_timeout: 'x' is not a duration."),
        ('[watchdog]\nbusy_action = "Stop"', "watchdog.busy_action: 'Stop' is none of restart, stop, none. Did you"),
        ("[watchdog]\npressure_time = 0", "watchdog.pressure_time: 0 is too short: it must be 100ms or more."),
        ("[watchdogs]\ninterval = 1", "watchdogs: There is no such key. Did you mean 'watchdog'?"),
        ('idle_timeout = "1h"', "idle_timeout: There is no such key. It belongs in [watchdog]."),
        ("[gateway]\nworkers = 0", "gateway.workers: 0 is out of range: it must be between 1 and 64."),
        ('[gateway]\nmax_body = "1"', "gateway.max_body: '1' is too little: it must be 1.0 KiB or more."),
        ("[gateway]\nactivation_timeout = 0", "gateway.activation_timeout: 0 is too short: it must be 1ms or more."),
        ('[gateway]\ntls_key = "/a"', "gateway.tls_certificate: It is missing. TLS takes both, and tls_key is there."),
        ('[gateway]\ntls_certificate = "/a"', "gateway.tls_key: It is missing. TLS takes both"),
        ('[gateway]\ntls_key = "a"', "gateway.tls_key: 'a' is not an absolute path."),
        ('[gateway]\nhosts = ["http://a"]', "gateway.hosts[0]: 'http://a' is no host name. Write"),
        ('[gateway]\nhosts = ["a:80"]', "gateway.hosts[0]: 'a:80' is no host name. Write"),
        ('[gateway]\ncors_origins = ["a"]', "gateway.cors_origins[0]: 'a' is no origin. Write"),
        ('[gateway]\ncors_origins = ["*", "http://a/"]', "gateway.cors_origins[1]: 'http://a/' is no origin. Write"),
    ],
)
def test_a_wrong_key_of_the_host_is_named_with_what_is_wrong(paths: Paths, text: str, said: str) -> None:
    file = write_host(paths, text)
    (problem,) = check(paths)
    assert str(problem).removeprefix(f"{file}: ").startswith(said)


# Files that are none


def test_an_unknown_model_is_told_apart_from_a_wrong_one(paths: Paths) -> None:
    write(paths, "qwen", BARE)
    with pytest.raises(UnknownModelError, match=r"There is no model 'qwne'\. Did you mean 'qwen'\?"):
        load_model(paths, "qwne", HostConfig())
    with pytest.raises(UnknownModelError, match=r"Its file would be .*/llama.toml"):
        load_model(paths, "llama", HostConfig())


@pytest.mark.parametrize("name", ["", "../qwen", "/etc/passwd", "a b", "a\0b", "x" * 300])
def test_a_name_that_cannot_be_one_reaches_no_file(paths: Paths, name: str) -> None:
    with pytest.raises(UnknownModelError):
        load_model(paths, name, HostConfig())


def test_things_in_the_place_of_files_are_named(paths: Paths) -> None:
    (paths.models_directory / "directory.toml").mkdir()
    (paths.models_directory / "dangling.toml").symlink_to("nowhere")
    (paths.models_directory / "two words.toml").write_text(BARE)
    os.mkfifo(paths.models_directory / "fifo.toml")
    assert [str(problem).removeprefix(f"{paths.models_directory}/") for problem in check(paths)] == [
        "two words.toml: A model's file must be called NAME.toml, and this name cannot be a model's. " + HINT,
        "dangling.toml: It is a link to nowhere, which does not exist.",
        "directory.toml: It cannot be read: Is a directory.",
        "fifo.toml: It is no regular file.",
    ]


def test_a_file_name_that_is_no_text_can_be_told(paths: Paths) -> None:
    Path(os.fsdecode(os.fsencode(paths.models_directory) + b"/\xff.toml")).write_text(BARE)
    (problem,) = check(paths)
    str(problem).encode()


def test_an_absent_file_that_was_asked_for_is_a_problem(paths: Paths) -> None:
    file = paths.config / "absent.toml"
    assert [str(problem) for problem in check(paths, [file, paths.host_file])] == [
        f"{paths.host_file}: There is no such file.",
        f"{file}: There is no such file.",
    ]


@pytest.mark.usefixtures("as_nobody")
def test_what_may_not_be_read_is_said_so() -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is in a directory of root's own
        paths = Paths(config=Path(directory), runtime=Path(directory), state=Path(directory))
        paths.models_directory.mkdir()
        file = write(paths, "qwen", BARE)
        file.chmod(0)
        assert [str(problem) for problem in check(paths)] == [f"{file}: It cannot be read: Permission denied."]
        with pytest.raises(InvalidFileError, match="Permission denied"):
            load_model(paths, "qwen", HostConfig())
        paths.models_directory.chmod(0)
        try:
            with pytest.raises(PermissionDeniedError):
                model_names(paths)
            assert [str(problem) for problem in check(paths)] == [
                f"{paths.models_directory}: It may not be read. Run the command as root."
            ]
        finally:
            paths.models_directory.chmod(0o755)


# Models among each other


def test_a_name_means_one_model(paths: Paths) -> None:
    a = write(paths, "a", BARE + 'aliases = ["shared", "b"]')
    b = write(paths, "b", BARE + 'aliases = ["shared"]')
    assert [str(problem) for problem in check(paths)] == [
        f"{a}: aliases[0]: 'shared' is the alias of the model 'b' too.",
        f"{a}: aliases[1]: 'b' is the name of the model 'b' too.",
        f"{b}: aliases[0]: 'shared' is the alias of the model 'a' too.",
    ]
    assert [problem.key for problem in check(paths, [b])] == ["aliases[0]", None]
    load_model(paths, "a", HostConfig())  # which looks at no other model


@pytest.mark.parametrize("spelling", ["shared", "\\u0073hared"])
def test_neither_of_two_models_with_one_alias_starts(paths: Paths, spelling: str) -> None:
    write(paths, "a", BARE + 'aliases = ["own", "shared"]')
    write(paths, "b", BARE + f'aliases = ["{spelling}"]')
    write(paths, "c", BARE + 'aliases = ["other"]')
    load_startable_model(paths, "c", HostConfig())
    with pytest.raises(InvalidFileError, match=r"aliases\[1\]: 'shared' is the alias of the model 'b' too"):
        load_startable_model(paths, "a", HostConfig())
    with pytest.raises(InvalidFileError, match=r"aliases\[0\]: 'shared' is the alias of the model 'a' too"):
        load_startable_model(paths, "b", HostConfig())
    write(paths, "b", BARE)
    load_startable_model(paths, "a", HostConfig())


def test_neither_a_model_whose_name_is_an_alias_nor_the_one_with_the_alias_starts(paths: Paths) -> None:
    write(paths, "a", BARE + 'aliases = ["b"]')
    write(paths, "b", BARE)
    with pytest.raises(InvalidFileError, match="'b' is the name of the model 'b' too"):
        load_startable_model(paths, "a", HostConfig())
    with pytest.raises(InvalidFileError, match="The model's name is an alias of the model 'a'"):
        load_startable_model(paths, "b", HostConfig())


def test_what_the_machine_lacks_keeps_a_model_from_starting_and_from_nothing_else(paths: Paths) -> None:
    text = 'user = "nobody-at-all"\ncommand = ["/no/engine"]\nworking_directory = "/no/directory"\n'
    assert model(paths, text).command == ("/no/engine",)
    with pytest.raises(InvalidFileError) as caught:
        load_startable_model(paths, "qwen", HostConfig())
    assert [problem.key for problem in caught.value.problems] == ["user", "working_directory", "command"]


def test_a_file_elsewhere_is_checked_as_the_next_version_of_its_model(paths: Paths, tmp_path: Path) -> None:
    write(paths, "a", BARE + 'aliases = ["x"]')
    write(paths, "b", BARE + 'aliases = ["y"]')
    draft = tmp_path / "a.toml"
    draft.write_text(BARE + 'aliases = ["x"]')
    assert check(paths, [draft]) == []
    draft.write_text(BARE + 'aliases = ["y"]')
    assert [problem.key for problem in check(paths, [draft])] == ["aliases[0]"]


def test_a_model_may_be_called_gpusvc(paths: Paths) -> None:
    assert check(paths, [write(paths, "gpusvc", BARE)]) == []


# What holds for all input


def test_reading_needs_few_modules() -> None:
    command = [sys.executable, "-S", "-c", "import gpusvc.config.files, sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"difflib", "json", "hashlib", "shutil", "subprocess", "socket", "logging"} & set(done.stdout.split())


TOML_VALUES = st.sampled_from(
    """
    0 -1 1e400 nan "" "x" "1h" "9GiB" "\\u0000" true [] ["a"] [[1]] {} {a=1} 1979-05-27 07:32:00 1979-05-27T07:32:00Z
    0x7fffffffffffffff 99999999999999999999
    """.split()  # noqa: SIM905
)
TOML_KEYS = st.sampled_from(
    """
    description command engine model args aliases user env working_directory port health probe start_timeout
    stop_timeout release_timeout health_timeout idle_timeout busy_timeout busy_action priority pinned exclusive
    max_active gpu scope isolation gpu.placement gpu.max_active eviction eviction.retries eviction.interval
    eviction.force_when_busy watchdog watchdog.interval watchdog.idle_timeout watchdog.busy_timeout
    watchdog.busy_action watchdog.pressure_time watchdog.failing_time watchdog.attached_timeout failing_time
    attached_timeout upstream_key probe_paths
    probe.path probe.body gateway gateway.workers gateway.hosts gateway.cors_origins
    gateway.tls_key gateway.max_body served_name concurrency keep filter filter.strip filter.set filter.set.a
    gpu.count gpu.devices gpu.vram gpu.reserve gpu.exclude
    scope.MemoryMax env.A what
    """.split()  # noqa: SIM905
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.dictionaries(TOML_KEYS, TOML_VALUES | st.text().map(repr)).map(
        lambda keys: "\n".join(f"{key} = {value}" for key, value in keys.items()).encode()
    )
)
def test_no_content_raises_anything_but_a_config_error(paths: Paths, content: bytes) -> None:
    paths.host_file.write_bytes(content)
    write(paths, "qwen", content)
    for load in (lambda: load_host(paths), lambda: load_model(paths, "qwen", HostConfig())):
        try:
            load()
        except ConfigError as error:
            assert error.message  # noqa: PT017 - either outcome is right
    for problem in check(paths):
        assert problem.message.endswith((".", "?"))
        assert str(problem).isprintable()
