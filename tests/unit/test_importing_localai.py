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
            *("--mmproj", "/models/big-mmproj.gguf", "-c", "8192", "-t", "6", "-ctk", "q8_0", "-n", "2048"),
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
    ("backend", "engine"),
    [
        ("cuda12-llama-cpp", "llama-server"),
        ("rocm-llama-cpp-development", "llama-server"),
        ("llama-cpp-avx2", "llama-server"),
        ("nvidia-l4t-arm64-vllm", "vllm"),
        ("cuda13-sglang", "sglang"),
        ("vllm-omni", None),
        ("llama-cpp-quantization", None),
    ],
)
def test_backends_have_names_by_hardware(backend: str, engine: str | None) -> None:
    made = files(convert(f"{{name: m, backend: {backend}, parameters: {{model: o/m}}}}"))
    assert made.get("m", {}).get("engine") == engine


@pytest.mark.parametrize(
    ("option", "args"),
    [
        ("spec_type:draft_mtp", ["--spec-type", "draft-mtp"]),
        ("spec_type:draft,ngram_mod", ["--spec-type", "draft-simple,ngram-mod"]),
        ("spec_n_max:3", ["--spec-draft-n-max", "3"]),
        ("n_cpu_moe:12", ["--n-cpu-moe", "12"]),
        ("cpu_moe", ["--cpu-moe"]),
        ("kv_unified:true", ["--kv-unified"]),
        ("kv_unified:no", ["--no-kv-unified"]),
        ("fit_params:false", ["-fit", "off"]),
        ("swa_full:true", ["--swa-full"]),
        ("swa_full:false", []),
        ("slot_prompt_similarity:0.5", ["--slot-prompt-similarity", "0.5"]),
        ("no_op_offload", ["--no-op-offload"]),
        ("split_mode:row", ["--split-mode", "row"]),
        ("spec_ngram_map_k_size_n:4", ["--spec-ngram-map-k-size-n", "4"]),
        ("draft_cache_type_k:q8_0", ["--spec-draft-type-k", "q8_0"]),
        ("--rpc:host:1", ["--rpc", "host:1"]),
        ("-nocb", ["-nocb"]),
    ],
)
def test_options_are_those_of_llama_server(option: str, args: list[str]) -> None:
    made = files(convert(f"{{name: m, parameters: {{model: x}}, options: ['{option}']}}"))["m"]
    assert made.get("args", []) == args


def test_options_pick_gpus() -> None:
    made = files(convert("{name: m, parameters: {model: x}, options: ['device:CUDA1,CUDA3']}"))["m"]
    assert (made.get("args"), made["gpu"]) == (None, {"count": 2, "devices": [1, 3]})


def test_files_that_were_not_downloaded_are_named_to_the_engine() -> None:
    text = """
    name: m
    parameters: {model: "huggingface://o/r-GGUF/sub/r.Q6_K.gguf"}
    mmproj: huggingface://o/r-GGUF/mmproj-F16.gguf
    draft_model: https://example.org/d.gguf
    """
    found = convert(text)
    assert files(found)["m"]["model"] == "o/r-GGUF"
    assert files(found)["m"]["args"] == [
        *("--hf-file", "sub/r.Q6_K.gguf"),
        *("--mmproj-url", "https://huggingface.co/o/r-GGUF/resolve/main/mmproj-F16.gguf"),
    ]
    assert [note.key for note in found.notes] == ["draft_model"]
    there = files(convert(text, "mmproj-F16.gguf", "d.gguf"))["m"]["args"]
    assert there[2:] == ["--mmproj", "/models/mmproj-F16.gguf", "--model-draft", "/models/d.gguf"]


def test_engine_args_and_parsers_are_options_of_vllm() -> None:
    text = """
    name: m
    backend: vllm
    parameters: {model: o/m}
    tensor_parallel_size: 2
    options: ["tool_parser:hermes", "reasoning_parser:qwen3", "--kv-cache-dtype:fp8", "unheard_of:1"]
    engine_args: {pipeline_parallel_size: 2, enable_prefix_caching: true, async_scheduling: false, extra: {a: 1}}
    """
    found = convert(text)
    made = files(found)["m"]
    assert made["gpu"] == {"count": 4}
    assert made["args"] == [
        *("--tensor-parallel-size", "2", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3", "--kv-cache-dtype", "fp8", "--pipeline-parallel-size", "2"),
        *("--enable-prefix-caching", "--no-async-scheduling", "--extra", '{"a": 1}'),
    ]
    assert [note.key for note in found.notes] == ["options.unheard_of"]


def test_files_that_cannot_be_read_are_named() -> None:
    model = {"name": "m", "parameters": {"model": "x"}}
    found = localai.convert([(SOURCE, model)], lambda _: True, broken=[(Path("/models/b.yaml"), "It is broken.")])
    assert [str(note) for note in found.notes] == ["/models/b.yaml: It is broken. The other files are imported."]


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
