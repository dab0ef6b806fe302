"""The keys of LocalAI's model files (its docs, "Model Configuration") and their counterparts."""

from __future__ import annotations

_PROMPTS = "The engine uses the model's own template."
_ANSWERS = "The gateway passes responses on unchanged."
_ABOUT = "The gateway's list of models has no such field."

LOST = {
    "usage": _ABOUT,
    "known_usecases": _ABOUT,
    "known_input_modalities": _ABOUT,
    "known_output_modalities": _ABOUT,
    "feature_flags": "Only LocalAI uses it.",
    "f16": "It is the engine's default.",
    "cuda": "The engine's build decides.",
    "low_vram": "llama-server has no such option; see its --fit.",
    "mmlock": "llama-server's option changed its name: --mlock, later --load-mode. Add yours to args.",
    "main_gpu": "The engine counts the GPUs that it gets from 0; see [gpu] devices.",
    "no_mulmatq": "llama-server has no such option any more.",
    "rms_norm_eps": "The model's file contains it.",
    "ngqa": "The model's file contains it.",
    "type": "The model's file contains it.",
    "system_prompt": "gpusvc adds nothing to conversations; clients send their system prompt.",
    "template": _PROMPTS,
    "roles": _PROMPTS,
    "stopwords": "Requests name their stop words; the model's end of a turn always applies.",
    "cutstrings": _ANSWERS,
    "trimspace": _ANSWERS,
    "trimsuffix": _ANSWERS,
    "extract_regex": _ANSWERS,
    "function": "The engine parses tool calls: --jinja of llama-server, --tool-call-parser of vLLM.",
    "reasoning": "The engine does it: --reasoning-format of llama-server, --reasoning-parser of vLLM.",
    "grammar": "Requests contain their grammar; --grammar-file of llama-server applies to all requests.",
    "prompt_cache_path": "llama-server keeps prompts in memory; see its --cache-ram.",
    "prompt_cache_all": "llama-server keeps prompts in memory; see its --cache-ram.",
    "prompt_cache_ro": "llama-server keeps prompts in memory; see its --cache-ram.",
    "download_files": "An import downloads nothing; the files must exist.",
    "pipeline": "gpusvc does not chain models.",
    "mcp": "Clients run tools.",
    "agent": "Clients run agents.",
    "grpc": "gpusvc sends requests by HTTP.",
    "tts": "It belongs to a backend without a preset.",
    "diffusers": "It belongs to a backend without a preset.",
    "step": "It belongs to a backend without a preset.",
}

LOST_PARAMETERS = {
    "echo": "Requests contain it.",
    "n": "Requests contain it.",
    "logprobs": "Requests contain it.",
    "top_logprobs": "Requests contain it.",
    "logit_bias": "Requests contain it.",
    "language": "Requests contain it.",
    "translate": "Requests contain it.",
    "negative_prompt": "Requests contain it.",
    "negative_prompt_scale": "Requests contain it.",
    "tfz": "llama-server has no such option any more.",
    "tokenizer": "The model's file contains it.",
}

# Keys with a value, and the option with the same meaning.
LLAMA_VALUES = {
    "context_size": "-c",
    "threads": "-t",
    "batch": "-b",
    "cache_type_k": "-ctk",
    "cache_type_v": "-ctv",
    "rope_scaling": "--rope-scaling",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
    "yarn_ext_factor": "--yarn-ext-factor",
    "yarn_attn_factor": "--yarn-attn-factor",
    "yarn_beta_fast": "--yarn-beta-fast",
    "yarn_beta_slow": "--yarn-beta-slow",
    "n_draft": "--spec-draft-n-max",
}
LLAMA_FLAGS = {"no_kv_offloading": "--no-kv-offload", "embeddings": "--embeddings", "reranking": "--reranking"}

