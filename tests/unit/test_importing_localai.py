"""LocalAI's model files as model files of gpusvc."""

from __future__ import annotations

import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from gpusvc.errors import ConfigError
from gpusvc.importing import localai, yamlfile
from gpusvc.importing.draft import Import

SOURCE = Path("/models/some.yaml")


def convert(text: str, *there: str) -> Import:
    documents = [(SOURCE, document) for document in yamlfile.parse(dedent(text), "some.yaml")]
    return localai.convert(documents, lambda path: path.name in there)


def files(found: Import) -> dict[str, dict[str, Any]]:
    return {draft.name: tomllib.loads(draft.text()) for draft in found.drafts}


LLAMA = """
name: chat/big
backend: llama-cpp
description: >
  Talks
  a lot
parameters:
  model: big.gguf
  temperature: 0.3
  top_p: 0.9
  max_tokens: 2048
  echo: true
context_size: 8192
threads: 6
f16: true
gpu_layers: 9999999
mmap: false
flash_attention: on
cache_type_k: q8_0
tensor_split: "0.5,0.5"
mmproj: big-mmproj.gguf
lora_adapters: [one.gguf, two.gguf]
lora_scales: [0.5]
concurrency_groups: [vram heavy, solo]
pinned: true
options:
  - use_jinja:true
  - parallel:4
  - unheard_of:1
stopwords: ["<|end|>"]
system_prompt: You are kind.
template:
  chat: |
    {{.Input}}
function:
  grammar: {disable: true}
embeddings: false
"""


def test_llama_cpps_become_its_preset() -> None:
    made = files(convert(LLAMA))["big"]
    assert made == {
        "description": "Talks a lot",
        "engine": "llama-server",
        "model": "/models/big.gguf",
        "args": [
            *("-c", "8192", "-t", "6", "-ctk", "q8_0", "-n", "2048", "--mmproj", "/models/big-mmproj.gguf"),
            *("--flash-attn", "on", "--tensor-split", "0.5,0.5", "--lora-scaled", "/models/one.gguf:0.5"),
            *("--lora", "/models/two.gguf", "--jinja", "--parallel", "4", "--temp", "0.3", "--top-p", "0.9"),
        ],
        "aliases": ["chat/big"],
        "pinned": True,
        "exclusive": ["vram-heavy", "solo"],
        "gpu": {"count": 2},
    }


def test_what_localai_does_to_prompts_and_answers_is_named() -> None:
    keys = {note.key for note in convert(LLAMA).notes}
    said = {"stopwords", "system_prompt", "template", "function", "f16", "mmap", "parameters.echo"}
    assert keys == {*said, "options.unheard_of"}


def test_vllms_become_its_preset() -> None:
    text = """
    - name: vision
      backend: vllm
      parameters: {model: org/vision, temperature: 0.2, max_tokens: 99}
      max_model_len: 4096
      gpu_memory_utilization: 0.8
      trust_remote_code: true
      tensor_parallel_size: 2
      limit_mm_per_prompt: {image: 2}
    """
    assert files(convert(text))["vision"] == {
        "engine": "vllm",
        "model": "org/vision",
        "args": [
            *("--max-model-len", "4096", "--gpu-memory-utilization", "0.8", "--trust-remote-code"),
            *("--limit-mm-per-prompt", '{"image": 2}'),
            *("--override-generation-config", '{"temperature": 0.2, "max_new_tokens": 99}'),
        ],
        "gpu": {"count": 2},
    }


@pytest.mark.parametrize(
    ("said", "there", "model"),
    [
        ("big.gguf", (), "/models/big.gguf"),
        ("huggingface://org/repo/big.gguf", ("big.gguf",), "/models/big.gguf"),
        ("huggingface://org/repo/big.gguf", (), "org/repo"),
        ("https://example.org/big.gguf", (), None),
    ],
)
def test_the_model_is_where_localai_keeps_it(said: str, there: tuple[str, ...], model: str | None) -> None:
    made = files(convert(f"{{name: m, parameters: {{model: '{said}'}}}}", *there))
    assert made.get("m", {}).get("model") == model


@pytest.mark.parametrize(
    "text", ["{name: w, backend: whisper, parameters: {model: x}}", "{name: w}", "{name: w, disabled: true}"]
)
def test_what_no_preset_serves_is_left_out_and_named(text: str) -> None:
    found = convert(text)
    assert (found.drafts, len(found.notes)) == ((), 1)


@pytest.mark.parametrize("text", ["a: 1", "[1, {}]", "text"])
def test_files_without_a_model_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no model of LocalAI"):
        convert(text)
