"""One small configuration for each kind that imports were once wrong about, and what is right for it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from gpusvc.importing import llama_server, llama_swap, localai, yamlfile
from gpusvc.importing.draft import Import

Keys: TypeAlias = "dict[str, object]"  # dotted; None: the file does not have the key


class Kind(NamedTuple):
    """A configuration, what becomes of its models, and what the notes say: a model or None, and a part of the text."""

    text: str
    models: dict[str, Keys]
    notes: tuple[tuple[str | None, str], ...] = ()
    silent: str = ""  # no note has this in it


SWAP = {
    "macros in every value": Kind(
        """
macros: {home: /opt/lc, idle: 900, par: 2, seed: 7, mode: deep, title: Big model}
models:
  big:
    cmd: ${home}/llama-server --port ${PORT} -m /m/big.gguf
    name: ${title}
    env: ["LD_LIBRARY_PATH=${home}/lib", "SPOT=${env.SPOT}"]
    ttl: ${idle}
    concurrencyLimit: ${par}
    useModelName: ${MODEL_ID}-v2
    aliases: ["${MODEL_ID}-fast"]
    filters: {setParams: {seed: "${seed}", chat_template_kwargs: {mode: "${mode}"}}}
""",
        {
            "big": {
                "command": ["/opt/lc/llama-server", "--port", "{port}", "-m", "/m/big.gguf"],
                "description": "Big model",
                "env": {"LD_LIBRARY_PATH": "/opt/lc/lib", "SPOT": "7"},
                "idle_timeout": "900s",
                "concurrency": 2,
                "served_name": "big-v2",
                "aliases": ["big-fast"],
                "filter.set": {"seed": 7, "chat_template_kwargs": {"mode": "deep"}},
            }
        },
    ),
    "newlines in quotes": Kind(
        """
models:
  scripted:
    cmd: |
      bash -c '
      export A=1
      exec llama-server --port ${PORT} -m /m/a.gguf
      '
""",
        {
            "scripted": {
                "command": ["bash", "-c", "\nexport A=1\nexec llama-server --port {port} -m /m/a.gguf\n"],
            }
        },
    ),
    "a macro in a comment": Kind(
        """
macros:
  old: |
    /opt/b/llama-server
    --port ${PORT} --verbose
  new: |
    /opt/a/llama-server
    --port ${PORT}
models:
  a:
    cmd: |
      # ${old}
      ${new}
      -m /m/a.gguf
""",
        {"a": {"command": ["/opt/a/llama-server", "--port", "{port}", "-m", "/m/a.gguf"]}},
    ),
    "a quotation that never ends": Kind(
        'models: {a: {cmd: "llama-server --port ${PORT} --system-note don\'t"}}',
        {"a": {"command": ["llama-server", "--port", "{port}", "--system-note", "dont"]}},
        (("a", "A quotation mark is not closed"),),
    ),
    "a matrix by model id": Kind(
        """
models:
  chat-7b: {cmd: "llama-server --port ${PORT} -m /m/c.gguf"}
  coder: {cmd: "llama-server --port ${PORT} -m /m/d.gguf"}
  embed.small: {cmd: "llama-server --port ${PORT} -m /m/e.gguf"}
  big: {cmd: "llama-server --port ${PORT} -m /m/f.gguf"}
matrix:
  evict_costs: {coder: 30}
  sets: {day: "(chat-7b | coder) & embed.small", night: "big & embed.small"}
""",
        {
            "chat-7b": {"exclusive": ["swap-1"]},
            "coder": {"exclusive": ["swap-1"], "priority": 29},
            "embed.small": {"exclusive": None},
            "big": {"exclusive": ["swap-1"]},
        },
    ),
    "router.use": Kind(
        """
models:
  a: {cmd: "llama-server --port ${PORT} -m /m/a.gguf"}
  b: {cmd: "llama-server --port ${PORT} -m /m/b.gguf"}
routing:
  router:
    use: matrix
    settings:
      groups: {one: {swap: true, members: [a, b]}}
      matrix: {vars: {x: a, y: b}, sets: {both: "x & y"}}
""",
        {"a": {"exclusive": None}, "b": {"exclusive": None}},
        ((None, "router.use is matrix"),),
    ),
    "persistent with swap": Kind(
        """
models:
  a: {cmd: "llama-server --port ${PORT} -m /m/a.gguf"}
  b: {cmd: "llama-server --port ${PORT} -m /m/b.gguf"}
  c: {cmd: "llama-server --port ${PORT} -m /m/c.gguf"}
groups:
  main: {swap: true, exclusive: false, persistent: true, members: [a, b]}
