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
