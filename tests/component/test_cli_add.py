"""add, edit, rm and import as their users run them, on a machine without systemd."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.component.conftest import Machine
from tests.component.test_cli import _NO_BUS, _RUN, Host
from tests.engines import tinygguf
from tests.unit.test_importing_ollama import Store


class Beginner(Host):
    """A host with a tiny model and an engine that could serve it."""

    def __init__(self, root: Path, machine: Machine) -> None:
        super().__init__(root, machine)
        self.gguf = root / "tiny-Q4_0.gguf"
        tinygguf.write(self.gguf)

    def file(self, name: str) -> dict[str, Any]:
        return tomllib.loads(self.paths.model_file(name).read_text())

    def edit(self, name: str, script: str) -> Any:
        """Run ``edit`` with a shell script for an editor; the file is its $1."""
        editor = self.root / "editor"
        editor.write_text(f"#!/bin/sh\n{script}\n")
        editor.chmod(0o755)
        return self.gpusvc("edit", name, VISUAL=str(editor))


@pytest.fixture
def host(machine: Machine, tmp_path: Path) -> Beginner:
    return Beginner(tmp_path / "host", machine)


COMMAND = ("--user", "root", "--gpus", "0", "--", "/bin/sh", "-c", "exit 1")


# ---- add ----


def test_a_command_becomes_a_model(host: Beginner) -> None:
    done = host.gpusvc("add", "tool", *COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"Written to {host.paths.model_file('tool')}. `gpusvc start tool` starts it.\n")
    assert host.file("tool") == {"command": ["/bin/sh", "-c", "exit 1"], "user": "root", "gpu": {"count": 0}}


def test_a_gguf_is_shown_with_what_its_header_says(host: Beginner) -> None:
    done = host.gpusvc(
        "add", "tiny", str(host.gguf), "--user", "root", "--context", "512", "--dry-run", "--", "-np", "2"
    )
    shown = done.stdout.splitlines()
    assert shown[0] == "# tiny random llama, Q4_0, 526.3 KiB, made for a context of 4096 tokens."
    assert "counts as 386.2 MiB of VRAM" in shown[1]
    assert tomllib.loads(done.stdout) == {
        "engine": "llama-server",
        "model": str(host.gguf),
        "args": ["-c", "512", "-np", "2"],
        "user": "root",
    }
    assert not host.paths.model_file("tiny").exists()


def test_the_parts_of_the_estimate_are_shown(host: Beginner) -> None:
    shown = host.gpusvc("add", "tiny", str(host.gguf), "--user", "root", "--dry-run").stdout.splitlines()
    assert shown[1] == (
        "# Before its first run it counts as 391.7 MiB of VRAM: 418.5 KiB of weights, 2.0 MiB of KV cache for 4096 "
        "tokens, 5.2 MiB of compute buffers, and 384.0 MiB for the driver."
    )


def test_an_estimate_that_cannot_be_made_is_unknown(host: Beginner) -> None:
    done = host.gpusvc("add", "tiny", str(host.gguf), "--user", "root", "--dry-run", "--", "-ot", "(=CPU")
    assert done.stdout.splitlines()[1] == "# How much VRAM it takes is unknown before its first run."


def test_a_share_of_each_gpu_is_told(host: Beginner) -> None:
    weights = host.root / "shared"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}" + bytes(8))
    share = ("--gpu-memory-utilization", "0.4")
    done = host.gpusvc("add", "big", str(weights), "--engine", "vllm", "--user", "root", "--dry-run", "--", *share)
    assert "Its command lets it take 40% of the VRAM of each GPU." in done.stdout


def test_a_directory_is_served_by_vllm(host: Beginner) -> None:
    weights = host.root / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}" + bytes(8))
    shown = host.gpusvc("add", "big", str(weights), "--user", "root", "--gpus", "2", "--dry-run").stdout
    assert tomllib.loads(shown) == {"engine": "vllm", "model": str(weights), "user": "root", "gpu": {"count": 2}}


def test_a_directory_with_a_gguf_brings_its_projector(host: Beginner) -> None:
    directory = host.root / "seeing"
    directory.mkdir()
    model, projector = directory / "m.gguf", directory / "mmproj.gguf"
    tinygguf.write(model)
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    key, value = b"general.architecture", b"clip"
    head += len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(value).to_bytes(8, "little") + value
    projector.write_bytes(head)
    shown = tomllib.loads(host.gpusvc("add", "seeing", str(directory), "--user", "root", "--dry-run").stdout)
    assert (shown["model"], shown["args"]) == (str(model), ["--mmproj", str(projector)])
    refused = host.gpusvc("add", "seeing", str(projector))
    assert (refused.returncode, "is the projector of a model" in refused.stderr) == (2, True)


def test_what_cannot_be_right_is_not_written(host: Beginner) -> None:
    done = host.gpusvc("add", "broken", "--user", "nobody-at-all", "--port", "1", "--", "/no/such/program")
    assert done.returncode == 1
    assert "There is no user 'nobody-at-all'" in done.stderr
    assert "'/no/such/program' cannot be run" in done.stderr
    assert not host.paths.model_file("broken").exists()


def test_a_model_that_is_there_is_replaced_by_force_only(host: Beginner) -> None:
    assert host.gpusvc("add", "tool", *COMMAND).returncode == 0
    refused = host.gpusvc("add", "tool", *COMMAND[:-1], "exit 2")
    assert (refused.returncode, host.file("tool")["command"][-1]) == (2, "exit 1")
    assert "`gpusvc edit tool` changes it" in refused.stderr
    assert host.gpusvc("add", "--force", "tool", *COMMAND[:-1], "exit 2").returncode == 0
    assert host.file("tool")["command"][-1] == "exit 2"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tool"],
        ["../tool", "--", "/bin/sh"],
        ["tool", "/no/such/file.gguf"],
        ["tool", "/etc"],
        ["tool", "--context", "5", "--", "/bin/sh"],
    ],
)
def test_what_makes_no_sense_is_wrong_usage(host: Beginner, arguments: list[str]) -> None:
    done = host.gpusvc("add", *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_a_file_that_the_engine_may_not_read_is_warned_of(host: Beginner, tmp_path: Path) -> None:
    done = host.gpusvc("add", "tiny", str(host.gguf), "--user", "nobody", "--dry-run")
    # Directories of pytest are below /tmp, which a model has of its own.
    assert done.returncode == 1 or "Warning: " in done.stderr


# ---- edit ----


def test_a_change_is_applied_and_what_it_means_is_told(host: Beginner) -> None:
    host.add_model("tool")
    done = host.edit("tool", 'echo \'aliases = ["t"]\' | cat - "$1" > "$1.new" && mv "$1.new" "$1"')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{host.paths.model_file('tool')} is written. ")
    assert host.file("tool")["aliases"] == ["t"]


def test_what_is_not_changed_is_not_written(host: Beginner) -> None:
    file = host.add_model("tool")
    before = file.stat().st_mtime_ns
    assert host.edit("tool", "exit 0").stdout == "Nothing is changed.\n"
    assert file.stat().st_mtime_ns == before


def test_a_broken_save_is_refused_and_kept_aside(host: Beginner) -> None:
    text = host.add_model("tool").read_text()
    done = host.edit("tool", 'echo "ports = 1" > "$1"')
    assert (done.returncode, host.paths.model_file("tool").read_text()) == (1, text)
    assert f"{host.paths.model_file('tool')}: ports: There is no such key." in done.stderr
    copy = Path(done.stderr.strip().rpartition(" ")[2].rstrip("."))
    assert copy.read_text() == "ports = 1\n"
    copy.unlink()
    copy.parent.rmdir()


def test_a_broken_save_may_be_edited_again(host: Beginner) -> None:
    host.add_model("tool")
    good = host.root / "good.toml"
    good.write_text(host.paths.model_file("tool").read_text() + "\n[scope]\nMemoryMax = '1G'\n")
    editor = host.root / "editor"
    # Nonsense at first, and then what is right.
    editor.write_text(f'#!/bin/sh\nif grep -q nonsense "$1"; then cat {good} > "$1"; else echo nonsense > "$1"; fi\n')
    editor.chmod(0o755)
    done, said = on_terminal(host, ["edit", "tool"], "y\n", VISUAL=str(editor))
    assert done == 0, said
    assert "is not valid TOML" in said
    assert host.file("tool")["scope"] == {"MemoryMax": "1G"}


def test_a_file_that_somebody_else_changed_meanwhile_stays(host: Beginner) -> None:
    host.add_model("tool")
    file = host.paths.model_file("tool")
    done = host.edit("tool", f'echo >> "$1"; echo "# theirs" >> {file}')
    assert (done.returncode, "Somebody else changed tool meanwhile" in done.stderr) == (1, True)
    assert file.read_text().endswith("# theirs\n")


def test_an_editor_that_fails_changes_nothing(host: Beginner) -> None:
    text = host.add_model("tool").read_text()
    assert host.edit("tool", 'echo >> "$1"; exit 3').returncode == 1
    assert host.paths.model_file("tool").read_text() == text
    missing = host.gpusvc("edit", "tool", VISUAL="/no/such/editor")
    assert (missing.returncode, missing.stderr) == (2, "gpusvc: There is no editor.\n  Set EDITOR.\n")


def test_who_is_not_there_cannot_be_edited(host: Beginner) -> None:
    assert host.gpusvc("edit", "absent", VISUAL="true").returncode == 3


# ---- rm ----


def test_nobody_to_ask_removes_nothing(host: Beginner) -> None:
    file = host.add_model("tool")
    done = host.gpusvc("rm", "tool")
    assert (done.returncode, file.exists()) == (2, True)
    assert "--yes" in done.stderr


def test_a_file_stays_if_the_release_cannot_be_proven(host: Beginner) -> None:
    file = host.add_model("tool")
    done = host.gpusvc("rm", "--yes", "tool")
    assert (done.returncode, file.exists()) == (1, True)
    assert f"{file} is kept." in done.stderr


def test_a_no_removes_nothing(host: Beginner) -> None:
    file = host.add_model("tool")
    done, said = on_terminal(host, ["rm", "tool"], "n\n")
    assert (done, file.exists()) == (130, True)
    assert f"Remove {file}?" in said


def on_terminal(host: Beginner, arguments: list[str], answer: str, **environment: str) -> tuple[int, str]:
    """Run a command that has a terminal, and give it an answer; its status, and all that it showed."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(host.root), *arguments],
        env={**host.machine.environment, **_NO_BUS, **environment},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    os.write(controller, answer.encode())
    shown = b""
    while True:
        try:
            piece = os.read(controller, 4096)
        except OSError:  # the terminal has nobody left
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    return process.wait(timeout=60), shown.decode()