""",
        {
            "a": {"exclusive": ["main"], "pinned": None},
            "b": {"exclusive": ["main"], "pinned": None},
            "c": {"exclusive": None, "pinned": None},
        },
    ),
    "strip_params": Kind(
        'models: {fim: {cmd: "llama-server --port ${PORT}", filters: {strip_params: "temperature, suffix"}}}',
        {"fim": {"filter.strip": ["suffix", "temperature"]}},
    ),
    "a proxy beats --port": Kind(
        """
models:
  wrapped:
    cmd: /opt/front --listen-port 9100 -- llama-server --port 9200 -m /m/a.gguf
    proxy: http://127.0.0.1:9100
  published:
    cmd: podman run --cgroups=disabled -p 9100:8080 img -m /m/a.gguf --port 8080
    proxy: http://127.0.0.1:9100
""",
        {"wrapped": {"port": 9100}, "published": {"port": 9100}},
    ),
    "GPUs in commands": Kind(
        """
models:
  tp-pp: {cmd: "vllm serve org/m --port ${PORT} --tensor-parallel-size 2 --pipeline-parallel-size 2"}
  dp: {cmd: "vllm serve org/m --port ${PORT} -dp 2"}
  dev1: {cmd: "llama-server --port ${PORT} -m /m/a.gguf --device CUDA1"}
  dev2: {cmd: "llama-server --port ${PORT} -m /m/a.gguf -dev CUDA0,CUDA2"}
  main1: {cmd: "llama-server --port ${PORT} -m /m/a.gguf -sm none -mg 1"}
  env1: {cmd: "env CUDA_VISIBLE_DEVICES=1 llama-server --port ${PORT} -m /m/a.gguf"}
  env2: {cmd: "bash -c 'CUDA_VISIBLE_DEVICES=1 exec llama-server --port ${PORT} -m /m/a.gguf'"}
""",
        {
            "tp-pp": {"gpu.count": 4},
            "dp": {"gpu.count": 2},
            "dev1": {"gpu.devices": [1], "command": ["llama-server", "--port", "{port}", "-m", "/m/a.gguf"]},
            "dev2": {"gpu.count": 2, "gpu.devices": [0, 2]},
            "main1": {
                "gpu.devices": [1],
                "command": ["llama-server", "--port", "{port}", "-m", "/m/a.gguf", "-sm", "none"],
            },
            "env1": {"gpu.devices": [1], "command": ["llama-server", "--port", "{port}", "-m", "/m/a.gguf"]},
            "env2": {"gpu.devices": [1], "command": ["llama-server", "--port", "{port}", "-m", "/m/a.gguf"]},
        },
    ),
    "relative paths": Kind(
        """
models:
  a: {cmd: "llama-server --port ${PORT} -m models/a.gguf"}
  b: {cmd: "bash ./serve.sh ${PORT}"}
""",
        {"a": {}, "b": {}},
        (("a", "models/a.gguf: relative to"), ("b", "./serve.sh: relative to")),
    ),
    "containers that are hidden": Kind(
        """
models:
  a: {cmd: "nice -n 5 docker run --rm -p ${PORT}:8000 img", cmdStop: "docker stop a"}
  b: {cmd: "env X=1 docker run --rm -p ${PORT}:8000 img"}
  c: {cmd: "sudo docker run --rm -p ${PORT}:8000 img"}
  d: {cmd: "sh -c 'docker run --rm -p ${PORT}:8000 img'"}
  e: {cmd: "/opt/run.sh ${PORT}", cmdStop: "docker stop e"}
""",
        {name: {} for name in "abcde"},
        tuple((name, "container") for name in "abcde"),
    ),
    "a name with a zero-width joiner": Kind(
        'models: {a: {name: "\U0001f9d1\u200d\U0001f4bb Coder", cmd: "llama-server --port ${PORT}"}}',
        {"a": {"description": "\U0001f9d1\U0001f4bb Coder"}},
        (("a", "cannot be printed"),),
    ),
    "groups that exclude each other": Kind(
        """
models:
  s1: {cmd: "llama-server --port ${PORT}"}
  s2: {cmd: "llama-server --port ${PORT}"}
  l1: {cmd: "llama-server --port ${PORT}"}
  l2: {cmd: "llama-server --port ${PORT}"}
groups:
  small: {swap: false, exclusive: true, members: [s1, s2]}
  large: {swap: false, exclusive: true, members: [l1, l2]}
""",
        {
            "s1": {"exclusive": ["swap-1/small"]},
            "s2": {"exclusive": ["swap-1/small"]},
            "l1": {"exclusive": ["swap-1/large"]},
            "l2": {"exclusive": ["swap-1/large"]},
        },
    ),
}

PRESETS = {
    "flags, switches and negations": Kind(
        """
