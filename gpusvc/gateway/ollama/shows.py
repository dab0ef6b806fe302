"""What the gateway itself answers: the lists of models, what is shown of one, and the load of one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from gpusvc import __version__
from gpusvc.config.serving import Serving
from gpusvc.gateway.entry.catalog import Allowed
from gpusvc.gateway.http.replies import Headers, HttpError, Reply, reply_json
from gpusvc.gateway.ollama import answers, endpoints, keeping, listing, members
from gpusvc.gateway.ollama.endpoints import Endpoint
from gpusvc.gateway.ollama.management import Management
from gpusvc.gateway.ollama.questions import Question
from gpusvc.gateway.relay.account import Account
from gpusvc.gateway.relay.shared import Shared

_PLAIN = ((b"content-type", b"text/plain; charset=utf-8"),)

# After Ollama's answer that all is done.
_PULLED = {"status": "success"}


class Shows:
    """The answers for one client."""

    def __init__(self, shared: Shared, management: Management, allowed: Allowed) -> None:
        """
        Args:
            shared: by all connections.
            management: the line to the API, for this client.
            allowed: whether the client may know of a model.
        """
        self._shared = shared
        self._management = management
        self._allowed = allowed

    def at_once(self, endpoint: Endpoint) -> Reply | None:
        """Return an answer that needs nobody else; None: there is none."""
        if endpoint is Endpoint.ROOT:
            return Reply(200, _PLAIN, endpoints.RUNNING)
        if endpoint is Endpoint.VERSION:
            return reply_json(200, {"version": endpoints.VERSION, "gpusvc": __version__})
        return None

    async def later(self, endpoint: Endpoint, body: bytes) -> Reply:
        """Return the answer of TAGS, PS, SHOW or PULL.

        Raises:
            HttpError: 400, the request is not valid; 404, there is no such model; 501, it would have to be downloaded.
        """
        match endpoint:
            case Endpoint.TAGS:
                return reply_json(200, listing.tags(self._listed(), await self._management.weights()))
            case Endpoint.PS:
                weights, models = await self._management.weights(), await self._management.models()
                return reply_json(200, listing.running(self._listed(), weights, models, time.time()))
            case Endpoint.SHOW:
                name = members.model(members.read(body))
                serving = self._shared.catalog.resolve(name, allowed=self._allowed)
                card = json.loads(self._shared.catalog.card(serving.name, allowed=self._allowed))
                weights = await self._management.weights()
                return reply_json(200, listing.shown(card, weights.get(serving.name, {})))
            case _:
                return self._pull(members.model(members.read(body)))

    async def load(self, question: Question, key_keeps: bool, account: Account, headers: Headers) -> Reply:
        """Load or unload a model, as a request without a prompt asks.

        Args:
            question: the request.
            key_keeps: whether the client's key decides how long a model stays.
            account: of the request.
            headers: more of the response.

        Raises:
            HttpError: 403, its key may not unload; 404, there is no such model; others, it did not load or unload.
        """
        serving = self._shared.catalog.resolve(question.model, allowed=self._allowed)
        account.open(serving.name)
        seconds = question.keep_alive_seconds
        if seconds == 0:
            if not key_keeps:
                raise HttpError(403, "The key may not unload models: that takes the right admin.", code="right_missing")
            await keeping.unload(self._management, serving)
            return reply_json(200, answers.loaded(question, "unload", time.time()), headers)
        await self._enter(serving, account)
        if seconds is not None and key_keeps:
            await keeping.keep(self._management, serving, seconds)
        return reply_json(200, answers.loaded(question, "load", time.time()), headers)

    async def _enter(self, serving: Serving, account: Account) -> None:
        """Have a model loaded. One that is loaded may have no free slot, which nobody needs here."""
        if self._shared.activation.look_at(serving) is None:
            account.wait()
            passage = await self._shared.activation.enter(serving, knows=self._allowed)
            account.stop_waiting()
            passage.close()

    def _listed(self) -> Sequence[Mapping[str, object]]:
        listed: Sequence[Mapping[str, object]] = json.loads(self._shared.catalog.listing(self._allowed))["data"]
        return listed

    def _pull(self, name: str) -> Reply:
        """A model that is here needs no download. Clients pull before they use one."""
        try:
            self._shared.catalog.resolve(name, allowed=self._allowed)
        except HttpError:
            raise endpoints.refused(
                "This server downloads no models for its clients, and has none of this name. An administrator adds one "
                "with `gpusvc add`."
            ) from None
        return Reply(200, ((b"content-type", b"application/x-ndjson"),), answers.line(dict(_PULLED)))
