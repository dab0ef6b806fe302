"""The presets of engines: how each makes a command of a model, and how its program is found.

A preset binds the engine to the loopback address and to ``{port}``, gives it the names that clients may use, and splits
the model over the GPUs that it gets. The user's ``args`` come last, so that they override the preset.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from gpusvc.quantity import shown
from gpusvc.record import Record

PORT = "{port}"

# No engine gets all of a GPU: the driver needs some.
_LARGEST_SHARE = 0.98

# The search path for an engine's program, unless the model's env has a PATH.
ENGINE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_LISTEN = ("--host", "127.0.0.1", "--port", PORT)

# Not compiled here: most models have a command of their own.
_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"
_QUANTISED_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*(:[A-Za-z0-9_.-]+)?"


class StopSignal(StrEnum):
    """How an engine that is evicted is told to end. An operator's stop is always polite: SIGTERM first."""

    TERM = "SIGTERM"
    KILL = "SIGKILL"


class Served(Record):
    """The input of a preset: the model, the names that clients use (its own name first), and the number of GPUs."""

    model: str
    names: tuple[str, ...]
    gpus: int


class Probe(Record):
    """A request for one token: a POST of ``body`` as JSON to ``path``."""

    path: str
    body: Mapping[str, object]


class Preset(Record):
    """An engine that gpusvc knows."""

    name: str
    health: str
    command: Callable[[Served], tuple[str, ...]]
    require_name: Callable[[str], None]
    """Raise ValueError, with one sentence, if the name is not valid. It does not look at the files."""
    require_files: Callable[[str], None]
    """Raise ValueError, with one sentence, if the model's files are missing or of another kind."""
    environment: Mapping[str, str] = MappingProxyType({})
    """Variables that the model's env replaces."""
    memory_option: str | None = None
    """The option that limits the engine to a share of each GPU's memory. Without it the engine takes nearly all."""
    memory_part: float = 1.0
    """The part of that memory which the option is about: the engine takes the rest besides."""
    takes_ordinals: bool = False
    """Whether some of its releases read CUDA_VISIBLE_DEVICES as a list of numbers, and end with an error at a UUID."""
    probe_paths: tuple[str, ...] = ()
    """Paths of the engine's state: a GET of one of them is no work."""

    stop_signal: StopSignal = StopSignal.KILL
    """These engines keep nothing that an end by SIGKILL could lose, and may take long to obey SIGTERM."""

    def probe(self, served: Served) -> Probe:
        """Return a request for one token of the model. All presets speak OpenAI's API."""
        return Probe("/v1/completions", {"model": served.names[0], "prompt": "Hi", "max_tokens": 1})


def _llama_server(served: Served) -> tuple[str, ...]:
    source = ("-m", served.model) if _is_path(served.model) else ("-hf", served.model)
    return ("llama-server", *source, "--alias", served.names[0], *_LISTEN)


def _require_gguf_name(model: str) -> None:
    """Accept an absolute path, or a Hugging Face repository, with or without a quantisation."""
    if not _is_path(model) and (model.lower().endswith(".gguf") or not re.fullmatch(_QUANTISED_REPOSITORY, model)):
        raise ValueError(f"{shown(model)} is neither an absolute path nor a repository such as 'owner/model:Q4_K_M'.")


def _require_gguf(model: str) -> None:
    from gpusvc.weights import gguf  # noqa: PLC0415  most models have a command of their own

    if not _is_path(model):
        return
    if not stat.S_ISREG(_mode(model)):
        raise ValueError(f"{shown(model)} is not a file.")
    try:
        is_gguf = gguf.has_magic(Path(model))
    except PermissionError:
        return  # the engine's user may well read it
    except OSError as error:
        raise ValueError(f"{shown(model)} cannot be read: {error.strerror}.") from error
    if not is_gguf:
        raise ValueError(f"{shown(model)} is not a GGUF file.")


def _vllm(served: Served) -> tuple[str, ...]:
    split = ("--tensor-parallel-size", str(served.gpus)) if served.gpus > 1 else ()
    return ("vllm", "serve", served.model, "--served-model-name", *served.names, *_LISTEN, *split)


def _sglang(served: Served) -> tuple[str, ...]:
    split = ("--tp-size", str(served.gpus)) if served.gpus > 1 else ()
    program = ("python3", "-m", "sglang.launch_server")
    return (*program, "--model-path", served.model, "--served-model-name", served.names[0], *_LISTEN, *split)


def _require_repository_name(model: str) -> None:
    """Accept an absolute path, or a Hugging Face repository."""
    if not _is_path(model) and not re.fullmatch(_REPOSITORY, model):
        raise ValueError(f"{shown(model)} is neither an absolute path nor a repository such as 'Qwen/Qwen3-8B'.")


def _require_path(model: str) -> None:
    """Accept a directory, or a file such as a GGUF file."""
    if _is_path(model):
        _mode(model)


