"""What vLLM and SGLang take for a directory of safetensors.

Sizes follow vllm/v1/kv_cache_interface.py (``max_memory_usage_bytes``) and sglang/srt/mem_cache/memory_pool.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpusvc.quantity import GIB
from gpusvc.weights import huggingface
from gpusvc.weights.command import EngineCommand, option
from gpusvc.weights.layers import Layer
from gpusvc.weights.llama_memory import CONTEXT, F16_BYTES, SHORT_CONTEXT
from gpusvc.weights.parts import USUAL_COMPUTE_BYTES, Estimate

_MAX_GPUS = 1024
_BATCH_TOKENS = 2048

_CACHE_TYPE = option("--kv-cache-dtype")
_SHARE = option("--gpu-memory-utilization --mem-fraction-static")
_TENSOR_PARALLEL = option("-tp --tensor-parallel-size --tp-size --tp")
_PIPELINE_PARALLEL = option("-pp --pipeline-parallel-size --pp-size")
_DATA_PARALLEL = option("-dp --data-parallel-size --dp-size")
_WITHIN_TENSOR = option("--enable-dp-attention")
_IN_RAM = option("--cpu-offload-gb")
_BATCHED = option("--max-num-batched-tokens --chunked-prefill-size")

# Weights as they are loaded, beside the file: scales, buffers of layers, a vocabulary padded for the split.
_LOADED = 1.1


def of_safetensors(path: Path, asked: EngineCommand) -> Estimate | None:
    """Return the estimate for a file or a directory of safetensors; None if ``path`` is neither.

    Raises:
        OSError: it cannot be read.
    """
    files = huggingface.weight_files(path)
    if not files or not all(map(huggingface.is_safetensors, files)):
        return None
    split = max(1, min(asked.number(_TENSOR_PARALLEL) or 1, _MAX_GPUS))
    copies = 1 if asked.flag(_WITHIN_TENSOR) else max(1, min(asked.number(_DATA_PARALLEL) or 1, _MAX_GPUS))
    gpus = min(split * max(1, asked.number(_PIPELINE_PARALLEL) or 1) * copies, _MAX_GPUS)
    weights = max(0, _loaded_bytes(files) * copies - _gibibytes(asked) * gpus)
    found = Estimate(weights, 0, 0, USUAL_COMPUTE_BYTES, gpus=gpus, gpu_share=_gpu_share(asked))
    shape = huggingface.shape_of(huggingface.read_config(path)) if path.is_dir() else None
    if shape is None:
        return found
    tokens = _served_tokens(asked, shape.context)
    number_bytes = 1.0 if (asked.value(_CACHE_TYPE) or "").startswith("fp8") else F16_BYTES
    batch = asked.number(_BATCHED) or _BATCH_TOKENS
    numbers = sum(_numbers_kept(layer, tokens, batch) * _copies(layer, split) for layer in shape.layers)
    state = sum(layer.state_bytes for layer in shape.layers)
    return found._replace(cache_bytes=round(numbers * number_bytes * copies), state_bytes=state * copies, tokens=tokens)


def _loaded_bytes(files: Sequence[Path]) -> int:
    return round(sum(file.stat().st_size for file in files) * _LOADED)


def _gibibytes(asked: EngineCommand) -> int:
    """Return what vLLM is told to leave in RAM, for each GPU."""
    try:
        return max(0, min(round(float(asked.value(_IN_RAM) or 0) * GIB), 1 << 46))
    except (ValueError, OverflowError):
        return 0


def _served_tokens(asked: EngineCommand, longest: int) -> int:
    number = asked.number(CONTEXT)
    return min(longest, SHORT_CONTEXT) if number is None else number or longest


def _numbers_kept(layer: Layer, tokens: int, batch: int) -> int:
    """Return how many numbers a layer keeps for one request of the longest context."""
    kept = min(tokens, layer.window + batch) if layer.window else tokens
    return kept * (layer.keys + layer.values)


def _copies(layer: Layer, split: int) -> float:
    """Return how often the cache exists in all: GPUs of tensor parallelism beyond its heads have copies."""
    return max(1.0, split / max(layer.heads, 1))


def _gpu_share(asked: EngineCommand) -> float | None:
    """Return the share of each GPU that the command lets the engine take, whatever its model needs."""
    try:
        share = float(asked.value(_SHARE) or "")
    except ValueError:
        return None
    return share if 0 < share <= 1 else None
