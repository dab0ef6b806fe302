"""Ollama's options as members of requests to engines. What has no counterpart is named, and not sent.

llama-server, vLLM and SGLang ignore members that they do not know, so that a member of one of them harms no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gpusvc.gateway.ollama import members

# Each option with its members at the engines, and whether it is a whole number.
_NUMBERS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "temperature": (("temperature",), False),
    "top_p": (("top_p",), False),
    "top_k": (("top_k",), True),
    "min_p": (("min_p",), False),
    "typical_p": (("typical_p",), False),
    "seed": (("seed",), True),
    "presence_penalty": (("presence_penalty",), False),
    "frequency_penalty": (("frequency_penalty",), False),
    # llama-server's name, and that of vLLM and SGLang.
    "repeat_penalty": (("repeat_penalty", "repetition_penalty"), False),
    # llama-server alone has these.
    "repeat_last_n": (("repeat_last_n",), True),
    "mirostat": (("mirostat",), True),
    "mirostat_tau": (("mirostat_tau",), False),
    "mirostat_eta": (("mirostat_eta",), False),
    "num_keep": (("n_keep",), True),
}

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MAX_NAMED = 32


def translate(options: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return the members for the engine, and the names of the options that are ignored.

    Raises:
        HttpError: 400, an option has a wrong type.
    """
    sent: dict[str, object] = {}
    ignored: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if name in _NUMBERS:
            at_engines, whole = _NUMBERS[name]
            number = members.number(value, f"options.{name}", whole=whole)
            sent.update(dict.fromkeys(at_engines, number))
        elif name == "num_predict":
            limit = members.number(value, "options.num_predict", whole=True)
            if limit >= 0:  # -1 and -2 mean no limit
                sent["max_tokens"] = limit
        elif name == "stop":
            stops = [value] if isinstance(value, str) else members.texts(options, "stop", "options.")
            if stops:
                sent["stop"] = stops
        else:
            # The rest is fixed when an engine starts (num_ctx, num_gpu, …), or nothing that Ollama has.
            ignored.append(name if _NAME.fullmatch(name) else "options")
    return sent, tuple(dict.fromkeys(ignored))[:_MAX_NAMED]
