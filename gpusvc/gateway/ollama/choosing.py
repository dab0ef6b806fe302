"""Which requests are for Ollama's API. The first request with a path that looks like it imports this."""

from __future__ import annotations

from gpusvc.gateway.entry import engine_origin
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gateway.http.request_head import RequestHead
from gpusvc.gateway.ollama import endpoints
from gpusvc.gateway.ollama.exchange import OllamaExchange
from gpusvc.gateway.relay.exchange import Exchange
from gpusvc.gateway.relay.shared import Downstream, Shared
from gpusvc.gateway.relay.turn import Turn


def exchange_for(shared: Shared, client: Downstream, head: RequestHead, *, is_own_port: bool) -> Turn:
    """Return the exchange of a request whose path may be Ollama's, an ordinary one if it is not.

    Args:
        shared: by all connections.
        client: whose request it is.
        head: of the request.
        is_own_port: whether it came to ``ollama_port``.
    """
    endpoint: endpoints.Endpoint | HttpError | None = None
    try:
        if engine_origin.model_in(head.host) is None:  # there all paths are the engine's
            endpoint = endpoints.find(head.method, head.target, is_own_port=is_own_port)
    except HttpError as error:
        endpoint = error
    return Exchange(shared, client, head) if endpoint is None else OllamaExchange(shared, client, head, endpoint)
