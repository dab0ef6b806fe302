"""The layers of a model as llama.cpp lays them out, from the metadata of its GGUF file.

Sources, all of llama.cpp: ``load_arch_hparams`` of each model (src/models/*.cpp) for windows and recurrent layers,
``n_embd_k_gqa``, ``n_embd_v_gqa``, ``n_embd_r``, ``n_embd_s`` and ``has_kv`` of src/llama-hparams.cpp for the numbers,
the constructor of src/llama-kv-cache.cpp for MLA (keys only), ``create_memory`` of src/llama-model.cpp for models
without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gpusvc.weights.gguf import Value
from gpusvc.weights.layers import MAX_LAYERS, Layer, Shape, count_of, is_windowed

# Embedding and diffusion models: llama.cpp gives them no cache at all.
_WITHOUT_CACHE = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "wavtokenizer-dec",
    }
)


_WITHOUT_OUTPUT = _WITHOUT_CACHE - {"dream", "llada", "llada-moe", "rnd1"}


class _Windows(NamedTuple):
    """How an architecture places its sliding windows when its file does not say it."""

    period: int  # one layer of so many sees the whole context
    window: int = 0  # tokens, if the file does not say it; 0: then there are no windows
    dense_first: bool = False


# llama.cpp ignores the window of other architectures (Mistral, Phi 3, Qwen 2), unless a pattern stands beside it.
_WINDOWS = {
    "afmoe": _Windows(4),
    "cohere2": _Windows(4),
    "exaone-moe": _Windows(4, 128),
    "exaone4": _Windows(4, 4096),
    "gemma2": _Windows(2, 4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(6),
    "gpt-oss": _Windows(2),
    "llama4": _Windows(4, 8192),
    "mimo2": _Windows(6),
    "olmo2": _Windows(4),
    "plamo3": _Windows(8),
    "smallthinker": _Windows(4, dense_first=True),
    "step35": _Windows(4),
}

# Every layer of theirs is recurrent, and has no attention.
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})

# One layer of so many has attention, the others are recurrent.
_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}

# Every layer has attention and recurrent state side by side.
_PARALLEL = frozenset({"falcon-h1"})

_SHARED_FROM = {"gemma3n": 20}  # layers from here on use the cache of earlier ones

_FLOAT_BYTES = 4  # recurrent state is always f32


class _Header(NamedTuple):
    """Metadata as questions: each key without the architecture's name."""

    architecture: str
    known: Mapping[str, Value]

    def number(self, key: str) -> int | None:
        return count_of(self.known.get(f"{self.architecture}.{key}"))

    def each(self, key: str, layers: int) -> list[int] | None:
        """Return a number for every layer, 0 where the file has none; None if the key is absent."""
        value = self.known.get(f"{self.architecture}.{key}")
        if value is None:
            return None
        listed = value if isinstance(value, list) else [value] * layers
        return [count_of(int(one) if isinstance(one, bool) else one) or 0 for one in listed][:layers]


def shape_of(known: Mapping[str, Value]) -> Shape | None:
    """Return the shape that GGUF metadata describes; None if it does not tell."""
    name = known.get("general.architecture")
    if not isinstance(name, str):
        return None
    header = _Header(name, known)
    layers, context = header.number("block_count"), header.number("context_length")
    if layers is None or context is None or layers > MAX_LAYERS:
        return None
    if name in _WITHOUT_CACHE:
        return Shape((Layer(),) * layers, context)
    heads = _kv_heads(header, layers)
    sizes = _head_sizes(header, heads)
    if heads is None or sizes is None:
        return None
    windows = _windows(header, layers)
    recurrent = _recurrent_layers(header, heads)
    state = _state_bytes(header)
    with_cache = _layers_with_cache(header, layers)
    found = []
    for index in range(layers):
        is_recurrent = recurrent[index]
        layer = Layer(state_bytes=state if is_recurrent or name in _PARALLEL else 0)
        if index < with_cache and not is_recurrent:
            key, value = sizes.windowed if windows[index] else sizes.full
            layer = layer._replace(
                keys=heads[index] * key, values=heads[index] * value, window=windows[index], heads=heads[index]
            )
        found.append(layer)
    return Shape(tuple(found), context)


def loaded_layers(known: Mapping[str, Value], shape: Shape) -> int:
    """Return how many layers llama.cpp loads: those that predict ahead stay in the file."""
    ahead = count_of(known.get(f"{known.get('general.architecture')}.nextn_predict_layers")) or 0
    return max(1, len(shape.layers) - ahead)


