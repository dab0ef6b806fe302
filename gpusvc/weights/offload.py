"""Which tensors of a GGUF file llama.cpp keeps in VRAM, and which in RAM.

Sources, all of llama.cpp: ``get_layer_buft_list`` of src/llama-model.cpp (the last layers are those on the GPU),
``LLM_TENSOR_INFOS`` of src/llama-arch.cpp (the tensors of the input stay in RAM), ``create_tensor`` of
src/llama-model-loader.cpp (the first override whose pattern is found in a name decides), common/arg.cpp and
common/common.h (what --cpu-moe, --n-cpu-moe and --n-cpu-ffn add to the overrides).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpusvc.weights.command import EngineCommand, option, parse_count
from gpusvc.weights.gguf import Tensor

_OVERRIDES = option("-ot --override-tensor", "LLAMA_ARG_OVERRIDE_TENSOR")
_ALL_EXPERTS = option("-cmoe --cpu-moe", "LLAMA_ARG_CPU_MOE")
_FIRST_EXPERTS = option("-ncmoe --n-cpu-moe", "LLAMA_ARG_N_CPU_MOE")
_FIRST_FEED_FORWARDS = option("-ncffn --n-cpu-ffn", "LLAMA_ARG_N_CPU_FFN")

_EXPERTS = r"\.ffn_(?:up|down|gate|gate_up)_(?:ch|)exps"
_FEED_FORWARD = r"\.ffn_(?:up|down|gate|gate_up)\."

_EXPERTS_NAME = "exps"
_LAYER = re.compile(r"blk\.([0-9]{1,6})\.")
_INPUT = re.compile(r"(?:token_embd|token_embd_norm|position_embd|token_types|per_layer_token_embd)\.")
_OUTPUT_NAME = "output.weight"
_INPUT_NAME = "token_embd.weight"

# A pattern that would take Python's re long on a tensor's name, which llama.cpp bounds as well.
_MAX_NAME = 64
_MAX_PATTERN = 500
_MAX_OVERRIDES = 1000
_MAX_REPEATS = 4
_LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")
_REPEAT = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class Override(NamedTuple):
    """Tensors whose names the pattern is found in, and whether they stay in RAM."""

    pattern: re.Pattern[str]
    is_ram: bool


class Placed(NamedTuple):
    """The bytes of tensors in VRAM, and the largest tensors of layers that stay in RAM, by what they are."""

    vram_bytes: int
    has_experts_in_vram: bool
    experts_bytes: int
    feed_forward_bytes: int
    attention_bytes: int


def overrides(asked: EngineCommand) -> list[Override]:
    """Return the overrides of a command in their order; the first that fits counts.

    Raises:
        ValueError: llama.cpp would refuse one, or it is too complex to be tried.
    """
    found: list[Override] = []
    for given, value in asked.occurrences((_OVERRIDES, _ALL_EXPERTS, _FIRST_EXPERTS, _FIRST_FEED_FORWARDS)):
        if given is _OVERRIDES:
            found += [_override(one) for one in (value or "").split(",")]
        elif given is _ALL_EXPERTS:
            found.append(Override(re.compile(_EXPERTS), is_ram=True))
        else:
            layers = parse_count(value)
            if layers is None:
                raise ValueError(f"{value} is not a number of layers.")
            if layers:
                tail = _EXPERTS if given is _FIRST_EXPERTS else _FEED_FORWARD
                found.append(Override(_of_first(layers, tail), is_ram=True))
        if len(found) > _MAX_OVERRIDES:
            raise ValueError("There are too many overrides.")
    return found


def _of_first(layers: int, tail: str) -> re.Pattern[str]:
    """Return the pattern of a part of the first layers."""
    if layers > 10_000:
        return re.compile(rf"blk\.[0-9]+{tail}")
    return re.compile(rf"blk\.(?:{'|'.join(str(number) for number in range(layers))}){tail}")


def _override(text: str) -> Override:
    """Return one ``PATTERN=BUFFER`` of --override-tensor."""
    pattern, equals, buffer = text.partition("=")
    literal = _LITERALS.sub("x", pattern)
    if not equals or len(pattern) > _MAX_PATTERN:
        raise ValueError("This is not an override of tensors.")
    if _REPEATED_GROUP.search(literal) or len(_REPEAT.findall(literal)) > _MAX_REPEATS:
        raise ValueError("The pattern is too complex.")
    try:
        return Override(re.compile(pattern, re.ASCII), is_ram=buffer == "CPU")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"The pattern is not valid: {error}.") from None


def place(
    tensors: Sequence[Tensor], layers: int, on_gpu: int, overridden: Sequence[Override], *, has_output: bool
) -> Placed:
    """Return where the tensors go.

    Args:
        tensors: of all parts of the model.
        layers: that llama.cpp loads; later ones predict ahead and are not loaded.
        on_gpu: number of layers on the GPU; the output counts as one more, and goes there first.
        overridden: what the command says of single tensors.
        has_output: a model without an output tensor uses its input tensor as one, and loads it twice.
    """
    first = layers + 1 - on_gpu
    vram = 0
    has_experts_in_vram = False
    in_ram: list[Tensor] = []
    for tensor in tensors:
        layer = _LAYER.match(tensor.name)
        number = int(layer.group(1)) if layer is not None else None
        if number is not None and number >= layers:
            continue
        if _is_in_vram(tensor.name, number, first, layers, overridden):
            vram += tensor.bytes
            has_experts_in_vram = has_experts_in_vram or _EXPERTS_NAME in tensor.name
        elif number is not None:
            in_ram.append(tensor)
    if has_output and on_gpu and not any(tensor.name == _OUTPUT_NAME for tensor in tensors):
        vram += sum(tensor.bytes for tensor in tensors if tensor.name == _INPUT_NAME)
    return Placed(
        vram,
        has_experts_in_vram,
        experts_bytes=_largest(tensor for tensor in in_ram if _EXPERTS_NAME in tensor.name),
        feed_forward_bytes=_largest(
            tensor for tensor in in_ram if "ffn_" in tensor.name and _EXPERTS_NAME not in tensor.name
        ),
        attention_bytes=_largest(tensor for tensor in in_ram if "ffn_" not in tensor.name),
    )


def _is_in_vram(name: str, layer: int | None, first: int, layers: int, overridden: Sequence[Override]) -> bool:
    if len(name) <= _MAX_NAME:
        for override in overridden:
            if override.pattern.search(name):
                return not override.is_ram
    if layer is not None:
        return layer >= first
    return _INPUT.match(name) is None and layers >= first


def _largest(tensors: Iterable[Tensor]) -> int:
    return max((tensor.bytes for tensor in tensors), default=0)
