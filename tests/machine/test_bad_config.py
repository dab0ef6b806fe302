"""Every bad configuration: `gpusvc check` finds all in one go, and a start fails with the same sentence, for good."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.sampled(Generation.BOOKWORM)

ENGINE = 'command = ["test-engine", "--port", "{port}"]\n'
NO_GPU = "[gpu]\ncount = 0\n"

# Of each model: its file, and what must be said of it, with the key first where there is one.
BAD_MODELS = {
    "unknown-key": (
        ENGINE + 'start_timout = "10s"\n',
        "start_timout: There is no such key. Did you mean 'start_timeout'?",
    ),
    "misplaced-key": (ENGINE + "count = 1\n", "count: There is no such key. It belongs in [gpu]."),
    "unknown-gpu-key": (ENGINE + '[gpu]\nvramm = "9GiB"\n', "gpu.vramm: There is no such key. Did you mean 'vram'?"),
    "wrong-type": (ENGINE + 'port = "8000"\n', "port: It must be an integer, not a string."),
    "wrong-table": ("gpu = 1\n" + ENGINE, "gpu: It must be a table, not an integer."),
    "port-too-large": (ENGINE + "port = 65536\n", "port: 65536 is out of range: it must be between 0 and 65535."),
    "bad-duration": (ENGINE + 'stop_timeout = "10 parsecs"\n', "stop_timeout: "),
    "bad-size": (ENGINE + '[gpu]\nvram = "much"\n', "gpu.vram: "),
    "tiny-size": (ENGINE + "[gpu]\nvram = 9\n", "gpu.vram: 9 is too little: it must be 1.0 MiB or more."),
    "negative-count": (ENGINE + "[gpu]\ncount = -1\n", "gpu.count: -1 is out of range"),
    "bad-device": (ENGINE + "[gpu]\ndevices = [-1]\n", "gpu.devices[0]: -1 is not a GPU"),
    "too-few-devices": (
        ENGINE + "[gpu]\ncount = 2\ndevices = [0]\n",
        "gpu.devices: It names fewer GPUs (1) than count",
    ),
    "no-command": (NO_GPU, "command: It is missing."),
    "missing-command": ('command = ["no-such-engine"]\n', "command: There is no program 'no-such-engine'"),
    "missing-path": ('command = ["/opt/no/engine"]\n', "command: '/opt/no/engine' cannot be run"),
    "relative-path": ('command = ["./engine"]\n', "command: './engine' is a relative path"),
    "not-executable": ('command = ["/etc/hosts"]\n', "command: '/etc/hosts' cannot be run: it is not executable."),
    "wrong-placeholder": (
        'command = ["test-engine", "--port", "$PORT"]\n',
        "command: '$PORT' is not replaced by anything.",
    ),
    "unknown-preset": ('engine = "lama-server"\nmodel = "/srv/x.gguf"\n', "engine: 'lama-server' is no preset"),
    "missing-weights": ('engine = "vllm"\nmodel = "/srv/none"\n', "model: '/srv/none' cannot be used: No such file"),
    "both-ways": (ENGINE + 'engine = "vllm"\nmodel = "a/b"\n', "engine: It cannot stand beside command."),
    "unknown-user": (ENGINE + 'user = "nobdy"\n', "user: There is no user 'nobdy'."),
    "owned-variable": (ENGINE + '[env]\nCUDA_VISIBLE_DEVICES = "0"\n', "env.CUDA_VISIBLE_DEVICES: It cannot be set."),
    "no-directory": (ENGINE + 'working_directory = "/no/where"\n', "working_directory: '/no/where' cannot be used"),
    "bad-health": (ENGINE + 'health = "health"\n', "health: 'health' does not begin with '/'."),
    "own-alias": (ENGINE + 'aliases = ["own-alias"]\n', "aliases[0]: 'own-alias' is the model's name already."),
    "owned-property": (
        ENGINE + '[scope]\nDeviceAllow = "/dev/nvidia0"\n',
        "scope.DeviceAllow: gpusvc decides this property",
    ),
    "unknown-property": (ENGINE + '[scope]\nMemoryMaxx = "1G"\n', "scope.MemoryMaxx: It is no property of"),
    "no-toml": ("command = [\n", "It is not valid TOML at "),
}

# What keeps no model from starting, but leaves it open whom a name means.
CONTESTED = {
    "twin-a": (ENGINE + 'aliases = ["Org/Twin"]\n', "aliases[0]: 'Org/Twin' is the alias of the model 'twin-b' too."),
    "twin-b": (ENGINE + 'aliases = ["Org/Twin"]\n', "aliases[0]: 'Org/Twin' is the alias of the model 'twin-a' too."),
    "thief": (ENGINE + 'aliases = ["twin-a"]\n', "aliases[0]: 'twin-a' is the name of the model 'twin-a' too."),
}

# Files that cannot be read, and how each is made.
UNREADABLE = {
    "directory": ("mkdir FILE", "It cannot be read: Is a directory."),
    "pipe": ("mkfifo FILE", "It is no regular file."),
    "dangling": ("ln -s /no/where FILE", "It is a link to /no/where, which does not exist."),
    "latin": (r"printf 'description = \"\344\"\n' > FILE", "Line 1 is not UTF-8."),
    "huge": ("head -c 2000000 /dev/zero > FILE", "It is larger than 1 MiB"),
}

PERMANENT = {"ExecMainStatus": "78", "Result": "exit-code", "SubState": "failed", "NRestarts": "0"}


def file_of(name: str) -> str:
    return f"/etc/gpusvc/models/{name}.toml"


def write_all(machine: Host) -> dict[str, str]:
    """Every bad model; by name, what is to be said of it."""
    expected = {}
    for name, (text, sentence) in {**BAD_MODELS, **CONTESTED}.items():
        machine.write_model(name, text)
        expected[name] = sentence
    for name, (command, sentence) in UNREADABLE.items():
        machine.run("sh", "-c", command.replace("FILE", file_of(name)))
        expected[name] = sentence
    return expected


def test_check_finds_everything_in_one_go(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", 'isolation = "maybe"\n[gpu]\nreserve = "-1G"\n')
    expected = write_all(machine)
    machine.write_model("good")
    machine.write_model("Bad Name", ENGINE)
    result = machine.run("gpusvc", "check", check=False)
    assert result.returncode == 1
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for name, sentence in expected.items():
        assert [line for line in lines if line.startswith(f"{file_of(name)}: {sentence}")], (name, result.stdout)
    for start in ("isolation: 'maybe' is none of required, best-effort.", "gpu.reserve: "):
        assert [line for line in lines if line.startswith(f"/etc/gpusvc/gpusvc.toml: {start}")], start
    assert [
        line for line in lines if line.startswith(f"{file_of('Bad Name')}: A model's file must be called NAME.toml")
    ]
    assert "good.toml" not in result.stdout


def test_check_says_each_thing_once_and_in_one_line(machine: Host) -> None:
    write_all(machine)
    lines = machine.run("gpusvc", "check", check=False).stdout.splitlines()
    assert len(lines) == len({*lines})
    assert all(line.startswith("/etc/gpusvc/") for line in lines)


def test_check_as_json_names_file_key_message_and_hint(machine: Host) -> None:
    machine.write_model("unknown-key", BAD_MODELS["unknown-key"][0])
    result = machine.run("gpusvc", "check", "--json", check=False)
    assert result.returncode == 1
    assert json.loads(result.stdout) == [
        {
            "file": file_of("unknown-key"),
            "key": "start_timout",
            "message": "There is no such key.",
            "hint": "Did you mean 'start_timeout'?",
        }
    ]


def test_check_looks_at_a_file_before_it_is_installed(machine: Host) -> None:
    machine.write("/root/draft.toml", BAD_MODELS["wrong-type"][0])
    result = machine.run("gpusvc", "check", "/root/draft.toml", check=False)
    machine.remove("/root/draft.toml")
    assert (result.returncode, result.stdout) == (1, "/root/draft.toml: port: It must be an integer, not a string.\n")


def test_check_is_content_with_good_models(machine: Host) -> None:
    machine.write_model("good")
    result = machine.run("gpusvc", "check")
    assert result.stdout == "1 model is fine.\n"


def test_the_installed_examples_are_fine(machine: Host) -> None:
    machine.run("sh", "-c", "cp /usr/share/doc/gpusvc/examples/gpusvc.toml /etc/gpusvc/gpusvc.toml")
    assert machine.run("gpusvc", "check", "/etc/gpusvc/gpusvc.toml").stdout == "1 file is fine.\n"


def test_a_file_that_may_not_be_read_is_a_problem_of_check(machine: Host) -> None:
    machine.write_model("private")
    machine.run("chmod", "600", file_of("private"))
    result = machine.run("gpusvc", "check", check=False, user="nobody")
    assert (result.returncode, result.stdout) == (1, f"{file_of('private')}: It cannot be read: Permission denied.\n")


def test_a_badly_configured_model_fails_with_checks_sentence_and_is_not_retried(machine: Host) -> None:
    expected = {name: sentence for name, sentence in write_all(machine).items() if name not in CONTESTED}
    units = {name: f"model@{name}.service" for name in expected}
    machine.run("systemctl", "start", *units.values(), check=False, timeout=120)
    results = {
        name: machine.properties(unit, "ExecMainStatus", "Result", "SubState", "NRestarts")
        for name, unit in units.items()
    }
    assert {name: result for name, result in results.items() if result != PERMANENT} == {}
    said = machine.journal(None, "-o", "cat", *(f"--unit={unit}" for unit in units.values()))
    for name, sentence in expected.items():
        assert f"{file_of(name)}: {sentence}" in said
    status = machine.property(units["unknown-key"], "StatusText")
    assert status == f"{file_of('unknown-key')}: start_timout: There is no such key."


def test_gpusvc_start_tells_what_is_wrong(machine: Host) -> None:
    machine.write_model("unknown-user", BAD_MODELS["unknown-user"][0])
    result = machine.run("gpusvc", "start", "unknown-user", check=False)
    assert result.returncode == 1
    assert f"{file_of('unknown-user')}: user: There is no user 'nobdy'." in result.stderr


def test_two_models_with_one_alias_refuse_to_start(machine: Host) -> None:
    for name in ("twin-a", "twin-b"):
        machine.write_model(name, CONTESTED[name][0] + NO_GPU)
    for name, other in (("twin-a", "twin-b"), ("twin-b", "twin-a")):
        assert f"is the alias of the model {other!r} too" in machine.fail_to_start(name)
        assert machine.properties(f"model@{name}.service", *PERMANENT) == PERMANENT


def test_a_bad_host_file_fails_every_start_for_good(machine: Host) -> None:
    machine.write("/etc/gpusvc/gpusvc.toml", 'isolation = "maybe"\n')
    machine.write_model("innocent")
    said = machine.fail_to_start("innocent")
    assert "/etc/gpusvc/gpusvc.toml: isolation: 'maybe' is none of required, best-effort." in said
    assert machine.properties("model@innocent.service", *PERMANENT) == PERMANENT


def test_a_property_that_systemd_refuses_fails_the_start_for_good_and_leaves_nothing(machine: Host) -> None:
    machine.write_model("immense", scope='MemoryMax = "immense"')
    said = machine.fail_to_start("immense")
    assert "systemd refuses a property of model-immense.scope: " in said, said
    assert "immense" in said
    assert machine.properties("model@immense.service", *PERMANENT) == PERMANENT
    assert machine.pids("model-immense.scope") == []
    assert machine.run("test", "-e", "/run/gpusvc/models/immense/lease.json", check=False).returncode == 1


@pytest.mark.parametrize("name", ["nowhere", "_bad", "-bad"])
def test_a_model_that_does_not_exist_or_cannot_exist_is_not_retried(machine: Host, name: str) -> None:
    machine.run("systemctl", "start", "--", f"model@{name}.service", check=False)
    result = machine.properties(f"model@{name}.service", *PERMANENT)
    assert result == {**PERMANENT, "ExecMainStatus": "66"}


def test_an_unknown_model_is_exit_status_3_and_the_nearest_name(machine: Host) -> None:
    machine.write_model("qwen3")
    result = machine.run("gpusvc", "start", "qwen", check=False)
    assert result.returncode == 3
    assert "There is no model 'qwen'." in result.stderr
    assert "Did you mean 'qwen3'?" in result.stderr


def test_a_command_that_its_user_may_not_execute_fails_with_a_sentence(machine: Host) -> None:
    machine.write("/root/engine", "#!/bin/sh\n", mode=0o700)
    machine.write_model("private-engine", 'command = ["/root/engine"]\n' + NO_GPU)
    assert "gpusvc cannot execute /root/engine: Permission denied." in machine.fail_to_start("private-engine")


def test_a_changed_file_takes_effect_with_the_next_start(machine: Host) -> None:
    machine.write_model("mended", BAD_MODELS["unknown-key"][0] + NO_GPU)
    machine.fail_to_start("mended")
    machine.write_model("mended")
    machine.start("mended")
