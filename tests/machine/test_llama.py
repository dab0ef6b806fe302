"""The distribution's own llama-server as the engine, with a tiny model and simulated VRAM."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from gpusvc.importing import llama_options
from tests.fakegpu import GIB
from tests.machine.host import GGUF
from tests.machine.tree import Generation

if TYPE_CHECKING:
    from tests.machine.host import Host

pytestmark = pytest.mark.generations(Generation.FORKY)

COMMAND = ["llama-server", "-m", GGUF, "--host", "127.0.0.1", "--port", "{port}", "-c", "512"]
PRESET = f'engine = "llama-server"\nmodel = "{GGUF}"\nargs = ["-c", "512"]\naliases = ["Tiny/Llama"]\n'
BY_HAND = f"command = {json.dumps(COMMAND)}\n"


def start(machine: Host, name: str, engine: str, vram: str = "5GiB") -> None:
    env = f'env = {{ LD_PRELOAD = "libfakecuda.so", FAKE_VRAM = "{vram}" }}\n'
    machine.write_model(name, f"{engine}{env}[gpu]\ndevices = [1]\n")
    machine.start(name)


def options_in(text: str) -> set[tuple[tuple[str, ...], bool]]:
    """The options that --help lists: their names, and whether a value follows them."""
    pattern = re.compile(r"((?:-{1,2}[\w.-]+)(?:, +-{1,2}[\w.-]+)*) ?(.*)")
    # Where the names are short, what they mean begins in the fortieth column.
    lines = [line[:39] if line[39:40] == " " or len(line) <= 40 else line for line in text.splitlines()]
    found = [match for line in lines if not line.startswith("-----") and (match := pattern.match(line))]
    return {(tuple(sorted(re.split(", +", names))), bool(rest.strip())) for names, rest in (m.groups() for m in found)}


def test_the_options_of_its_presets_are_known(machine: Host) -> None:
    listed = options_in(machine.run("llama-server", "--help").stdout)
    known = {
        (tuple(sorted(option.names + option.denials)), option.kind is not llama_options.OptionKind.FLAG)
        for option in llama_options.options()
        if not option.older
    }
    assert len(listed) > 200
    assert listed - known == set()
    assert known - listed == set()


def ask(machine: Host, name: str, *options: str, **more: Any) -> str:
    question = {"messages": [{"role": "user", "content": "the water"}], "max_tokens": 8, **more}
    return machine.curl(machine.url(name, "/v1/chat/completions"), "-d", json.dumps(question), *options)


def test_it_starts_with_its_vram_and_is_seen(machine: Host) -> None:
    start(machine, "seen", BY_HAND)
    row = machine.ps("seen")
    assert row is not None
    assert (row["state"], [gpu["index"] for gpu in row["gpus"]], row["vram_bytes"]) == ("ready", [1], 5 * GIB)
    assert list(machine.gpu_holders(1).values()) == [5 * GIB]
    assert machine.command_lines()[row["pid"]].startswith(f"llama-server -m {GGUF}")


def test_it_answers_a_chat(machine: Host) -> None:
    start(machine, "chat", BY_HAND)
    answer = json.loads(ask(machine, "chat"))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_it_streams_a_chat(machine: Host) -> None:
    start(machine, "stream", BY_HAND)
    lines = [line for line in ask(machine, "stream", "--no-buffer", stream=True).splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    words = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    assert len([word for word in words if word]) >= 4


def test_the_gateway_sends_the_key_that_it_asks_for_and_nobody_else_learns_it(machine: Host) -> None:
    key = "of-the-engine-4711"
    for file, owner in (("/etc/gpusvc/guarded.key", "root"), ("/srv/models/guarded.key", "gpusvc")):
        machine.write(file, f"{key}\n")
        machine.run("chown", owner, file)
        machine.run("chmod", "600", file)
    command = json.dumps([*COMMAND, "--api-key-file", "/srv/models/guarded.key"])
    start(machine, "guarded", f'command = {command}\nupstream_key = "/etc/gpusvc/guarded.key"\n')
    status = ("-o", "/dev/null", "-w", "%{http_code}")
    direct = machine.run("curl", "--silent", *status, machine.url("guarded", "/props"))
    assert direct.stdout == "401"
    question = {"model": "guarded", "messages": [{"role": "user", "content": "the water"}], "max_tokens": 8}
    answer = machine.curl("http://127.0.0.1:8484/v1/chat/completions", "-d", json.dumps(question))
    assert json.loads(answer)["choices"][0]["finish_reason"] == "length"
    assert machine.curl("http://127.0.0.1:8484/upstream/guarded/props", *status) == "200"

    copies = [f"/run/gpusvc/models/guarded/{file}" for file in ("upstream-key", "probe-key")]
    modes = machine.run("stat", "-c", "%U:%G %a", *copies).stdout.splitlines()
    assert modes == ["root:gpusvc-gateway 640", "root:gpusvc-watchdog 640"]
    for user in ("gpusvc", "nobody", "gpusvc-api"):
        assert machine.run("runuser", "-u", user, "--", "cat", copies[0], check=False).returncode != 0
    shown = [machine.run("gpusvc", *words).stdout for words in (("ps", "--json"), ("config", "guarded"))]
    shown += [machine.curl(f"http://127.0.0.1:8484{path}") for path in ("/gpusvc/models/guarded", "/v1/models")]
    shown += [machine.journal(), machine.run("sh", "-c", "cat /run/gpusvc/models/guarded/lease.json").stdout]
    assert not [text for text in shown if key in text]
    for file in ("/etc/gpusvc/guarded.key", "/srv/models/guarded.key"):
        machine.remove(file)


def test_its_stop_is_proven(machine: Host) -> None:
    start(machine, "proven", BY_HAND)
    machine.stop("proven")
    assert "proven is released after" in machine.messages("proven")
    assert "5.0 GiB of VRAM on GPU 1 came back" in machine.messages("proven")
    assert machine.gpu_holders(1) == {}
    assert machine.ps("proven") is None


def test_its_preset_serves_the_model_by_name_and_is_proven_gone(machine: Host) -> None:
    start(machine, "preset", PRESET)
    models = json.loads(machine.curl(machine.url("preset", "/v1/models")))
    assert [model["id"] for model in models["data"]] == ["preset"]
    assert json.loads(ask(machine, "preset", model="preset"))["choices"][0]["finish_reason"] == "length"
    machine.stop("preset")
    assert "5.0 GiB of VRAM on GPU 1 came back" in machine.messages("preset")


def test_an_alias_means_the_model(machine: Host) -> None:
    start(machine, "aliased", PRESET)
    assert machine.run("gpusvc", "stop", "Tiny/Llama").stdout == "aliased is stopped, and nothing of it is left.\n"


def test_its_kill_leaves_nothing_and_it_comes_back(machine: Host) -> None:
    start(machine, "killed", BY_HAND)
    row = machine.ps("killed")
    assert row is not None
    machine.run("kill", "-KILL", str(row["pid"]))
    machine.wait_until(
        lambda: (
            machine.properties("model@killed.service", "NRestarts", "ActiveState")
            == {"NRestarts": "1", "ActiveState": "active"}
        ),
        "it is started again",
        unit="model@killed.service",
    )
    assert list(machine.gpu_holders(1).values()) == [5 * GIB]
    ask(machine, "killed")


def test_its_want_of_memory_is_told(machine: Host) -> None:
    env = 'env = { LD_PRELOAD = "libfakecuda.so", FAKE_VRAM = "40GiB" }\n'
    machine.write_model("oversized", f"{BY_HAND}{env}[gpu]\ndevices = [1]\n")
    assert "it ran out of VRAM" in machine.fail_to_start("oversized")


def test_a_model_file_that_is_no_gguf_is_told_before_the_start(machine: Host) -> None:
    machine.write("/srv/models/not.gguf", "words")
    machine.write_model("no-gguf", 'engine = "llama-server"\nmodel = "/srv/models/not.gguf"\n')
    result = machine.run("gpusvc", "check", check=False)
    assert (result.returncode, result.stdout) == (
        1,
        "/etc/gpusvc/models/no-gguf.toml: model: '/srv/models/not.gguf' is not a GGUF file.\n",
    )
    machine.remove("/srv/models/not.gguf")


def test_clients_of_ollama_use_it(machine: Host) -> None:
    """One after the other, as they depend on each other: an embedding's engine makes no text."""
    env = 'env = { LD_PRELOAD = "libfakecuda.so", FAKE_VRAM = "1GiB" }\n'
    embeds = f'engine = "llama-server"\nmodel = "{GGUF}"\nargs = ["-c", "512", "--embeddings", "--pooling", "mean"]\n'
    machine.write_model("talks", f"{PRESET}{env}[gpu]\ndevices = [1]\n")
    machine.write_model("embeds", f"{embeds}{env}[gpu]\ndevices = [1]\n")

    def asked(path: str, **question: Any) -> list[dict[str, Any]]:
        said = machine.curl(f"http://127.0.0.1:8484/api/{path}", "-d", json.dumps(question), timeout=60)
        return [json.loads(line) for line in said.splitlines()]

    options = {"num_predict": 8, "temperature": 0, "seed": 1, "num_ctx": 4096}
    messages = [{"role": "user", "content": "the water"}]
    lines = asked("chat", model="talks:latest", messages=messages, options=options)
    assert len([line for line in lines if line["message"]["content"]]) >= 4
    last = lines[-1]
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 8)
    assert last["load_duration"] > last["eval_duration"] > 0
    assert last["prompt_eval_duration"] > 0
    (whole,) = asked("chat", model="talks", messages=messages, options=options, stream=False)
    assert whole["message"]["content"] == "".join(line["message"]["content"] for line in lines)
    (first,) = asked("generate", model="talks", prompt="the water", options=options, stream=False)
    assert first["response"]
    (second,) = asked("generate", model="talks", prompt="and", context=first["context"], options=options, stream=False)
    assert second["prompt_eval_count"] > first["prompt_eval_count"]
    (raw,) = asked("generate", model="talks", prompt="the water", raw=True, options=options, stream=False)
    assert (raw["eval_count"], "context" in raw) == (8, False)
    (made,) = asked("embed", model="embeds", input=["the water", "the sun"])
    assert [len(vector) for vector in made["embeddings"]] == [64, 64]
    assert made["prompt_eval_count"] > 0
    listed = {one["name"]: one for one in json.loads(machine.curl("http://127.0.0.1:8484/api/tags"))["models"]}
    assert listed.keys() == {"talks:latest", "embeds:latest", "Tiny/Llama:latest"}
    assert listed["talks:latest"]["details"]["family"] == "llama"
    assert asked("show", model="talks")[0]["model_info"]["llama.context_length"] == 512
    assert asked("show", model="embeds")[0]["capabilities"] == ["embedding"]
    loaded = json.loads(machine.curl("http://127.0.0.1:8484/api/ps"))["models"]
    assert {one["name"]: one["size_vram"] for one in loaded} == {"embeds:latest": GIB, "talks:latest": GIB}
    assert asked("generate", model="talks", keep_alive=0)[0]["done_reason"] == "unload"
    assert machine.ps("talks") is None
    assert machine.ps("embeds") is not None
