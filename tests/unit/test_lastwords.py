"""Whether an engine's last words are a cry for memory."""

from __future__ import annotations

import pytest

from gpusvc.journal.lastwords import telling, tells_of_memory


@pytest.mark.parametrize(
    "line",
    [
        "CUDA error: out of memory",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8192.00 MiB: cudaMalloc failed: out of memory",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB",
        "torch.cuda.OutOfMemoryError: HIP out of memory.",
        "RuntimeError: cudaErrorMemoryAllocation: hipErrorOutOfMemory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: Free memory on device (3.1/23.6 GiB) on startup is less than desired GPU memory utilization (0.9)",
    ],
)
def test_these_are_cries_for_memory(line: str) -> None:
    assert tells_of_memory(["loading", line, "Aborted"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["error: unknown argument: --ctx"],
        ["failed to open the model: No such file or directory"],
        ["memory: 24 GiB"],
    ],
)
def test_these_are_not(words: list[str]) -> None:
    assert not tells_of_memory(words)


LLAMA = """\
0.00.001.012 I srv  llama_server: initializing ...
0.00.062.350 W srv  llama_server: security: no API key is set and CORS allows all origins (see https://github.com/x)
0.00.062.810 I srv    load_model: loading model '/tmp/cut.gguf'
{reason}
0.00.063.165 E llama_model_load_from_file_impl: failed to load model
0.00.063.209 E common_fit_params: encountered an error while trying to fit params to free memory: failed to load model
0.00.063.294 E cmn  common_init_: failed to load model '/tmp/cut.gguf'
0.00.063.295 E srv    load_model: failed to load model, '/tmp/cut.gguf'
0.00.063.297 I srv    operator(): operator(): cleaning up before exit...
0.00.063.687 E srv  llama_server: exiting due to model loading error"""

VLLM = """\
(EngineCore_DP0 pid=1185) INFO 09-12 10:21:07 [gpu_model_runner.py:2338] Starting to load model Qwen/Qwen3-8B...
(EngineCore_DP0 pid=1185) ERROR 09-12 10:21:47 [core.py:718] EngineCore failed to start.
(EngineCore_DP0 pid=1185) ERROR 09-12 10:21:47 [core.py:718] Traceback (most recent call last):
(EngineCore_DP0 pid=1185) ERROR 09-12 10:21:47 [core.py:718]   File "/opt/vllm/v1/engine/core.py", line 709, in run
(EngineCore_DP0 pid=1185) ERROR 09-12 10:21:47 [core.py:718]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore_DP0 pid=1185) ERROR 09-12 10:21:47 [core.py:718] {reason}
(EngineCore_DP0 pid=1185) Process EngineCore_DP0:
(EngineCore_DP0 pid=1185) Traceback (most recent call last):
(EngineCore_DP0 pid=1185)   File "/usr/lib/python3.12/multiprocessing/process.py", line 314, in _bootstrap
(EngineCore_DP0 pid=1185)     self.run()
(EngineCore_DP0 pid=1185) {reason}
(APIServer pid=1179) Traceback (most recent call last):
(APIServer pid=1179)   File "/opt/vllm/v1/engine/utils.py", line 759, in wait_for_engine_startup
(APIServer pid=1179)     raise RuntimeError("Engine core initialization failed. "
(APIServer pid=1179) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
/usr/lib/python3.12/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: 1 leaked object
  warnings.warn("""

