"""A model's default parameters of requests, as options of llama-server. A request can override them."""

from __future__ import annotations

from gpusvc.importing.draft import Draft
from gpusvc.importing.foreign import Foreign

# As OpenAI's API, LocalAI and Ollama call them.
OPTIONS = {
    "temperature": "--temp",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "typical_p": "--typical",
    "repeat_penalty": "--repeat-penalty",
    "repeat_last_n": "--repeat-last-n",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "mirostat": "--mirostat",
    "mirostat_tau": "--mirostat-ent",
    "mirostat_eta": "--mirostat-lr",
    "seed": "--seed",
}


def put(draft: Draft, fields: Foreign) -> None:
    """Add the defaults that ``fields`` has to the arguments."""
    for key, option in OPTIONS.items():
        number = fields.number(key)
        if number is not None:
            draft.extend("args", [option, f"{number:g}" if isinstance(number, float) else str(number)])
