"""What llama.cpp allocates for a GGUF file.

Sizes follow src/llama-context.cpp (``n_ctx_seq``: padded to 256, divided by the slots unless the cache is unified),
src/llama-kv-cache-iswa.cpp (layers with a window: window times slots plus a batch, padded to 256),
src/llama-kv-cache.cpp and src/llama-memory-recurrent.cpp (one row for each slot), and tools/server/server.cpp (four
slots that share the cache, unless the command names a number). ``offload`` and ``compute`` name theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpusvc.weights import architecture, compute, gguf, offload
from gpusvc.weights.command import EngineCommand, Option, option, parse_count
from gpusvc.weights.layers import Layer, Shape
from gpusvc.weights.parts import USUAL_COMPUTE_BYTES, Estimate

SHORT_CONTEXT = 4096
F16_BYTES = 2.0

_SERVER = "llama-server"
_SERVER_SLOTS = 4
_MAX_SLOTS = 256  # llama.h, LLAMA_MAX_SEQ
_CELLS = 256  # llama.cpp makes its caches in steps of so many tokens
_BATCH_TOKENS = 2048  # llama.cpp's --batch-size
_UBATCH_TOKENS = 512  # llama.cpp's --ubatch-size

MODEL = option("-m --model --model-path", "LLAMA_ARG_MODEL")
CONTEXT = option("-c --ctx-size --max-model-len --context-length", "LLAMA_ARG_CTX_SIZE")
_SLOT_CONTEXT = option("--kv-unified-per-slot", "LLAMA_ARG_KV_UNIFIED_PER_SLOT")
_LAYERS = option("-ngl --gpu-layers --n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")
_CACHE_K = option("-ctk --cache-type-k", "LLAMA_ARG_CACHE_TYPE_K")
_CACHE_V = option("-ctv --cache-type-v", "LLAMA_ARG_CACHE_TYPE_V")
_SLOTS = option("-np --parallel", "LLAMA_ARG_N_PARALLEL")
_BATCH = option("-b --batch-size", "LLAMA_ARG_BATCH")
_UBATCH = option("-ub --ubatch-size", "LLAMA_ARG_UBATCH")
_FLASH_ATTENTION = option("-fa --flash-attn", "LLAMA_ARG_FLASH_ATTN")
_UNIFIED = option("-kvu --kv-unified", "LLAMA_ARG_KV_UNIFIED", negations="-no-kvu --no-kv-unified")
_WHOLE_WINDOWS = option("--swa-full", "LLAMA_ARG_SWA_FULL")
_OFFLOAD_CACHE = option("-kvo --kv-offload", "LLAMA_ARG_KV_OFFLOAD", negations="-nkvo --no-kv-offload")
_COPY_WEIGHTS = option("--op-offload", negations="--no-op-offload")

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

# Bytes for each number of the cache: a block of 32 numbers has its scale beside it.
_CACHE_BYTES = {
    "f32": 4.0,
    "f16": F16_BYTES,
    "bf16": F16_BYTES,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}


def paths_beside(paths: list[Path], asked: EngineCommand) -> list[Path]:
    """Return the paths and those that only the environment names."""
    named = (asked.value(one) for one in (_PROJECTOR, _DRAFT, _DRAFT_OLD))
    return list(dict.fromkeys([*paths, *(Path(text) for text in named if text and text.startswith("/"))]))


def of_ggufs(paths: Sequence[Path], asked: EngineCommand) -> Estimate | None:
    """Return the estimate for the model, which comes first, and for the files beside it: a projector, a draft model.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file or an option makes no sense.
    """
    model = asked.value(MODEL)
    if model and model.startswith("/") and Path(model) != paths[0]:
        return None  # the model itself is something else
    found = _of_gguf(paths[0], _main_plan(asked))
    tokens = found.tokens
    draft, projector = asked.value(_DRAFT) or asked.value(_DRAFT_OLD), asked.value(_PROJECTOR)
    for path in paths[1:]:
        if draft == str(path):
            beside = _of_gguf(path, _draft_plan(asked, tokens))
            found = found._replace(
                cache_bytes=found.cache_bytes + beside.cache_bytes,
                state_bytes=found.state_bytes + beside.state_bytes,
                weights_bytes=found.weights_bytes + beside.weights_bytes,
                compute_bytes=found.compute_bytes + beside.compute_bytes,
            )
        elif projector != str(path) or asked.flag(_OFFLOAD_PROJECTOR) is not False:
            found = found._replace(weights_bytes=found.weights_bytes + _size_of(path))
    return found


class _Plan(NamedTuple):
    """What llama.cpp is asked to make of one GGUF file."""

    context: str  # as it is asked for
    on_gpu: int | None  # layers; None: all
    overrides: Sequence[offload.Override]
    bytes_of: tuple[float, float]  # of each number of keys and of values
    slots: int
    is_unified: bool  # the slots share one cache
    whole_windows: bool
    cache_on_gpu: bool
    batch: int
    has_flash_attention: bool
    copies_weights: bool

    def tokens(self, longest: int) -> int:
        """Return the context; 0 asks for all that the model was trained for."""
        if self.context == "0":
            return longest
        number = parse_count(self.context)
        return min(longest, SHORT_CONTEXT) if number is None else number

    def cache_bytes(self, tokens: int, layer: Layer) -> float:
        """Return the size of a layer's cache, of all slots together."""
        keys, values = self.bytes_of
        cells = self.stream_cells(tokens, layer.window) * (1 if self.is_unified else self.slots)
        return cells * (layer.keys * keys + layer.values * values)

    def stream_cells(self, tokens: int, window: int) -> int:
        """Return for how many tokens a layer's cache is that the slots share, or one slot's own."""
        each = _padded(tokens if self.is_unified else _padded(tokens) // self.slots)
        if window and not self.whole_windows:
            seen = window * (self.slots if self.is_unified else 1) + self.batch
            each = _padded(min(each, seen))
        return each


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _main_plan(asked: EngineCommand) -> _Plan:
    named = asked.number(_SLOTS)
    slots = max(1, min(named or (_SERVER_SLOTS if asked.runs(_SERVER) else 1), _MAX_SLOTS))
    context, each = asked.value(CONTEXT) or "", asked.number(_SLOT_CONTEXT)
    return _Plan(
        context=context if context or not each else str(each * slots),
        on_gpu=asked.number(_LAYERS),
        overrides=offload.overrides(asked),
        bytes_of=(_number_bytes(asked, _CACHE_K), _number_bytes(asked, _CACHE_V)),
        slots=slots,
        is_unified=not named or asked.flag(_UNIFIED) or slots == 1,
        whole_windows=asked.flag(_WHOLE_WINDOWS) or False,
        cache_on_gpu=asked.flag(_OFFLOAD_CACHE) is not False,
        batch=min(asked.number(_UBATCH) or _UBATCH_TOKENS, asked.number(_BATCH) or _BATCH_TOKENS),
        has_flash_attention=(asked.value(_FLASH_ATTENTION) or "").lower() not in ("off", "disabled", "false", "0"),
        copies_weights=asked.flag(_COPY_WEIGHTS) is not False,
    )


def _draft_plan(asked: EngineCommand, tokens: int | None) -> _Plan:
    """Return the plan for the draft model: as many slots as the model has, and as long a context."""
    context = asked.value(_DRAFT_CONTEXT)
    return _main_plan(asked)._replace(
        context=context if context and context != "0" else str(tokens or ""),
        on_gpu=asked.number(_DRAFT_LAYERS),
        overrides=(),
        bytes_of=(_number_bytes(asked, _DRAFT_CACHE_K), _number_bytes(asked, _DRAFT_CACHE_V)),
    )


def _number_bytes(asked: EngineCommand, cache: Option) -> float:
    return _CACHE_BYTES.get((asked.value(cache) or "").lower(), F16_BYTES)


def _of_gguf(file: Path, plan: _Plan) -> Estimate:
    size = _size_of(file)
    header = _header_of(file)
    shape = architecture.shape_of(header.metadata)
    if shape is None:
        if plan.overrides:
            raise ValueError("The file does not tell its layers.")
        share = 1.0 if plan.on_gpu is None else min(plan.on_gpu, 1)
        return Estimate(round(size * share * 1.1), 0, 0, USUAL_COMPUTE_BYTES)
    count = architecture.loaded_layers(header.metadata, shape)
    # The output counts as one layer more; the last layers are those on the GPU.
    on_gpu = count + 1 if plan.on_gpu is None else min(plan.on_gpu, count + 1)
    tokens = plan.tokens(shape.context)
    cache, state = 0.0, 0
    if plan.cache_on_gpu:
        for layer in shape.layers[count + 1 - on_gpu :]:
            cache += plan.cache_bytes(tokens, layer)
            state += layer.state_bytes * plan.slots
    placed = _placed(header, count, on_gpu, plan)
    if placed is None:
        if plan.overrides:
            raise ValueError("The file does not list its tensors.")
        share = round(size * on_gpu / (count + 1))
        placed = offload.Placed(
            share, has_experts_in_vram=True, experts_bytes=0, feed_forward_bytes=0, attention_bytes=0
        )
    in_ram = shape.layers[: count + 1 - on_gpu] if plan.cache_on_gpu else shape.layers
    compute_bytes = _compute_bytes(header, shape, plan, placed, in_ram)
    return Estimate(placed.vram_bytes, round(cache), state, compute_bytes, tokens)


def _placed(header: gguf.Header, count: int, on_gpu: int, plan: _Plan) -> offload.Placed | None:
    """Return where the tensors go; None if the file does not list them."""
    if not header.tensors:
        return None
    has_output = architecture.has_output(header.metadata)
    return offload.place(header.tensors, count, on_gpu, plan.overrides, has_output=has_output)


def _compute_bytes(
    header: gguf.Header, shape: Shape, plan: _Plan, placed: offload.Placed, in_ram: Sequence[Layer]
) -> int:
    """Return the size of the compute buffer. ``in_ram``: layers whose cache stays in RAM."""
    wide = compute.widths(header.metadata, header.tensors)
    if wide is None:
        return USUAL_COMPUTE_BYTES
    tokens = plan.tokens(shape.context)
    windows = {layer.window for layer in shape.layers if layer.keys}
    batch = compute.Batch(
        tokens=min(plan.batch, tokens),
        cells=tuple(plan.stream_cells(tokens, window) for window in windows),
        has_cache_in_vram=plan.cache_on_gpu,
        copied_cache_bytes=max((round(plan.cache_bytes(tokens, layer)) for layer in in_ram), default=0),
        has_flash_attention=plan.has_flash_attention,
        slots=plan.slots,
    )
    state = max((layer.state_bytes for layer in shape.layers), default=0)
    return compute.buffer_bytes(wide, batch, state, placed, copies_weights=plan.copies_weights)


def _header_of(file: Path) -> gguf.Header:
    """Return the header of a model, with the tensors of all its parts.

    Raises:
        ValueError: it is not a GGUF file.
        OSError: a part cannot be read.
    """
    first, *others = gguf.parts_of(file)
    try:
        metadata, tensors = gguf.read_header(file)
        if first != file:
            return gguf.Header(metadata, ())
        for other in others:
            more = gguf.read_header(other).tensors
            tensors = tensors + more if more and tensors else ()
    except PermissionError:
        return gguf.Header({}, ())  # the engine's user may well read it
    return gguf.Header(metadata, tensors)


def _size_of(file: Path) -> int:
    """Return the bytes of a file, or of all parts of a split model.

    Raises:
        OSError: a part is absent.
    """
    return sum(part.stat().st_size for part in gguf.parts_of(file))