SGLANG = """\
[2026-04-20 09:11:02] Load weight begin. avail mem=22.86 GB
[2026-04-20 09:11:09] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/srt/managers/scheduler.py", line 2571, in run_scheduler_process
    scheduler = Scheduler(
  File "/opt/sglang/srt/model_executor/model_runner.py", line 1386, in init_memory_pool
    raise RuntimeError(
{reason}

[2026-04-20 09:11:09] Received sigquit from a child process. It usually means the child failed."""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (LLAMA, "0.00.063.119 E llama_model_load: error loading model: tensor 'x' data is not within the file bounds"),
        (LLAMA, "0.00.048.426 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'"),
        (LLAMA, "0.00.028.546 E gguf_init_from_file: failed to open GGUF file '/no.gguf' (No such file or directory)"),
        (LLAMA, "llama_model_load: error loading model: unable to allocate CUDA0 buffer"),
        (VLLM, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 23 GiB"),
        (
            VLLM,
            "ValueError: Free memory on device (3.1/23.6 GiB) on startup is less than desired GPU memory utilization",
        ),
        (VLLM, "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error."),
        (
            VLLM,
            "ValueError: The checkpoint you are trying to load has model type `new` but Transformers does not know it",
        ),
        (SGLANG, "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
        (SGLANG, "KeyError: 'model.layers.0.self_attn.qkv_proj.weight_scale'"),
    ],
)
def test_of_many_last_lines_the_one_with_the_reason_is_told(output: str, reason: str) -> None:
    assert telling(output.format(reason=reason).splitlines()).endswith(reason)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            "Traceback (most recent call last):\n  File \"x.py\", line 1\nModuleNotFoundError: No module named 'vllm'",
            -1,
        ),
        ("usage: vllm [-h]\nvllm: error: unrecognized arguments: --foo", -1),
        (
            'error while handling argument "-c": stoi\n\nusage:\n-c, --ctx-size N\n\nto show all, run with -h',
            0,
        ),
        ("error: invalid argument: --foo", 0),
        ("python3: error while loading shared libraries: libcudart.so.12: cannot open shared object file", 0),
        ("thread 'main' panicked at src/main.rs:12:5:\nno model\nnote: run with `RUST_BACKTRACE=1`", 0),
        ("loading\nhalf way\nSegmentation fault (core dumped)", -1),
        ("loading\nhalf way\ndone", -1),
        ("E srv start: couldn't bind HTTP server socket, hostname: 10.9.9.9\nE exiting due to HTTP server error", 0),
        ("INFO: Waiting\nERROR: [Errno 98] error while attempting to bind on address: address already in use\nbye", 1),
    ],
)
def test_the_telling_line_of_other_programs(output: str, told: int) -> None:
    lines = output.splitlines()
    assert telling(lines) == lines[told]


@pytest.mark.parametrize(
    "line",
    [
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "alloc_tensor_range: failed to allocate ROCm0 buffer of size 8589934592",
        "RuntimeError: CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "ValueError: 4.5 GiB KV cache is needed, which is larger than the available KV cache memory (2.1 GiB)",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
        "Not enough memory to allocate KV cache.",
    ],
)
def test_newer_engines_cry_for_memory_too(line: str) -> None:
    assert tells_of_memory([line])


@pytest.mark.parametrize(
    "line",
    ["RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "std::bad_alloc"],
)
def test_the_machines_own_memory_is_another_matter(line: str) -> None:
    assert not tells_of_memory([line])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["loading", "dying"], "dying"),
        (["CUDA error: out of memory", "main: exiting"], "CUDA error: out of memory"),
        (["CUDA error: an illegal memory access was encountered", "  current device: 0"], None),
        (
            [
                "Traceback (most recent call last):",
                '  File "server.py", line 3, in main',
                "ValueError: No model at /models/x",
                "[rank0]: process group was not destroyed",
            ],
            "ValueError: No model at /models/x",
        ),
        (
            ["(EngineCore pid=7) ERROR 09-01 12:00:00 core.py:700] torch.AcceleratorError: bad device", "Exiting."],
            None,
        ),
        (
            ["RuntimeError: first", "During handling of the above exception …", "OSError: second", "bye"],
            "OSError: second",
        ),
        (["error: invalid argument: --ctx", "usage: llama-server [options]"], "error: invalid argument: --ctx"),
        (["llama_model_load: error loading model: not a GGUF file", "main: exiting"], None),
        (["0 errors: all is well", "bye"], "bye"),
        (["INFO: Error handlers are installed", "bye"], "bye"),
    ],
)
def test_the_line_that_says_why_is_told_rather_than_the_last(words: list[str], told: str | None) -> None:
    assert telling(words) == (told or words[0])