# Keys of the list `options` of the llama-cpp backend, and the names of llama-server's options.
LLAMA_OPTIONS = {
    "parallel": "parallel",
    "n_parallel": "parallel",
    "cache_ram": "cache-ram",
    "cache_reuse": "cache-reuse",
    "n_cache_reuse": "cache-reuse",
    "n_ubatch": "ubatch-size",
    "ubatch": "ubatch-size",
    "threads_batch": "threads-batch",
    "n_threads_batch": "threads-batch",
    "pooling": "pooling",
    "pooling_type": "pooling",
    "embd_normalize": "embd-normalize",
    "embedding_normalize": "embd-normalize",
    "verbosity": "verbosity",
    "reasoning_format": "reasoning-format",
    "reasoning_budget": "reasoning-budget",
    "enable_reasoning": "reasoning-budget",
    "image_min_tokens": "image-min-tokens",
    "image_max_tokens": "image-max-tokens",
    "override_tensor": "override-tensor",
    "tensor_buft_overrides": "override-tensor",
    "n_cpu_moe": "n-cpu-moe",
    "cpu_moe": "cpu-moe",
    "device": "device",
    "devices": "device",
    "split_mode": "split-mode",
    "sm": "split-mode",
    "grpc_servers": "rpc",
    "rpc_servers": "rpc",
    "fit_params": "fit",
    "fit": "fit",
    "fit_params_target": "fit-target",
    "fit_target": "fit-target",
    "fit_params_min_ctx": "fit-ctx",
    "fit_ctx": "fit-ctx",
    "slot_prompt_similarity": "slot-prompt-similarity",
    "sps": "slot-prompt-similarity",
    "swa_full": "swa-full",
    "kv_unified": "kv-unified",
    "unified_kv": "kv-unified",
    "cont_batching": "cont-batching",
    "continuous_batching": "cont-batching",
    "check_tensors": "check-tensors",
    "no_op_offload": "no-op-offload",
    "n_ctx_checkpoints": "ctx-checkpoints",
    "ctx_checkpoints": "ctx-checkpoints",
    "checkpoint_min_step": "checkpoint-min-step",
    "checkpoint_min_spacing": "checkpoint-min-step",
    "checkpoint_every_nt": "checkpoint-min-step",
    "checkpoint_every_n_tokens": "checkpoint-min-step",
    "cache_idle_slots": "cache-idle-slots",
    "idle_slots_cache": "cache-idle-slots",
    "mmproj_use_gpu": "mmproj-offload",
    "mmproj_offload": "mmproj-offload",
    "prefill_assistant": "prefill-assistant",
    "use_jinja": "jinja",
    "jinja": "jinja",
    "context_shift": "context-shift",
    "warmup": "warmup",
    "spec_type": "spec-type",
    "speculative_type": "spec-type",
    "spec_n_max": "spec-draft-n-max",
    "draft_max": "spec-draft-n-max",
    "spec_n_min": "spec-draft-n-min",
    "draft_min": "spec-draft-n-min",
    "spec_p_min": "spec-draft-p-min",
    "draft_p_min": "spec-draft-p-min",
    "spec_p_split": "spec-draft-p-split",
    "draft_gpu_layers": "n-gpu-layers-draft",
    **{
        f"{prefix}ngram_{key}": f"spec-ngram-simple-{option}"
        for prefix in ("", "spec_")
        for key, option in (("size_n", "size-n"), ("size_m", "size-m"), ("min_hits", "min-hits"))
    },
    **{f"spec_ngram_mod_{key}": f"spec-ngram-mod-{key.replace('_', '-')}" for key in ("n_min", "n_max", "n_match")},
    **{
        f"spec_ngram_{family}_{key}": f"spec-ngram-{family.replace('_', '-')}-{key.replace('_', '-')}"
        for family in ("map_k", "map_k4v")
        for key in ("size_n", "size_m", "min_hits")
    },
    **{
        f"{prefix}draft_{key}": option
        for prefix in ("", "spec_")
        for key, option in (
            ("cache_type_k", "spec-draft-type-k"),
            ("cache_type_v", "spec-draft-type-v"),
            ("threads", "spec-draft-threads"),
            ("threads_batch", "spec-draft-threads-batch"),
            ("cpu_moe", "spec-draft-cpu-moe"),
            ("n_cpu_moe", "spec-draft-n-cpu-moe"),
            ("override_tensor", "spec-draft-override-tensor"),
        )
    },
    **{
        f"{prefix}lookup_cache_{kind}": f"lookup-cache-{kind}"
        for prefix in ("", "spec_")
        for kind in ("static", "dynamic")
    },
}

# Values that llama-server calls otherwise.
VALUES = {"draft": "draft-simple", "eagle3": "draft-eagle3", "deepseek_legacy": "deepseek-legacy"}

# Keys of the same list for the backends vLLM and SGLang.
PARSERS = {"tool_parser": "--tool-call-parser", "reasoning_parser": "--reasoning-parser"}

VLLM_VALUES = {
    "max_model_len": "--max-model-len",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "swap_space": "--swap-space",
    "dtype": "--dtype",
    "quantization": "--quantization",
    "load_format": "--load-format",
}
VLLM_FLAGS = {
    "trust_remote_code": "--trust-remote-code",
    "enforce_eager": "--enforce-eager",
    "disable_log_stats": "--disable-log-stats",
}
