"""What ``keep_alive`` does: it keeps a model loaded, or unloads it, by the management API.

Where the gateway needs keys, that takes the right ``admin``, as POST /unload does. A request with another key is
served, and its ``keep_alive`` has no effect.
"""

from __future__ import annotations

from gpusvc.config.keys import Key, Right
from gpusvc.config.serving import Serving
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.ollama.management import Management
from gpusvc.log import log


def may_keep(key: Key | None) -> bool:
    """Return whether a request with this key decides how long a model stays; None: no keys are needed."""
    return key is None or key.may(Right.ADMIN)


async def keep(management: Management, serving: Serving, seconds: float) -> None:
    """Do what a request wants after it was served. What fails is logged: nobody waits for it.

    Args:
        management: for the client of the request.
        serving: the model.
        seconds: 0: unload it; infinity: keep it.
    """
    try:
        if seconds == 0:
            await unload(management, serving)
        else:
            await management.keep(serving.name, seconds)
    except HttpError as error:
        log(5, f"keep_alive of a request for {serving.name} has no effect: {error}")


async def unload(management: Management, serving: Serving) -> None:
    """Stop a model, at once or as soon as its present users are served.

    Raises:
        HttpError: 409, its file keeps it, or it is pinned; others, the API does not do it.
    """
    if serving.keep:
        hint = "Its file says `keep = true`."
        raise HttpError(409, f"{serving.name} is not unloaded for a client.", hint=hint, code="kept")
    if not await management.unload(serving.name):
        # Then the watchdog stops it, as soon as it is idle.
        await management.keep(serving.name, 0.0)