# ---- import ----

SWAP = """
models:
  org/one: {cmd: "/bin/sh -c 'sleep 1' --port ${PORT}", ttl: 0, unlisted: true}
  two: {cmd: "/bin/cat ${PORT}", env: [CUDA_VISIBLE_DEVICES=]}
"""


def swap(host: Beginner) -> str:
    file = host.root / "config.yaml"
    file.write_text(SWAP)
    return str(file)


def test_an_import_shows_files_and_notes_and_writes_nothing(host: Beginner) -> None:
    done = host.gpusvc("import", "llama-swap", swap(host))
    assert f"## {host.paths.model_file('one')}\n" in done.stdout
    assert 'aliases = ["org/one"]' in done.stdout
    assert "  one: unlisted: The gateway lists every model.\n" in done.stderr
    assert done.stderr.endswith("2 models. Nothing is written without --write.\n")
    assert list(host.paths.models_directory.iterdir()) == []


def test_an_import_knows_the_dry_run_of_add(host: Beginner) -> None:
    source = swap(host)
    shown = host.gpusvc("import", "llama-swap", source, "--dry-run")
    assert shown.stdout == host.gpusvc("import", "llama-swap", source).stdout
    both = host.gpusvc("import", "llama-swap", source, "--dry-run", "--write")
    assert (both.returncode, "exclude each other" in both.stderr) == (2, True)