[*]
flash-attn = true
fit = false
[a]
model = /m/a.gguf
no-mmproj = 1
kvu = on
cb = off
spec-default = on
reasoning = true
jinja = true
""",
        {
            "a": {
                "model": "/m/a.gguf",
                "args": [
                    *("--flash-attn", "on", "-fit", "off", "--no-mmproj", "-kvu", "--no-cont-batching"),
                    *("--spec-default", "--reasoning", "on", "--jinja"),
                ],
            }
        },
    ),
    "relative paths": Kind(
        """
[a]
model = models/a.gguf
mmproj = models/mmproj-a.gguf
model-draft = models/draft.gguf
chat-template-file = tpl/a.jinja
""",
        {"a": {"model": "/srv/models/a.gguf"}},
        (
            ("a", "model: It is relative to the directory in which llama-server was started"),
            ("a", "mmproj: models/mmproj-a.gguf is relative"),
            ("a", "model-draft: models/draft.gguf is relative"),
            ("a", "chat-template-file: tpl/a.jinja is relative"),
        ),
    ),
    "keys of presets only": Kind(
        "[a]\nmodel = /m/a.gguf\ndedup-cache-models = true\nload-on-startup = true\n",
        {"a": {"model": "/m/a.gguf", "args": None, "preload": True}},
        (("a", "dedup-cache-models"),),
    ),
    "models from elsewhere": Kind(
        "[a]\nmodel-url = https://example.org/a.gguf\n[b]\ndocker-repo = ai/smollm2\n",
        {
            "a": {
                "command": [
                    *("llama-server", "--model-url", "https://example.org/a.gguf"),
                    *("--alias", "a", "--host", "127.0.0.1", "--port", "{port}"),
                ]
            },
            "b": {
                "command": [
                    *("llama-server", "--docker-repo", "ai/smollm2"),
                    *("--alias", "b", "--host", "127.0.0.1", "--port", "{port}"),
                ]
            },
        },
    ),
}

LOCALAI = {
    "a file of a repository": Kind(
        """
name: a
backend: llama-cpp
parameters: {model: "huggingface://o/r-GGUF/r.Q6_K.gguf"}
mmproj: huggingface://o/r-GGUF/mmproj-F16.gguf
""",
        {
            "a": {
                "model": "o/r-GGUF",
                "args": [
                    *("--hf-file", "r.Q6_K.gguf"),
                    *("--mmproj-url", "https://huggingface.co/o/r-GGUF/resolve/main/mmproj-F16.gguf"),
                ],
            }
        },
    ),
    "options of the backend": Kind(
        """
name: a
backend: llama-cpp
parameters: {model: a.gguf}
options: ["spec_type:draft-mtp", "spec_n_max:3", "n_cpu_moe:12", "kv_unified:true", "fit_params:false",
          "swa_full:true", "slot_prompt_similarity:0.5"]
""",
        {
            "a": {
                "args": [
                    *("--spec-type", "draft-mtp", "--spec-draft-n-max", "3", "--n-cpu-moe", "12", "--kv-unified"),
                    *("-fit", "off", "--swa-full", "--slot-prompt-similarity", "0.5"),
                ]
            }
        },
        silent="options",
    ),
    "backends named by hardware": Kind(
        """
- {name: a, backend: cuda12-llama-cpp, parameters: {model: a.gguf}}
- {name: b, backend: cuda13-vllm, parameters: {model: org/b}}
""",
        {"a": {"engine": "llama-server"}, "b": {"engine": "vllm", "model": "org/b"}},
    ),
}


def check(found: Import, kind: Kind) -> None:
    assert {draft.name for draft in found.drafts} == kind.models.keys()
    for draft in found.drafts:
        wanted = kind.models[draft.name]
        assert {key: draft.get(key) or None for key in wanted} == wanted, draft.name
    for model, part in kind.notes:
        assert any(note.model == model and part in str(note) for note in found.notes), (model, part)
    assert not kind.silent or not any(kind.silent in str(note) for note in found.notes)


@pytest.mark.parametrize("name", SWAP)
def test_a_configuration_of_llama_swap(name: str) -> None:
    (document,) = yamlfile.parse(SWAP[name].text, "config.yaml")
    check(llama_swap.convert(document, "/srv/config.yaml", {"SPOT": "7"}), SWAP[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_llama_server(name: str) -> None:
    check(llama_server.convert(PRESETS[name].text, Path("/srv/p.ini"), lambda _: False), PRESETS[name])


@pytest.mark.parametrize("name", LOCALAI)
def test_a_model_of_localai(name: str) -> None:
    documents = yamlfile.parse(LOCALAI[name].text, "a.yaml")
    check(localai.convert([(Path("/srv/a.yaml"), document) for document in documents]), LOCALAI[name])
