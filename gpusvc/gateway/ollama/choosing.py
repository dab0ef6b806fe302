"""Which requests are for Ollama's API. The first request with a path that looks like it imports this."""

from __future__ import annotations

from gpusvc.gateway.entry import engine_origin
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.ollama import endpoints
from gpusvc.gateway.ollama.exchange import OllamaExchange
from gpusvc.gateway.relay.shared import Downstream, Shared


def exchange_for(shared: Shared, client: Downstream, head: RequestHead, *, is_own_port: bool) -> OllamaExchange | None:
    """Return the exchange of a request; None: it is not for Ollama's API.

    Args:
        shared: by all connections.
        client: whose request it is.
        head: of the request.
        is_own_port: whether it came to ``ollama_port``.
    """
    if engine_origin.model_in(head.host) is not None:
        return None  # all paths there are the engine's
    endpoint: endpoints.Endpoint | HttpError | None
    try:
        endpoint = endpoints.find(head.method, head.target, is_own_port=is_own_port)
    except HttpError as error:
        endpoint = error
    return None if endpoint is None else OllamaExchange(shared, client, head, endpoint)