def test_an_import_writes_files_and_none_if_one_is_there(host: Beginner) -> None:
    host.add_model("two", "port = 1\n")
    refused = host.gpusvc("import", "llama-swap", swap(host), "--write")
    assert (refused.returncode, "already: two. Nothing is written." in refused.stderr) == (2, True)
    assert not host.paths.model_file("one").exists()
    done = host.gpusvc("import", "llama-swap", swap(host), "--write", "--force")
    assert host.file("two")["command"] == ["/bin/cat", "{port}"]
    assert host.file("one")["keep"] is True
    assert "2 models written.\n" in done.stderr


def test_an_update_says_what_changed_and_writes_that(host: Beginner) -> None:
    source = Path(swap(host))
    assert host.gpusvc("import", "llama-swap", str(source), "--write").returncode in (0, 1)
    assert host.gpusvc("import", "llama-swap", str(source), "--update").stdout == ""
    one = host.paths.model_file("one").read_text()
    source.write_text(SWAP.replace("ttl: 0", "ttl: 60").replace("  two", "  three"))
    shown = host.gpusvc("import", "llama-swap", str(source), "--update")
    assert shown.stdout == (
        "one changes:\n  idle_timeout = '60s' is new\n  keep goes, which was True\nthree is new.\n"
        "two is not in it any more: `gpusvc rm two` removes it.\n"
    )
    assert (host.paths.model_file("one").read_text(), host.paths.model_file("three").exists()) == (one, False)
    done = host.gpusvc("import", "llama-swap", str(source), "--update", "--write")
    assert f"{host.paths.model_file('one')} is replaced.\n{host.paths.model_file('three')} is written.\n" in done.stdout
    assert host.file("one")["idle_timeout"] == "60s"
    assert host.gpusvc("import", "llama-swap", str(source), "--update", "--write", "--only", "one").stdout == ""


