"""The options of llama-server, as far as one has to know them to write them: how many dashes, and which take no value.

From ``llama-server --help``; an option that is not here is taken to have two dashes, and a value.
"""

from __future__ import annotations

from gpusvc.importing.foreign import truth_of


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Short names of several letters have one dash all the same.
_SHORT = _words(
    """
    ag bs cb cl cmoe cmoed cms cram ctk ctkd ctv ctvd ctxcp dev devd dr dt fa fit fitc fitt hf hfd hff hfr hfrd
    hft jf kvo kvu lcd lcs lm lv lzm md mg mm mmdev mmu mu ncffn ncmoe ncmoed ngl ngld nkvo nocb no-ag no-kvu np
    nr ot otd rea sm sp sps tb tbd td to ts ub
    """
)

# Options without a value that can be denied, as --no-NAME.
_DENIABLE = _words(
    """
    agent cache-idle-slots cache-prompt cont-batching context-shift cors-credentials escape jinja kv-offload
    kv-unified log-jsonl log-prefix log-timestamps mmap mmproj-auto mmproj-offload models-autoload op-offload
    perf prefill-assistant reasoning-preserve repack skip-chat-parsing slots spec-draft-backend-sampling ui
    ui-mcp-proxy warmup webui webui-mcp-proxy
    """
)

# Options without a value that cannot.
_PLAIN = _words(
    """
    backend-sampling bs check-tensors cmoe cpu-moe embedding embeddings ignore-eos log-disable log-verbose
    lora-init-without-apply metrics mlock no-host no-kv-offload nkvo offline props rerank reranking reuse-port
    special spm-infill swa-full v verbose
    """
)


def spell(name: str, value: str) -> list[str]:
    """An option as arguments, out of its name without dashes and a value as a preset has it; nothing if it is off."""
    truth = truth_of(value)
    if name in _DENIABLE and truth is not None:
        return [f"--{name}" if truth else f"--no-{name}"]
    if name.startswith("no-") and name.removeprefix("no-") in _DENIABLE and truth is not None:
        return [f"--{name}" if truth else f"--{name.removeprefix('no-')}"]
    # A word that no value is called by: also an option that came later than this list.
    if truth is not None and (name in _PLAIN or value.strip().lower() in ("true", "false")):
        return [dashed(name)] if truth else []
    return [dashed(name), value]


def dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 or name in _SHORT else f"--{name}"