# The paths at which each engine tells its state.
_LLAMA_SERVER_STATE = ("/health", "/v1/health", "/metrics", "/props", "/slots", "/models", "/v1/models")
_VLLM_STATE = ("/health", "/ping", "/metrics", "/load", "/version", "/is_sleeping", "/server_info", "/v1/models")
_SGLANG_STATE = (
    *("/health", "/ping", "/metrics", "/get_load", "/v1/models"),
    *("/get_model_info", "/model_info", "/get_server_info", "/server_info"),
)

# Idle workers of vLLM use a core each unless they are told to sleep.
_VLLM_ENVIRONMENT = {"VLLM_SLEEP_WHEN_IDLE": "1"}

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "llama-server",
            "/health",
            _llama_server,
            _require_gguf_name,
            _require_gguf,
            probe_paths=_LLAMA_SERVER_STATE,
        ),
        Preset(
            "vllm",
            "/health",
            _vllm,
            _require_repository_name,
            _require_path,
            environment=_VLLM_ENVIRONMENT,
            memory_option="--gpu-memory-utilization",
            takes_ordinals=True,
            probe_paths=_VLLM_STATE,
        ),
        Preset(
            "sglang",
            "/health",
            _sglang,
            _require_repository_name,
            _require_path,
            # It is about weights and cache. SGLang leaves a tenth and more to activations and CUDA graphs.
            memory_option="--mem-fraction-static",
            memory_part=0.9,
            takes_ordinals=True,
            probe_paths=_SGLANG_STATE,
        ),
    )
}

ANY_PROBE_PATHS = tuple(sorted({"/healthz", *(path for preset in PRESETS.values() for path in preset.probe_paths)}))
"""For engines without a preset."""


def memory_arguments(
    preset: Preset | None, command: Sequence[str], vram_bytes: int | None, totals: Sequence[int | None]
) -> tuple[str, ...]:
    """Return the arguments that keep an engine within ``vram_bytes`` of each GPU; none if the command has them already.

    Args:
        preset: the engine's preset, or None.
        command: the engine's command.
        vram_bytes: the declared need on each GPU; None: the engine takes what it likes.
        totals: the bytes of each of its GPUs. The engine takes the same share of each.
    """
    known = [size for size in totals if size]
    option = None if preset is None else preset.memory_option
    if preset is None or option is None or vram_bytes is None or not known or len(known) < len(totals):
        return ()
    if any(argument.partition("=")[0] == option for argument in command):
        return ()
    share = min(vram_bytes / max(known) * preset.memory_part, _LARGEST_SHARE)
    return (option, f"{int(share * 1000) / 1000:.3f}")


def _is_path(model: str) -> bool:
    return model.startswith("/")


def _mode(path: str) -> int:
    """Return ``st_mode``; that of a regular file without permission to look. Raise ValueError if there is no file."""
    try:
        return Path(path).stat().st_mode
    except PermissionError:
        return stat.S_IFREG
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be used: {error.strerror}.") from error


def find_program(program: str, env: Mapping[str, str]) -> str:
    """Return the absolute path of an engine's program, given its first argument.

    A path without permission to look is accepted, because the engine's user may have it: exec(2) will tell.

    Raises:
        ValueError: there is no program; the message is a sentence.
    """
    if "/" in program:
        if not program.startswith("/"):
            raise ValueError(f"{shown(program)} is a relative path: write an absolute one, or a name that is in PATH.")
        verdict = _verdict(program)
        if verdict not in (_RUNS, _UNKNOWN):
            raise ValueError(f"{shown(program)} cannot be run: {verdict}.")
        return program
    search = env.get("PATH", ENGINE_PATH)
    # An empty or relative entry means the working directory, from which no program is run by accident.
    candidates = [f"{directory}/{program}" for directory in search.split(":") if directory.startswith("/")]
    verdicts = [_verdict(path) for path in candidates]
    for verdict in (_RUNS, _UNKNOWN):
        if verdict in verdicts:
            return candidates[verdicts.index(verdict)]
    raise ValueError(f"There is no program {shown(program)} in {search}.")


_RUNS = "runs"
_UNKNOWN = "unknown"


def _verdict(path: str) -> str:
    """Return whether ``path`` can be run, or the reason why not."""
    try:
        mode = Path(path).stat().st_mode
    except PermissionError:
        return _UNKNOWN
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISREG(mode):
        return "it is not a file"
    return _RUNS if mode & 0o111 else "it is not executable"


def misplaced_placeholder(arguments: Sequence[str]) -> str | None:
    """Return the first argument that looks like a placeholder other than ``{port}``; None if there is none."""
    for argument in arguments:
        if argument in ("$PORT", "${PORT}", "{model}", "{name}"):
            return argument
        if PORT in argument.lower() and PORT not in argument:
            return argument
    return None