def test_an_update_never_replaces_what_was_edited(host: Beginner) -> None:
    source = Path(swap(host))
    host.gpusvc("import", "llama-swap", str(source), "--write")
    one, two = host.paths.model_file("one"), host.paths.model_file("two")
    edited = one.read_text() + "# mine\n"
    one.write_text(edited)
    source.write_text(SWAP.replace("ttl: 0", "ttl: 60").replace("/bin/cat", "/bin/tac"))
    done = host.gpusvc("import", "llama-swap", str(source), "--update", "--write")
    assert "one was edited since its import, and stays as it is. --force would change:\n  idle_timeout" in done.stdout
    assert f"{two} is replaced.\n" in done.stdout
    assert one.read_text() == edited
    forced = host.gpusvc("import", "llama-swap", str(source), "--update", "--write", "--force")
    assert f"{one} is replaced.\n" in forced.stdout
    assert host.file("one")["idle_timeout"] == "60s"


def test_an_update_names_files_that_are_only_edited(host: Beginner) -> None:
    source = swap(host)
    host.gpusvc("import", "llama-swap", source, "--write")
    one = host.paths.model_file("one")
    one.write_text(one.read_text().replace("keep = true", "keep = false"))
    shown = host.gpusvc("import", "llama-swap", source, "--update").stdout
    assert shown == (
        "one was edited since its import, and its source did not change. --force would undo:\n"
        "  keep: False becomes True\n"
    )


