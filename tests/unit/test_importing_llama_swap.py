"""llama-swap's configuration as model files."""

from __future__ import annotations

import tomllib
from textwrap import dedent
from typing import Any

import pytest

from gpusvc.errors import ConfigError
from gpusvc.importing import llama_swap, yamlfile
from gpusvc.importing.draft import Import
from gpusvc.importing.macros import Macros, unknown

HOME = {"HOME": "/home/ada", "TOKEN": "secret"}


def convert(text: str, environment: dict[str, str] = HOME) -> Import:
    return llama_swap.convert(yamlfile.parse(dedent(text), "config.yaml")[0], "config.yaml", environment)


def files(found: Import) -> dict[str, dict[str, Any]]:
    return {draft.name: tomllib.loads(draft.text()) for draft in found.drafts}


def one(text: str) -> dict[str, Any]:
    """The file of a configuration with one model, which is said to be ``m``, indented by four."""
    return files(convert("models:\n  m:\n" + text))["m"]


def keys_noted(found: Import) -> set[str]:
    return {note.key for note in found.notes}


# ---- a whole configuration ----

WHOLE = """
healthCheckTimeout: 300
logLevel: warn
startPort: 9000
globalTTL: 600
sendLoadingState: true
apiKeys: ["sk-1", "${env.TOKEN}"]
macros:
  ctx: 4096
  server: >
    /opt/llama/llama-server --port ${PORT} -c ${ctx}
  weights: "${env.HOME}/gguf"
models:
  coder:
    macros: {ctx: 32768}
    cmd: |
      # The big one.
      ${server}
        -m ${weights}/coder.gguf \\
        --chat-template-kwargs '{"enable_thinking": false}'
    name: Coder
    description: Writes  code
    aliases: [gpt-4o, {id: gpt-4o-mini}]
    env: ["CUDA_VISIBLE_DEVICES=1,0", "LLAMA_LOG=1=2"]
    ttl: 60
    unloadTimeout: 30
    concurrencyLimit: 4
    useModelName: served/coder
    filters:
      stripParams: "temperature, top_p ,model"
      setParams: {top_k: 20, chat_template_kwargs: {a: [1, x]}, model: no, gone: null}
    metadata: {port: 1}
  org/embed:
    cmd: llama-server --port ${PORT} -m ${weights}/embed.gguf --embeddings
    checkEndpoint: /v1/models
    unlisted: true
  vision:
    cmd: vllm serve org/vision --port 8123 --tensor-parallel-size 2
    proxy: http://127.0.0.1:8123
    checkEndpoint: none
    cmdStop: kill ${PID}
    ttl: 0
hooks: {on_startup: {preload: [gpt-4o, org/embed, absent]}}
peers: {other: {proxy: http://10.0.0.2, models: [x]}}
"""


def test_a_model_takes_over_all_that_has_a_counterpart() -> None:
    assert files(convert(WHOLE))["coder"] == {
        "description": "Coder: Writes code",
        "command": [
            *("/opt/llama/llama-server", "--port", "{port}", "-c", "32768", "-m", "/home/ada/gguf/coder.gguf"),
            *("--chat-template-kwargs", '{"enable_thinking": false}'),
        ],
        "aliases": ["gpt-4o", "gpt-4o-mini"],
        "served_name": "served/coder",
        "start_timeout": "300s",
        "stop_timeout": "30s",
        "idle_timeout": "60s",
        "preload": True,
        "concurrency": 4,
        "env": {"LLAMA_LOG": "1=2"},
        "gpu": {"count": 2, "devices": [1, 0]},
        "filter": {"strip": ["temperature", "top_p"], "set": {"top_k": 20, "chat_template_kwargs": {"a": [1, "x"]}}},
    }


def test_a_model_whose_name_cannot_be_one_gets_another_and_answers_to_the_old_one() -> None:
    embed = files(convert(WHOLE))["embed"]
    assert embed["aliases"] == ["org/embed"]
    assert (embed["health"], embed["preload"], embed["idle_timeout"]) == ("/v1/models", True, "600s")
    assert embed["command"][4] == "/home/ada/gguf/embed.gguf"


def test_a_port_of_its_own_and_no_health_path_and_no_ttl_are_taken_over() -> None:
    vision = files(convert(WHOLE))["vision"]
    assert (vision["port"], vision["health"], vision["keep"], vision["gpu"]) == (8123, "", True, {"count": 2})
    assert "idle_timeout" not in vision


def test_each_key_without_a_counterpart_is_named_with_its_reason() -> None:
    found = convert(WHOLE)
    assert {(note.model, note.key) for note in found.notes} == {
        (None, "logLevel"),
        (None, "startPort"),
        (None, "sendLoadingState"),
        (None, "apiKeys"),
        (None, "peers"),
        (None, "groups"),
        (None, "models"),
        (None, "healthCheckTimeout"),
        (None, "hooks.on_startup.preload"),
        ("coder", "env.CUDA_VISIBLE_DEVICES"),
        ("coder", "filters.setParams.gone"),
        ("coder", "metadata"),
        ("embed", "unlisted"),
        ("vision", "cmdStop"),
    }
    assert all(note.reason.endswith((".", ";")) and len(note.reason) > 20 for note in found.notes)
    assert "secret" not in "".join(map(str, found.notes))


# ---- single keys ----


