"""The models as clients see them: found by any of their names, and listed, whether they run or not.

The state of a model is what its lease says now. This module does not decide whether a request may pass.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from gpusvc.config import files as config
from gpusvc.config.serving import Serving
from gpusvc.config.watched import Watched
from gpusvc.errors import GpusvcError
from gpusvc.gateway.entry import routes
from gpusvc.gateway.entry.routes import Route
from gpusvc.gateway.http.replies import HttpError
from gpusvc.gpu.reading import total
from gpusvc.log import log
from gpusvc.names import is_name
from gpusvc.paths import Paths
from gpusvc.quantity import shown
from gpusvc.state import lease as leases
from gpusvc.state.lease import BrokenLeaseError

# How old the view of the files may be. A look at a hundred files costs 1 ms, and nobody notices the delay.
FRESH_SECONDS = 0.25

# The catalog looks for a new file no more often than this, however many requests name it.
_AGAIN_SECONDS = 0.02

# Characters of a name that are compared with other names: the search takes long for long names.
_MAX_COMPARED = 100

_WARNING = 4

# The states of a lease, and what llama-server's router calls them in its own list, for its clients.
_ROUTER_STATES = {"ready": "loaded", "loading": "loading"}

Allowed = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _State:
    """What the lease says of a model."""

    state: str  # "stopped", "loading", "ready"; "unknown": its lease cannot be read
    gpus: tuple[int, ...] = ()
    used_bytes: int | None = None  # VRAM; None: unknown


class Catalog:
    """All models that have a file. It belongs to one thread."""

    def __init__(self, paths: Paths, *, now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            paths: where the models' files and leases are.
            now: returns seconds of a monotonic clock.
        """
        self._paths = paths
        self._now = now
        self._watched = Watched(paths, lambda error: log(_WARNING, str(error)))
        self._servings: dict[str, Serving] = {}
        self._by_name: dict[str, Serving] = {}  # and by alias
        self._deepest = 0  # the most slashes in one of these names
        self._due = -1.0

    def names(self) -> list[str]:
        """Return the names of all models, sorted, without aliases."""
        self._refresh()
        return list(self._servings)

    def resolve(self, text: str | None, *, allowed: Allowed = lambda _: True, guess: bool = False) -> Serving:
        """Return the model that a client means.

        Args:
            text: a name or an alias; None: the request names none.
            allowed: whether the client may use a model. Other models do not exist for the client.
            guess: if the request names no model and there is only one, take that one. Not for a GET: opening any page
                would load the model.

        Raises:
            HttpError: 404 there is no such model, 400 none is named.
        """
        if self._now() >= self._due:
            self._refresh()
        if text is not None:
            serving = self._by_name.get(text)
            if serving is not None and allowed(serving.name):
                return serving
            # A model that the client may not know of takes the same steps as one that does not exist, so that the time
            # of the answer does not tell them apart.
            if self._is_new(text):
                serving = self._by_name.get(text)
                if serving is not None and allowed(serving.name):
                    return serving
            serving = self._similar(text, allowed)
            if serving is None:
                raise self._unknown(text, allowed)
            return serving
        if guess and len(self._servings) == 1:
            only = next(iter(self._servings.values()))
            if allowed(only.name):
                return only
        hint = 'Name it by "model" in the body, by ?model= or by the header X-Model.'
        raise HttpError(400, "The request names no model.", hint=hint, code="missing_model", param="model")

    def locate(self, named: Route, *, allowed: Allowed = lambda _: True) -> tuple[Serving, bytes]:
        """Return the model of a NAMED route, and the target for its engine. Of aliases with slashes the longest counts.

        Raises:
            HttpError: 404 there is no such model; 308 the slash after its name is missing.
        """
        if self._now() >= self._due:
            self._refresh()
        found: tuple[str, bytes] | None = None
        for name, rest in routes.names_in(named, self._deepest):
            if name in self._by_name:
                found = name, rest
        if found is None or not allowed(self._by_name[found[0]].name):
            raise self._unknown(named.name or "", allowed)
        name, rest = found
        if not rest.startswith(b"/"):
            raise routes.to_pages(name, rest)
        return self._by_name[name], rest

    def listing(self, allowed: Allowed) -> bytes:
        """Return the list of models as JSON, in the forms of OpenAI, Anthropic and llama-server's router at once.

        Args:
            allowed: whether the client may use a model. Other models are not listed.
        """
        self._refresh()
        data = [
            entry for serving in self._servings.values() if allowed(serving.name) for entry in self._entries(serving)
        ]
        page = {
            "object": "list",
            "data": data,
            "has_more": False,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
        return _encode(page)

    def card(self, text: str, *, allowed: Allowed = lambda _: True) -> bytes:
        """Return as JSON what the list says of one model, under the name ``text``.

        Raises:
            HttpError: 404 there is no such model.
        """
        serving = self.resolve(text, allowed=allowed)
        return _encode(self._entry(serving, text, self._created(serving), self._state(serving)))

    def _refresh(self) -> None:
        """Read the files that have changed, unless that was just done."""
        now = self._now()
        if now < self._due:
            return
        self._due = now + FRESH_SECONDS
        try:
            names = config.model_names(self._paths)
        except GpusvcError as error:
            log(_WARNING, str(error))
            return
        servings = {name: serving for name in names if (serving := self._watched.serving(name)) is not None}
        if servings == self._servings:
            return
        by_name: dict[str, Serving] = {}
        for serving in servings.values():
            for alias in serving.aliases:
                by_name.setdefault(alias, serving)  # `gpusvc check` reports an alias of two models
        self._by_name = by_name | servings
        self._servings = servings
        self._deepest = max((name.count("/") for name in self._by_name), default=0)

    def _is_new(self, text: str) -> bool:
        """Return whether a file of that name has appeared; then read all files. A new model is soon asked for."""
        now = self._now()
        if now < self._due - FRESH_SECONDS + _AGAIN_SECONDS or not is_name(text):
            return False
        if not os.path.lexists(self._paths.model_file(text)) or text in self._by_name:
            return False
        self._due = now
        self._refresh()
        return True

    def _similar(self, text: str, allowed: Allowed) -> Serving | None:
        """Return the one model of which ``text`` is another spelling: qwen for qwen:latest, openai/qwen and Qwen.

        Its engine gets the name or alias that matched.
        """
        plain = text[:_MAX_COMPARED].removesuffix(":latest").casefold()
        for wanted in (plain, plain.rpartition("/")[2]):
            found = {
                serving.name: (name, serving)
                for name, serving in self._by_name.items()
                if name.casefold() == wanted and allowed(serving.name)
            }
            if len(found) == 1:
                name, serving = next(iter(found.values()))
                return serving if serving.served_name is not None else serving.replace(served_name=name)
        return None

    def _unknown(self, text: str, allowed: Allowed) -> HttpError:
        from difflib import get_close_matches  # noqa: PLC0415 - not needed by most

        known = {name.casefold(): name for name, serving in self._by_name.items() if allowed(serving.name)}
        near = get_close_matches(text[:_MAX_COMPARED].casefold(), known, n=3)
        if near:
            hint = f"Did you mean {' or '.join(repr(known[name]) for name in near)}?"
        else:
            hint = "GET /v1/models lists all models." if known else "No model is configured."
        return HttpError(404, f"There is no model {shown(text)}.", hint=hint, code="model_not_found", param="model")

    def _entries(self, serving: Serving) -> Iterator[dict[str, object]]:
        created, state = self._created(serving), self._state(serving)
        for name in (serving.name, *serving.aliases):
            if self._by_name.get(name) is serving:
                yield self._entry(serving, name, created, state)

    def _entry(self, serving: Serving, name: str, created: int, state: _State) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "gpusvc",
            "type": "model",
            "display_name": serving.description or serving.name,
            "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "status": {"value": _ROUTER_STATES.get(state.state, "unloaded")},
            "gpusvc": {
                "name": serving.name,
                "aliases": serving.aliases,
                "state": state.state,
                "gpus": state.gpus,
                "used_bytes": state.used_bytes,
                "concurrency": serving.concurrency,
                "preload": serving.preload,
                "keep": serving.keep,
            },
        }

    def _created(self, serving: Serving) -> int:
        """Return when the model's file was changed last, in seconds since 1970; 0: unknown."""
        try:
            return int(self._paths.model_file(serving.name).stat().st_mtime)
        except OSError:
            return 0

    def _state(self, serving: Serving) -> _State:
        try:
            lease = leases.read(self._paths, serving.name)
        except BrokenLeaseError:
            return _State("unknown")
        if lease is None:
            return _State("stopped")
        return _State(
            "ready" if lease.ready else "loading",
            tuple(gpu.index for gpu in lease.gpus),
            total(gpu.used_bytes for gpu in lease.gpus),
        )


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