def test_an_import_says_the_vram_of_files_that_exist(host: Beginner) -> None:
    file = host.root / "config.yaml"
    file.write_text(f"models: {{one: {{cmd: '/bin/cat -m {host.gguf} --port ${{PORT}}'}}}}")
    shown = host.gpusvc("import", "llama-swap", str(file)).stdout
    assert "# Before its first run it counts as " in shown
    assert "vram" not in tomllib.loads(shown)


def test_an_update_leaves_models_of_another_origin(host: Beginner) -> None:
    host.add_model("two", "port = 1\n")
    refused = host.gpusvc("import", "llama-swap", swap(host), "--update", "--write")
    assert (refused.returncode, "not imported from there: two. Nothing is written." in refused.stderr) == (2, True)
    assert not host.paths.model_file("one").exists()


def test_one_broken_file_of_localai_leaves_the_others(host: Beginner, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("name: good\nbackend: cuda12-vllm\nparameters: {model: o/m}\n")
    (tmp_path / "bad.yaml").write_text("name: {{ .Values.name }}\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    (tmp_path / "._gallery_good.yaml").write_text("name: good\n")
    os.mkfifo(tmp_path / "pipe.yml")
    done = host.gpusvc("import", "localai", str(tmp_path))
    assert f"## {host.paths.model_file('good')}\n" in done.stdout
    named = [
        Path(line.strip().partition(": ")[0]).name
        for line in done.stderr.splitlines()
        if "other files are imported" in line
    ]
    assert named == ["bad.yaml", "latin.yaml", "pipe.yml"]


@pytest.mark.parametrize("program", ["llama-swap", "llama-server", "localai"])
def test_what_is_no_file_or_too_large_is_refused_at_once(host: Beginner, tmp_path: Path, program: str) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    with large.open("wb") as stream:
        stream.truncate(1 << 40)
    for path in (pipe, large):
        done = host.gpusvc("import", program, str(path))
        assert (done.returncode, "is not a configuration" in done.stderr) == (2, True)


def test_one_model_can_be_imported_alone(host: Beginner) -> None:
    assert host.gpusvc("import", "llama-swap", swap(host), "--write", "--only", "two").returncode in (0, 1)
    assert [file.name for file in host.paths.models_directory.iterdir()] == ["two.toml"]
    unknown = host.gpusvc("import", "llama-swap", swap(host), "--only", "tow")
    assert (unknown.returncode, "Did you mean 'two'?" in unknown.stderr) == (2, True)


def test_each_program_is_imported_from_what_it_has(host: Beginner, tmp_path: Path) -> None:
    preset = tmp_path / "presets.ini"
    preset.write_text(f"[mine]\nmodel = {host.gguf}\n")
    local = tmp_path / "models"
    local.mkdir()
    (local / "a.yaml").write_text("name: a\nparameters: {model: a.gguf}\n")
    (local / "b.yml").write_text("- name: b\n  backend: vllm\n  parameters: {model: org/b}\n")
    Store(tmp_path / "store").add("registry.ollama.ai/library/tiny/1b", model=host.gguf.read_bytes())
    for program, path, names in (
        ("llama-server", preset, ["mine"]),
        ("localai", local, ["a", "b"]),
        ("ollama", tmp_path / "store", ["tiny:1b"]),
    ):
        done = host.gpusvc("import", program, str(path))
        shown = [line.rpartition("/")[2] for line in done.stdout.splitlines() if line.startswith("## ")]
        assert shown == [f"{name}.toml" for name in names], done.stderr


@pytest.mark.parametrize("program", ["llama-swap", "llama-server", "localai", "ollama"])
def test_what_is_not_there_or_makes_no_sense_is_said_in_a_sentence(
    host: Beginner, tmp_path: Path, program: str
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"\xff\x00")
    for path in (tmp_path / "absent", wrong, Path("/dev/null")):
        done = host.gpusvc("import", program, str(path))
        assert done.returncode in (0, 1, 2)
        assert "bug" not in done.stderr