@pytest.mark.parametrize(
    ("said", "devices"),
    [
        ("0", {"count": 1, "devices": [0]}),
        ("GPU-8a3f,1", {"count": 2, "devices": ["GPU-8a3f", 1]}),
        ("", {"count": 0}),
        ("-1", {"count": 0}),
    ],
)
def test_visible_devices_become_gpus(said: str, devices: dict[str, Any]) -> None:
    assert (
        one(f"    cmd: x ${{PORT}}\n    env: ['CUDA_VISIBLE_DEVICES={said}', CUDA_DEVICE_ORDER=PCI_BUS_ID]")["gpu"]
        == devices
    )


def test_a_container_is_warned_of() -> None:
    found = convert("models: {m: {cmd: 'docker run -p 1:2 image', proxy: 'http://localhost:1'}}")
    assert "control group" in next(note.reason for note in found.notes if note.key == "cmd")


def test_a_proxy_elsewhere_is_named() -> None:
    found = convert("models: {m: {cmd: 'x', proxy: 'https://example.org:444/base'}}")
    assert [note.key for note in found.notes].count("proxy") == 2


def test_parameters_by_name_leave_an_alias_behind() -> None:
    model = "    cmd: x ${PORT}\n    filters: {setParamsByID: {'${MODEL_ID}:high': {a: 1}}}"
    assert one(model)["aliases"] == ["m:high"]


@pytest.mark.parametrize("cmd", ["''", "'# nothing'", "['']", "[]"])
def test_a_model_without_a_command_that_makes_sense_is_left_out_and_named(cmd: str) -> None:
    found = convert(f"models: {{m: {{cmd: {cmd}}}}}")
    assert found.drafts == ()
    assert "cmd" in keys_noted(found)


def test_a_macro_that_nobody_defined_stays_and_is_named() -> None:
    found = convert("models: {m: {cmd: 'x ${PORT} ${nope} ${env.NOPE}'}}")
    assert files(found)["m"]["command"] == ["x", "{port}", "${nope}", "${env.NOPE}"]
    assert len([note for note in found.notes if note.key == "cmd"]) == 2


@pytest.mark.parametrize("text", ["a: 1", "models: 3", "[1]"])
def test_what_has_no_models_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="has no models"):
        convert(text)


# ---- macros ----


def test_a_macro_of_a_model_counts_within_those_of_all() -> None:
    shared = Macros({}, {"ctx": "1", "args": "-c ${ctx}"})
    assert shared.expand("${args}") == "-c 1"
    assert shared.with_more({"ctx": "2"}).expand("${args}") == "-c 2"


def test_a_macro_alone_keeps_its_type() -> None:
    macros = Macros({"E": "x"}, {"n": 7, "f": 0.5, "on": True, "m": {"k": "v"}})
    assert macros.expand_value(["${n}", "a${n}${f}${on}", {"${n}": "${m}"}, "${env.E}", "${gone}", 1]) == [
        *(7, "a70.5true", {"7": {"k": "v"}}, "x", "${gone}", 1)
    ]


def test_macros_that_lead_back_to_themselves_end() -> None:
    assert Macros({}, {"a": "${b}", "b": "<${a}>"}).expand("${a}") == "<${a}>"


def test_macros_that_would_fill_the_memory_are_refused() -> None:
    texts = {"a0": "x" * 1000} | {f"a{number}": f"${{a{number - 1}}}" * 10 for number in range(1, 12)}
    with pytest.raises(ValueError, match="megabyte"):
        Macros({}, texts).expand("${a11}")


def test_macros_that_are_left_are_found_once() -> None:
    assert unknown("${a} ${env.B} ${a} $c {d}") == ["${a}", "${env.B}"]


# ---- YAML ----


def test_yaml_is_read_as_go_reads_it() -> None:
    text = "{a: on, b: true, c: 1:30, d: 1e-3, e: 2020-01-01, f: ~, g: 0x10, h: 1.5}"
    assert yamlfile.parse(text, "x") == [
        {"a": "on", "b": True, "c": "1:30", "d": 0.001, "e": "2020-01-01", "f": None, "g": 16, "h": 1.5}
    ]


def test_yaml_merges_and_overrides() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\nmost: {<<: *b, z: 4}"
    assert yamlfile.parse(text, "x") == [
        {"base": {"x": 1, "y": 2}, "more": {"x": 1, "y": 3}, "most": {"x": 1, "y": 2, "z": 4}}
    ]


def test_tabs_numbers_and_tags_are_those_of_go() -> None:
    text = "a:\t1_000\nb: 017\nc: 089\nd: !secret x\ne: 0o17\n"
    assert yamlfile.parse(text, "x") == [{"a": 1000, "b": 15, "c": 89.0, "d": "x", "e": 15}]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10)
)
MERGES = "x0: &x0 {<<: {a: 1}}\n" + "".join(
    f"x{number}: &x{number} {{<<: [{', '.join([f'*x{number - 1}'] * 9)}]}}\n" for number in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 200000 values"),
        (MERGES, "more than 200000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 200 + "]" * 200, "levels deep"),
        ("? " + "[" * 200 + "]" * 200 + "\n: x", "levels deep"),
        ("a: " + "9" * 5000, "cannot be read"),
    ],
)
def test_yaml_that_would_fill_the_memory_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        yamlfile.parse(text, "config.yaml")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "[", "!!python/name:os.system x", "a: b: c", "\x00", "[" * 5000])
def test_yaml_that_is_none_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        yamlfile.parse(text, "config.yaml")
