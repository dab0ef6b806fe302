"""The compute buffer of llama.cpp: what the largest layer keeps at one moment of a batch.

llama.cpp reserves its graph for the largest batch (``graph_reserve`` of src/llama-context.cpp), and ggml-alloc gives
memory that is no longer needed to later tensors. What lives at the same time follows from ``build_ffn``,
``build_moe_ffn`` and ``build_attn`` of src/llama-graph.cpp; tests/machine/test_llama_memory.py compares it with what a
real llama-server reserves. The logits count for one token of each slot only, and so hardly at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpusvc.weights.gguf import Tensor, Value
from gpusvc.weights.layers import count_of
from gpusvc.weights.offload import Placed

_FLOAT_BYTES = 4
_HALF_BYTES = 2

# Vectors as wide as the model that live beside a layer's own: its input, the residual, and copies for the GPU.
_AROUND = 4
# Vectors of a recurrent layer, as wide as its inner state, that live at one moment.
_RECURRENT = 5

_FEED_FORWARD_NAMES = ("ffn_down.weight", "ffn_down_shexp.weight")
_EXPERTS_NAME = "ffn_down_exps.weight"


class Widths(NamedTuple):
    """How many numbers one token takes in a model's layers. 0: the model has no such part."""

    model: int
    query: int  # of all heads of attention together
    heads: int  # of queries
    feed_forward: int  # of a dense layer or a shared expert
    experts: int  # of all experts that a token uses together
    experts_used: int
    inner: int  # of a recurrent layer


def widths(known: Mapping[str, Value], tensors: Sequence[Tensor]) -> Widths | None:
    """Return the widths that metadata and tensors tell; None if they do not tell those of the largest layer."""
    name = known.get("general.architecture")

    def number(key: str) -> int:
        value = known.get(f"{name}.{key}")
        listed = value if isinstance(value, list) else [value]
        return max((count for one in listed if (count := count_of(one)) is not None), default=0)

    model, heads = number("embedding_length"), number("attention.head_count")
    used, each = number("expert_used_count"), number("expert_feed_forward_length")
    dense = number("feed_forward_length") if not used or number("leading_dense_block_count") or not each else 0
    each = each or (dense if used else 0)
    downs = [tensor for tensor in tensors if tensor.shape and tensor.name.endswith(_FEED_FORWARD_NAMES)]
    experts = [tensor for tensor in tensors if tensor.shape and tensor.name.endswith(_EXPERTS_NAME)]
    if downs or experts:
        dense = max((tensor.shape[0] for tensor in downs), default=0)
        each = max((tensor.shape[0] for tensor in experts), default=0)
    inner = number("ssm.inner_size")
    if not model or not (dense or each or inner):
        return None
    size = number("attention.key_length") or (model // heads if heads else 0)
    return Widths(model, heads * size, heads, dense, used * each, used if each else 0, inner)


class Batch(NamedTuple):
    """The largest batch that llama.cpp computes at once, and the caches that its attention looks at."""

    tokens: int
    cells: tuple[int, ...]  # of each kind of cache, for one slot or for all that share it
    has_cache_in_vram: bool
    copied_cache_bytes: int  # of one layer whose cache is in RAM; 0: there is none
    has_flash_attention: bool
    slots: int


def buffer_bytes(wide: Widths, batch: Batch, state_bytes: int, placed: Placed, *, copies_weights: bool) -> int:
    """Return the compute buffer of a GPU.

    Args:
        wide: of the model.
        batch: what is computed at once.
        state_bytes: that one recurrent layer keeps for one slot.
        placed: what stays in RAM.
        copies_weights: llama.cpp copies weights from RAM to the GPU for a large batch (--op-offload).
    """
    unit = batch.tokens * _FLOAT_BYTES
    around = _AROUND * wide.model
    expert_outputs = wide.experts_used * wide.model
    # The outputs of the experts fit where their inputs were, or come on top.
    on_top = expert_outputs if expert_outputs > 2 * wide.experts else 0
    attention = unit * (2 * wide.model + 3 * wide.query)
    found = [unit * (3 * wide.feed_forward + around), attention]
    if copies_weights or placed.has_experts_in_vram:
        found.append(unit * (3 * wide.experts + around + on_top))
    if wide.inner:
        found.append(unit * (around + _RECURRENT * wide.inner) + 2 * state_bytes * batch.slots)
    if not batch.has_flash_attention:
        found.append(batch.tokens * max(batch.cells, default=0) * wide.heads * _FLOAT_BYTES + attention)
    if copies_weights and placed.experts_bytes:
        found.append(unit * (around + wide.experts + expert_outputs) + placed.experts_bytes)
    if copies_weights and placed.feed_forward_bytes:
        weights = placed.feed_forward_bytes + placed.attention_bytes
        found.append(unit * (around + 2 * wide.feed_forward) + weights)
    masks = sum(batch.cells) * batch.tokens * (_HALF_BYTES if batch.has_flash_attention else _FLOAT_BYTES)
    with_copied_cache = attention + batch.copied_cache_bytes + masks if batch.copied_cache_bytes else 0
    return max(max(found) + (masks if batch.has_cache_in_vram else 0), with_copied_cache)
