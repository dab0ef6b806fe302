"""A first estimate of a model's VRAM, from the files that its command names. A run that was seen knows better.

It reads headers, at most a megabyte of each file, and no weights. A header that makes no sense gives no estimate, and
no estimate is not an estimate of zero.

The estimate is the least that the engine needs. If it is too low, the engine runs out of memory once and gpusvc learns
from it; if it is too high, a model that fits is refused for ever. So:
- A context that the command does not ask for counts as a short one, to which engines fall back (llama.cpp's --fit).
- Slots that the command does not ask for count as one: llama-server makes four, but shares the cache among them.
- Where the command keeps parts of layers in RAM (--n-cpu-moe, --override-tensor), there is no estimate.

llama.cpp's sizes follow src/llama-context.cpp (``n_ctx_seq``: padded to 256, divided by the slots unless the cache is
unified), src/llama-kv-cache-iswa.cpp (layers with a window: window times slots plus a batch, padded to 256),
src/llama-kv-cache.cpp and src/llama-memory-recurrent.cpp (one row for each slot). vLLM's and SGLang's follow
vllm/v1/kv_cache_interface.py (``max_memory_usage_bytes``) and sglang/srt/mem_cache/memory_pool.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpusvc.quantity import MIB, format_size
from gpusvc.weights import architecture, gguf, huggingface
from gpusvc.weights.command import EngineCommand, Option, option, parse_count
from gpusvc.weights.layers import Layer, Shape

# Compute buffers, and what the driver takes for a context, on each GPU.
_COMPUTE_BYTES = 512 * MIB

_SHORT_CONTEXT = 4096
_MAX_BYTES = 1 << 46
_MAX_SLOTS = 256  # llama.h, LLAMA_MAX_SEQ
_MAX_GPUS = 1024
_CELLS = 256  # llama.cpp makes its caches in steps of so many tokens
_BATCH_TOKENS = 2048  # llama.cpp's --batch-size
_UBATCH_TOKENS = 512  # llama.cpp's --ubatch-size
_VLLM_BATCH_TOKENS = 2048

_MODEL = option("-m --model --model-path", "LLAMA_ARG_MODEL")
_CONTEXT = option("-c --ctx-size --max-model-len --context-length", "LLAMA_ARG_CTX_SIZE")
_LAYERS = option("-ngl --gpu-layers --n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")
_CACHE_K = option("-ctk --cache-type-k", "LLAMA_ARG_CACHE_TYPE_K")
_CACHE_V = option("-ctv --cache-type-v", "LLAMA_ARG_CACHE_TYPE_V")
_SLOTS = option("-np --parallel", "LLAMA_ARG_N_PARALLEL")
_BATCH = option("-b --batch-size", "LLAMA_ARG_BATCH")
_UBATCH = option("-ub --ubatch-size", "LLAMA_ARG_UBATCH")
_UNIFIED = option("-kvu --kv-unified", "LLAMA_ARG_KV_UNIFIED", negations="-no-kvu --no-kv-unified")
_WHOLE_WINDOWS = option("--swa-full", "LLAMA_ARG_SWA_FULL")
_OFFLOAD_CACHE = option("-kvo --kv-offload", "LLAMA_ARG_KV_OFFLOAD", negations="-nkvo --no-kv-offload")
_KEEPS_PARTS_IN_RAM = (
    option("-cmoe --cpu-moe", "LLAMA_ARG_CPU_MOE"),
    option("-ncmoe --n-cpu-moe", "LLAMA_ARG_N_CPU_MOE"),
    option("-ncffn --n-cpu-ffn", "LLAMA_ARG_N_CPU_FFN"),
    option("-ot --override-tensor", "LLAMA_ARG_OVERRIDE_TENSOR"),
    option("--cpu-offload-gb"),
)

_PROJECTOR = option("-mm --mmproj", "LLAMA_ARG_MMPROJ")
_OFFLOAD_PROJECTOR = option("--mmproj-offload", "LLAMA_ARG_MMPROJ_OFFLOAD", negations="--no-mmproj-offload --no-mmproj")

_DRAFT = option("-md --model-draft --spec-draft-model", "LLAMA_ARG_SPEC_DRAFT_MODEL")
_DRAFT_OLD = option("", "LLAMA_ARG_MODEL_DRAFT")
_DRAFT_CONTEXT = option("-cd --ctx-size-draft --spec-draft-ctx-size", "LLAMA_ARG_CTX_SIZE_DRAFT")
_DRAFT_LAYERS = option(
    "-ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl", "LLAMA_ARG_SPEC_DRAFT_N_GPU_LAYERS"
)
_DRAFT_CACHE_K = option("-ctkd --cache-type-k-draft --spec-draft-type-k", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K")
_DRAFT_CACHE_V = option("-ctvd --cache-type-v-draft --spec-draft-type-v", "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V")

_CACHE_TYPE = option("--kv-cache-dtype")
_SHARE = option("--gpu-memory-utilization --mem-fraction-static")
_TENSOR_PARALLEL = option("-tp --tensor-parallel-size --tp-size --tp")
_PIPELINE_PARALLEL = option("-pp --pipeline-parallel-size --pp-size")
_BATCHED = option("--max-num-batched-tokens --chunked-prefill-size")

# Bytes for each number of the cache: a block of 32 numbers has its scale beside it.
_F16_BYTES = 2.0
_CACHE_BYTES = {
    "f32": 4.0,
    "f16": _F16_BYTES,
    "bf16": _F16_BYTES,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}


class Estimate(NamedTuple):
    """Bytes of VRAM, on all GPUs of the model together, by what they are for."""

    weights_bytes: int
    cache_bytes: int
    state_bytes: int  # of recurrent layers
    compute_bytes: int
    tokens: int | None = None  # of context that the cache is for; None: the files do not tell its size
    gpu_share: float | None = None  # of each GPU's VRAM, if the command tells the engine to take that much

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.state_bytes + self.compute_bytes

    @property
    def reason(self) -> str:
        """Return a sentence with the parts."""
        parts = [f"{format_size(self.weights_bytes)} of weights"]
        if self.cache_bytes:
            parts.append(f"{format_size(self.cache_bytes)} of KV cache for {self.tokens} tokens")
        if self.state_bytes:
            parts.append(f"{format_size(self.state_bytes)} of recurrent state")
        unknown = " Its files do not tell the size of its KV cache." if self.tokens is None else ""
        return f"{', '.join(parts)}, and {format_size(self.compute_bytes)} of compute buffers.{unknown}"

    def bytes_on_gpu(self, total_bytes: int | None, count: int) -> int:
        """Return what the model needs on one of ``count`` GPUs that has ``total_bytes`` of VRAM; None: unknown."""
        if self.gpu_share is not None and total_bytes is not None:
            return int(total_bytes * self.gpu_share)
        return -(-self.bytes // count)


def estimate(command: Sequence[str], env: Mapping[str, str]) -> Estimate | None:
    """Return what the files that ``command`` names suggest, or None if they suggest nothing.

    Args:
        command: of the engine, with absolute paths.
        env: what its configuration adds to its environment.
    """
    asked = EngineCommand(command, {**env, **_assigned(command)})
    if asked.has_any(_KEEPS_PARTS_IN_RAM):
        return None
    try:
        paths = asked.paths((_MODEL,))
        ggufs = [path for path in _with_variables(paths, asked) if not path.is_dir() and gguf.is_gguf(path)]
        if ggufs:
            found = _of_ggufs(ggufs, asked)
        else:
            found = next(filter(None, (_of_safetensors(path, asked) for path in paths)), None)
    except (OSError, ValueError):
        return None
    return found if found is not None and 0 < found.bytes < _MAX_BYTES else None


def _assigned(command: Sequence[str]) -> dict[str, str]:
    """Return the variables that a command sets itself, as in ``env LLAMA_ARG_CTX_SIZE=8192 llama-server``."""
    pairs = (argument.partition("=") for argument in command if argument.startswith("LLAMA_ARG_"))
    return {name: value for name, equals, value in pairs if equals}


def _with_variables(paths: list[Path], asked: EngineCommand) -> list[Path]:
    """Return the paths and those that only the environment names."""
    named = (asked.value(one) for one in (_PROJECTOR, _DRAFT, _DRAFT_OLD))
    return list(dict.fromkeys([*paths, *(Path(text) for text in named if text and text.startswith("/"))]))


def _of_ggufs(paths: Sequence[Path], asked: EngineCommand) -> Estimate | None:
    """Return the estimate for the model, which comes first, and for the files beside it: a projector, a draft model."""
    model = asked.value(_MODEL)
    if model and model.startswith("/") and Path(model) != paths[0]:
        return None  # the model itself is something else
    main = _of_gguf(paths[0], _main_plan(asked))
    draft, projector = asked.value(_DRAFT) or asked.value(_DRAFT_OLD), asked.value(_PROJECTOR)
    weights, cache, state = main.weights_bytes, main.cache_bytes, main.state_bytes
    for path in paths[1:]:
        if draft == str(path):
            beside = _of_gguf(path, _draft_plan(asked, main.tokens))
            weights += beside.weights_bytes
            cache += beside.cache_bytes
            state += beside.state_bytes
        elif projector != str(path) or asked.flag(_OFFLOAD_PROJECTOR) is not False:
            weights += _size_of(path)
    return main._replace(weights_bytes=weights, cache_bytes=cache, state_bytes=state)


class _Plan(NamedTuple):
    """What llama.cpp is asked to make of one GGUF file."""

    context: str  # as it is asked for
    on_gpu: int | None  # layers; None: all
    bytes_of: tuple[float, float]  # of each number of keys and of values
    slots: int
    is_unified: bool  # the slots share one cache
    whole_windows: bool
    cache_on_gpu: bool
    batch: int

    def tokens(self, longest: int) -> int:
        """Return the context; 0 asks for all that the model was trained for."""
        if self.context == "0":
            return longest
        number = parse_count(self.context)
        return min(longest, _SHORT_CONTEXT) if number is None else number

    def cells(self, tokens: int, window: int) -> int:
        """Return for how many tokens llama.cpp makes a layer's cache, all slots together."""
        streams = 1 if self.is_unified else self.slots
        each = _padded(tokens if self.is_unified else _padded(tokens) // self.slots)
        if window and not self.whole_windows:
            seen = window * (self.slots if self.is_unified else 1) + self.batch
            each = _padded(min(each, seen))
        return each * streams


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _main_plan(asked: EngineCommand) -> _Plan:
    slots = max(1, min(asked.number(_SLOTS) or 1, _MAX_SLOTS))
    return _Plan(
        context=asked.value(_CONTEXT) or "",
        on_gpu=asked.number(_LAYERS),
        bytes_of=(_number_bytes(asked, _CACHE_K), _number_bytes(asked, _CACHE_V)),
        slots=slots,
        is_unified=asked.flag(_UNIFIED) or slots == 1,
        whole_windows=asked.flag(_WHOLE_WINDOWS) or False,
        cache_on_gpu=asked.flag(_OFFLOAD_CACHE) is not False,
        batch=min(asked.number(_UBATCH) or _UBATCH_TOKENS, asked.number(_BATCH) or _BATCH_TOKENS),
    )


def _draft_plan(asked: EngineCommand, tokens: int | None) -> _Plan:
    """Return the plan for the draft model: as long a context as the model's, and one slot."""
    context = asked.value(_DRAFT_CONTEXT)
    return _main_plan(asked)._replace(
        context=context if context and context != "0" else str(tokens or ""),
        on_gpu=asked.number(_DRAFT_LAYERS),
        bytes_of=(_number_bytes(asked, _DRAFT_CACHE_K), _number_bytes(asked, _DRAFT_CACHE_V)),
        slots=1,
        is_unified=True,
    )


def _number_bytes(asked: EngineCommand, cache: Option) -> float:
    return _CACHE_BYTES.get((asked.value(cache) or "").lower(), _F16_BYTES)


def _of_gguf(file: Path, plan: _Plan) -> Estimate:
    size = _size_of(file)
    shape = _gguf_shape(file)
    if shape is None:
        share = 1.0 if plan.on_gpu is None else min(plan.on_gpu, 1)
        return Estimate(round(size * share * 1.1), 0, 0, _COMPUTE_BYTES)
    count = len(shape.layers)
    # The output counts as one layer more; the last layers are those on the GPU.
    on_gpu = count + 1 if plan.on_gpu is None else min(plan.on_gpu, count + 1)
    tokens = plan.tokens(shape.context)
    cache, state = 0.0, 0
    if plan.cache_on_gpu:
        for layer in shape.layers[count + 1 - on_gpu :]:
            keys, values = plan.bytes_of
            cache += plan.cells(tokens, layer.window) * (layer.keys * keys + layer.values * values)
            state += layer.state_bytes * plan.slots
    return Estimate(round(size * on_gpu / (count + 1)), round(cache), state, _COMPUTE_BYTES, tokens)


def _gguf_shape(file: Path) -> Shape | None:
    try:
        return architecture.shape_of(gguf.read_metadata(file))
    except PermissionError:
        return None  # the engine's user may well read it


def _size_of(file: Path) -> int:
    """Return the bytes of a file, or of all parts of a split model.

    Raises:
        OSError: a part is absent.
    """
    return sum(part.stat().st_size for part in gguf.parts_of(file))


def _of_safetensors(path: Path, asked: EngineCommand) -> Estimate | None:
    """Return the estimate for a file or a directory of safetensors; None if ``path`` is neither."""
    files = huggingface.weight_files(path)
    if not files or not all(map(huggingface.is_safetensors, files)):
        return None
    split = max(1, min(asked.number(_TENSOR_PARALLEL) or 1, _MAX_GPUS))
    gpus = min(split * max(1, asked.number(_PIPELINE_PARALLEL) or 1), _MAX_GPUS)
    weights = round(sum(file.stat().st_size for file in files) * 1.1)
    found = Estimate(weights, 0, 0, _COMPUTE_BYTES * gpus, gpu_share=_gpu_share(asked))
    shape = huggingface.shape_of(huggingface.read_config(path)) if path.is_dir() else None
    if shape is None:
        return found
    tokens = _served_tokens(asked, shape.context)
    number_bytes = 1.0 if (asked.value(_CACHE_TYPE) or "").startswith("fp8") else _F16_BYTES
    batch = asked.number(_BATCHED) or _VLLM_BATCH_TOKENS
    numbers = sum(_numbers_kept(layer, tokens, batch) * _copies(layer, split) for layer in shape.layers)
    state = sum(layer.state_bytes for layer in shape.layers)
    return found._replace(cache_bytes=round(numbers * number_bytes), state_bytes=state, tokens=tokens)


def _served_tokens(asked: EngineCommand, longest: int) -> int:
    number = asked.number(_CONTEXT)
    return min(longest, _SHORT_CONTEXT) if number is None else number or longest


def _numbers_kept(layer: Layer, tokens: int, batch: int) -> int:
    """Return how many numbers a layer keeps for one request of the longest context."""
    kept = min(tokens, layer.window + batch) if layer.window else tokens
    return kept * (layer.keys + layer.values)


def _copies(layer: Layer, split: int) -> float:
    """Return how often the cache is there in all: GPUs of tensor parallelism beyond its heads have copies."""
    return max(1.0, split / max(layer.heads, 1))


def _gpu_share(asked: EngineCommand) -> float | None:
    """Return the share of each GPU that the command lets the engine take, whatever its model needs."""
    try:
        share = float(asked.value(_SHARE) or "")
    except ValueError:
        return None
    return share if 0 < share <= 1 else None
