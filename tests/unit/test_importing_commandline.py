"""Commands of engines: words, what stands before an engine, its GPUs, and its relative paths."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpusvc.importing import commandline, gpu_options, shell
from gpusvc.importing.draft import Draft

# ---- words ----

# A shell takes the space behind such a backslash for a word, and nobody means that.
UNCLEAR = re.compile(r"\\[ \t]*$|\\[ \t]+\n")


@given(st.text(alphabet="ab '\"\\\n\t{}-=", max_size=30).filter(lambda text: not UNCLEAR.search(text)))
@example("a 'b\nc' \"d\\$e\"")
@example("a \\\nb \"c\\\nd\" 'e\\\nf'")
def test_words_are_those_of_a_shell(text: str) -> None:
    split = shell.split(text)
    sh = shutil.which("sh")
    assert sh is not None
    # Ends of lines between words end a command there, and separate words here.
    script = "printf '%s\\0' x " + _joined(text)
    done = subprocess.run([sh, "-c", script], capture_output=True, text=True, check=False)
    if split.open_quote:
        assert done.returncode != 0
    else:
        assert split.words == done.stdout.split("\0")[1:-1]


def _joined(text: str) -> str:
    """The text with its ends of lines outside quotes made spaces."""
    quote, kept, position = "", "", 0
    while position < len(text):
        character = text[position]
        if character == "\\" and quote != "'":
            kept += text[position : position + 2]
            position += 2
            continue
        if character in "'\"":
            quote = "" if character == quote else quote or character
        kept += " " if character == "\n" and not quote else character
        position += 1
    return kept


def test_a_quotation_without_an_end_ends_with_the_text() -> None:
    assert shell.split("a don't stop") == shell.Words(["a", "dont stop"], open_quote=True)


def test_spaces_behind_a_backslash_at_the_end_of_a_line_do_not_count() -> None:
    assert shell.split("a \\  \n b").words == ["a", "b"]


def test_lines_of_comment_are_left_out() -> None:
    assert shell.without_comments("# a\nb # c\n  #d\ne") == "b # c\ne"


def test_a_script_is_parted_into_commands() -> None:
    assert shell.simple_commands("cd /x && A=1 exec 'y; z' | t\n(w)") == [
        *(["cd", "/x"], ["A=1", "exec", "y; z"], ["t"], ["w"])
    ]


# ---- what stands before an engine ----


@pytest.mark.parametrize(
    "command",
    [
        "docker run img",
        "/usr/bin/docker run img",
        "nice -n 5 docker run img",
        "env X=1 Y=2 docker run img",
        "X=1 docker run img",
        "sudo -u me docker run img",
        "sudo -E nice -n 5 env X=1 podman run img",
        "timeout -k 5 1h docker run img",
        "taskset -c 0-3 docker run img",
        "sh -c 'docker run img'",
        "bash -lc 'cd /x && exec docker run img'",
        "bash -c 'nice sh -c \"docker run img\"'",
        "systemd-run --scope engine",
        "ssh host engine",
    ],
)
def test_a_container_is_seen_behind_what_stands_before_it(command: str) -> None:
    assert commandline.is_container(shell.split(command).words)


@pytest.mark.parametrize(
    "command",
    ["engine docker", "podman run --cgroups=disabled img", "nice engine -m docker", "sh -c 'echo docker'", ""],
)
def test_an_engine_is_no_container(command: str) -> None:
    assert not commandline.is_container(shell.split(command).words)


def test_wrappers_without_end_end() -> None:
    assert len(list(commandline.chain(["nice"] * 1000))) < 100


# ---- GPUs ----


def settle(command: str, env: dict[str, str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """What became of a command's GPUs, as a model file has it, and what was said about it."""
    draft = Draft("m", "")
    reports: list[gpu_options.Report] = []
    draft.put("command", gpu_options.settle(draft, shell.split(command).words, env or {}, reports))
    return tomllib.loads(draft.text()), [report.subject for report in reports]


@pytest.mark.parametrize(
    ("command", "gpus"),
    [
        ("vllm serve x -tp 2", 2),
        ("vllm serve x -tp 2 -pp 2", 4),
        ("vllm serve x --tensor-parallel-size=2 --pipeline-parallel-size 2 -dp 2", 8),
        ("vllm serve x -dp 4", 4),
        ("vllm serve x -dp 8 --data-parallel-size-local 2 -tp 2", 4),
        ("python3 -m sglang.launch_server --tp-size=4", 4),
        ("python3 -m sglang.launch_server --tp 4 --dp-size 4 --enable-dp-attention", 4),
        ("python3 -m sglang.launch_server --tp 4 --dp-size 2", 8),
        ("sh -c 'cd /x && vllm serve x -tp 2 -pp 2'", 4),
        ("llama-server -ts 3,1,0", 2),
        ("llama-server -ts 0.5/0.5", 2),
        ("llama-server --device none", 0),
        ("llama-server", None),
        ("vllm serve x -tp 1", None),
        ("vllm serve x -tp 99999 -pp 99999", None),
    ],
)
def test_a_command_says_how_many_gpus_it_wants(command: str, gpus: int | None) -> None:
    assert settle(command)[0].get("gpu", {}).get("count") == gpus


