"""A model as it is downloaded from Hugging Face: a directory of safetensors beside a ``config.json``.

The layers are those of vLLM and SGLang: ``KVCacheSpec`` and its kinds in vllm/v1/kv_cache_interface.py, for linear
attention and Mamba ``MambaStateShapeCalculator`` in vllm/model_executor/layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from gpusvc.quantity import MIB
from gpusvc.weights import gguf
from gpusvc.weights.layers import MAX_LAYERS, Layer, Shape, count_of, is_windowed

_CONFIG_BYTES = 1 * MIB

# One layer of so many sees the whole context, where the configuration names a window and no more.
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}

_ATTENTION = ("full_attention", "attention", "hybrid", "global")
_WINDOWED = ("sliding_attention", "chunked_attention")
_RECURRENT = ("linear_attention", "mamba", "mamba2")


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights that a directory, or a single file, holds: none, or all that an engine loads."""
    if not path.is_dir():
        return [path] if path.suffix == ".safetensors" else []
    files = list(path.glob("*.safetensors"))
    # Some directories have the same weights a second time, in one piece.
    return [file for file in files if file.name.startswith("model")] or files


def is_safetensors(file: Path) -> bool:
    """Return whether a file begins as safetensors do: eight bytes of length, then a JSON object.

    Raises:
        OSError: it is absent.
    """
    try:
        head = gguf.read_head(file, 9)
    except PermissionError:
        return True  # the engine's user may well read it
    except ValueError:
        return False
    return len(head) == 9 and head[8:] == b"{" and struct.unpack_from("<Q", head)[0] <= file.stat().st_size - 8


def read_config(directory: Path) -> Mapping[str, object]:
    """Return what ``config.json`` says; empty if there is none, or it makes no sense."""
    try:
        config = json.loads(gguf.read_head(directory / "config.json", _CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part on the language model, of a model that may also see or hear."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def shape_of(config: Mapping[str, object]) -> Shape | None:
    """Return the shape that a configuration describes; None if it does not tell."""
    config = text_config(config)
    layers, context = count_of(config.get("num_hidden_layers")), count_of(config.get("max_position_embeddings"))
    if layers is None or context is None or layers > MAX_LAYERS:
        return None
    attention = _attention(config)
    if attention is None:
        return None
    window = _window(config)
    state = _state_bytes(config)
    own = layers - (count_of(config.get("num_kv_shared_layers")) or 0)
    found = []
    for index, kind in enumerate(_kinds(config, layers)):
        if index >= own:
            found.append(Layer())
        elif kind in _WINDOWED:
            found.append(attention._replace(window=window))
        elif kind in _ATTENTION:
            found.append(_global(config, attention))
        else:
            found.append(Layer(state_bytes=state if kind in _RECURRENT else 0))
    return Shape(tuple(found), context)


def _attention(config: Mapping[str, object]) -> Layer | None:
    """Return what a layer with attention keeps."""
    latent, rope = count_of(config.get("kv_lora_rank")), count_of(config.get("qk_rope_head_dim"))
    if latent is not None and rope is not None:
        return Layer(keys=latent + rope)  # MLA: one vector for keys and values, whole on every GPU
    width, heads = count_of(config.get("hidden_size")), count_of(config.get("num_attention_heads"))
    cached = count_of(config.get("num_key_value_heads")) or heads
    key = count_of(config.get("head_dim")) or (width // heads if width is not None and heads is not None else None)
    if cached is None or key is None:
        return None
    value = count_of(config.get("v_head_dim")) or key
    return Layer(keys=cached * key, values=cached * value, heads=cached)


def _global(config: Mapping[str, object], attention: Layer) -> Layer:
    """Return what a layer that sees the whole context keeps; Gemma 4 has other heads there."""
    size = count_of(config.get("global_head_dim"))
    if size is None or not attention.heads:
        return attention
    heads = count_of(config.get("num_global_key_value_heads")) or attention.heads
    return Layer(keys=heads * size, values=heads * size, heads=heads)


def _window(config: Mapping[str, object]) -> int:
    if config.get("use_sliding_window") is False:
        return 0
    return count_of(config.get("sliding_window")) or count_of(config.get("attention_chunk_size")) or 0


def _kinds(config: Mapping[str, object], layers: int) -> list[str]:
    """Return for every layer the kind that ``layer_types`` calls it by, however the configuration says it."""
    for key in ("layer_types", "layers_block_type"):
        listed = config.get(key)
        if isinstance(listed, list) and len(listed) >= layers:
            return [one if isinstance(one, str) else "" for one in listed[:layers]]
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) >= layers:  # of Nemotron-H: M is Mamba, * attention, - neither
        return [{"*": "attention", "M": "mamba"}.get(letter, "mlp") for letter in pattern[:layers]]
    interval = count_of(config.get("full_attention_interval"))
    if interval is not None:
        return ["linear_attention" if is_windowed(index, interval) else "full_attention" for index in range(layers)]
    every = count_of(config.get("attn_layer_period"))
    if every is not None:  # of Jamba
        offset = config.get("attn_layer_offset")
        first = offset % every if type(offset) is int else 0
        return ["attention" if index % every == first else "mamba" for index in range(layers)]
    if not _window(config):
        return ["full_attention"] * layers
    name = config.get("model_type")
    period = count_of(config.get("sliding_window_pattern")) or _PERIODS.get(name if isinstance(name, str) else "")
    if period is None:
        return ["sliding_attention" if count_of(config.get("sliding_window")) else "full_attention"] * layers
    return ["sliding_attention" if is_windowed(index, period) else "full_attention" for index in range(layers)]


def _state_bytes(config: Mapping[str, object]) -> int:
    """Return what a recurrent layer keeps for one sequence: its convolution as f16, its state as f32."""

    def number(key: str) -> int:
        return count_of(config.get(key)) or 0

    keys = number("linear_num_key_heads") * number("linear_key_head_dim")
    values = number("linear_num_value_heads") * number("linear_value_head_dim")
    if values:
        kernel = number("linear_conv_kernel_dim")
        return max(kernel - 1, 0) * (2 * keys + values) * 2 + values * number("linear_key_head_dim") * 4
    inner = number("mamba_n_heads") * number("mamba_d_head") or number("mamba_num_heads") * number("mamba_head_dim")
    inner = inner or number("mamba_expand") * number("hidden_size")
    state = number("mamba_d_state") or number("ssm_state_size")
    groups = number("mamba_n_groups") or number("n_groups")
    kernel = number("mamba_d_conv") or number("conv_kernel")
    return max(kernel - 1, 0) * (inner + 2 * groups * state) * 2 + inner * state * 4