def has_output(known: Mapping[str, Value]) -> bool:
    """Return whether a model predicts tokens, and so has an output."""
    return known.get("general.architecture") not in _WITHOUT_OUTPUT


def _kv_heads(header: _Header, layers: int) -> list[int] | None:
    """Return the heads of the cache for every layer, 0 where a layer has no attention."""
    if header.architecture in _RECURRENT:
        return [0] * layers
    heads = header.each("attention.head_count_kv", layers) or header.each("attention.head_count", layers)
    return None if heads is None or len(heads) < layers else heads


class _Sizes(NamedTuple):
    """Numbers that one head keeps for a token, as key and value, in layers without and with a window."""

    full: tuple[int, int]
    windowed: tuple[int, int]


def _head_sizes(header: _Header, heads: list[int] | None) -> _Sizes | None:
    if heads is not None and not any(heads):
        return _Sizes((0, 0), (0, 0))
    width = header.number("embedding_length")
    query_heads = max(header.each("attention.head_count", len(heads or ())) or [0])
    one = width // query_heads if width and query_heads else None
    key, value = header.number("attention.key_length") or one, header.number("attention.value_length") or one
    if key is None or value is None:
        return None
    if header.number("attention.key_length_mla") is not None:
        value = 0  # what MLA keeps as a key holds the value too
    windowed_key = header.number("attention.key_length_swa") or key
    windowed_value = header.number("attention.value_length_swa") or value
    return _Sizes((key, value), (windowed_key, windowed_value))


def _windows(header: _Header, layers: int) -> list[int]:
    """Return the sliding window of every layer in tokens, 0 where a layer sees the whole context."""
    rule = _WINDOWS.get(header.architecture)
    stated = header.known.get(f"{header.architecture}.attention.sliding_window")
    window = count_of(stated) or 0
    if stated is None and rule is not None and not (header.architecture == "exaone4" and layers != 64):
        window = rule.window
    pattern = header.known.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        flags = [bool(one) for one in pattern[:layers]]
        return [window if flag else 0 for flag in flags] + [0] * (layers - len(flags))
    period = count_of(pattern) or (rule.period if rule is not None else None)
    if not window or period is None:
        return [0] * layers
    dense_first = rule is not None and rule.dense_first
    return [window if is_windowed(index, period, dense_first=dense_first) else 0 for index in range(layers)]


def _recurrent_layers(header: _Header, heads: list[int]) -> list[bool]:
    layers = len(heads)
    if header.architecture in _RECURRENT:
        return [True] * layers
    interval = header.number("full_attention_interval") or _INTERVALS.get(header.architecture)
    if interval is not None and all(heads):
        attention = layers - (header.number("nextn_predict_layers") or 0)
        return [(index + 1) % interval != 0 and index < attention for index in range(layers)]
    if all(heads) or not _state_bytes(header):
        return [False] * layers
    # Nemotron-H has layers that are a feed-forward network and nothing else.
    feeding = header.each("feed_forward_length", layers) if header.architecture.startswith("nemotron_h") else None
    plain = feeding if feeding is not None and len(feeding) == layers else [0] * layers
    return [not head and not feed for head, feed in zip(heads, plain, strict=True)]


def _state_bytes(header: _Header) -> int:
    """Return what a recurrent layer keeps for one sequence; 0 if the file tells of no such layer."""
    width = header.number("embedding_length") or 0
    if (head_size := header.number("wkv.head_size")) is not None:
        shifts = header.number("token_shift_count") or 2
        return (shifts * width + width * head_size) * _FLOAT_BYTES
    if (cached := header.number("shortconv.l_cache")) is not None:
        return width * (cached - 1) * _FLOAT_BYTES
    kernel = header.number("ssm.conv_kernel") or 0
    if (head_size := header.number("kda.head_dim")) is not None:
        all_heads = max(header.each("attention.head_count", 1) or [0])
        return (3 * max(kernel - 1, 0) + head_size) * all_heads * head_size * _FLOAT_BYTES
    inner, state = header.number("ssm.inner_size") or 0, header.number("ssm.state_size") or 0
    # Mamba 1 states a group as well in some files, and keeps none.
    groups = 0 if header.architecture in ("mamba", "jamba") else header.number("ssm.group_count") or 0
    return (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner) * _FLOAT_BYTES


def _layers_with_cache(header: _Header, layers: int) -> int:
    """Return how many layers, from the first, have a cache of their own. Layers that predict ahead are not loaded."""
    own = layers - (header.number("nextn_predict_layers") or 0)
    shared = header.number("attention.shared_kv_layers")
    return max(0, min(own, layers - shared if shared is not None else _SHARED_FROM.get(header.architecture, layers)))