@pytest.mark.parametrize(
    ("command", "devices", "left"),
    [
        ("llama-server --device CUDA1 -c 1", [1], "llama-server -c 1"),
        ("llama-server --device=CUDA1 -c 1", [1], "llama-server -c 1"),
        ("llama-server -dev CUDA0,CUDA2", [0, 2], "llama-server"),
        ("llama-server -sm none -mg 1", [1], "llama-server -sm none"),
        ("llama-server -dev CUDA0,CUDA2 -sm none -mg 1", [2], "llama-server -sm none"),
        ("CUDA_VISIBLE_DEVICES=1 llama-server", [1], "llama-server"),
        ("env CUDA_VISIBLE_DEVICES=1 llama-server", [1], "llama-server"),
        ("env CUDA_VISIBLE_DEVICES=2,3 llama-server --device CUDA1", [3], "llama-server"),
        ("nice -n 5 env CUDA_VISIBLE_DEVICES=1 llama-server", [1], "nice -n 5 env llama-server"),
        ("bash -c 'CUDA_VISIBLE_DEVICES=1 exec llama-server -c 1'", [1], "llama-server -c 1"),
        ("bash -c 'cd /x && CUDA_VISIBLE_DEVICES=1 llama-server'", [1], "bash -c 'cd /x &&  llama-server'"),
        ("bash -c 'export CUDA_VISIBLE_DEVICES=0,1; llama-server'", [0, 1], "bash -c 'true; llama-server'"),
        ("env CUDA_VISIBLE_DEVICES=4,5,6 vllm serve x -tp 2", [4, 5], "vllm serve x -tp 2"),
    ],
)
def test_gpus_by_their_numbers_leave_the_command(command: str, devices: list[int], left: str) -> None:
    made, _ = settle(command)
    assert made["gpu"] == {"count": len(devices), "devices": devices}
    assert made["command"] == shell.split(left).words


def test_other_variables_before_a_command_become_those_of_the_engine() -> None:
    made, said = settle("env A=1 PORT=5 B=x=y engine", {"A": "0", "C": "2"})
    assert (made["command"], made["env"], said) == (["engine"], {"A": "1", "C": "2", "B": "x=y"}, ["PORT"])


def test_an_environment_that_is_emptied_stays_as_it_is() -> None:
    assert settle("env -i A=1 engine")[0]["command"] == ["env", "-i", "A=1", "engine"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("env CUDA_VISIBLE_DEVICES=0 vllm serve x -tp 2", ["CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
        ("env CUDA_VISIBLE_DEVICES=0 llama-server --device CUDA1", ["CUDA_VISIBLE_DEVICES", "--device"]),
        ("env CUDA_VISIBLE_DEVICES=0 llama-server -sm none -mg 1", ["CUDA_VISIBLE_DEVICES", "--main-gpu"]),
        ("llama-server -mg 3", ["--main-gpu"]),
        ("llama-server --device Vulkan0", ["--device"]),
        ("docker run --device /dev/nvidia0 img", []),
    ],
)
def test_what_does_not_fit_is_named(command: str, said: list[str]) -> None:
    assert settle(command)[1] == said


# ---- paths ----


@pytest.mark.parametrize(
    ("command", "paths"),
    [
        ("llama-server -m models/a.gguf --mmproj=mm.gguf -c 1 --lora /x", ["models/a.gguf", "mm.gguf"]),
        ("./llama-server -m /a.gguf", ["./llama-server"]),
        ("bash ./serve.sh 1", ["./serve.sh"]),
        ("bash serve.sh", ["serve.sh"]),
        ("python3 -m sglang.launch_server --model-path ../m", ["../m"]),
        ("bash -c 'exec llama-server -m a.gguf'", ["a.gguf"]),
        ("nice bin/engine", ["bin/engine"]),
        ("llama-server -m $HOME/a.gguf -md ~/b.gguf -hf org/repo", []),
        ("vllm serve org/model --chat-template https://x/y", []),
    ],
)
def test_relative_paths_are_found(command: str, paths: list[str]) -> None:
    assert commandline.relative_paths(shell.split(command).words) == paths
