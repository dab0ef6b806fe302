"""One request for a token that the watchdog sends to an engine, in a thread beside its ticks."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from enum import StrEnum

# An engine that answers later than this does not answer.
_TIMEOUT_SECONDS = 30.0


class Outcome(StrEnum):
    """What came of a probe."""

    WORKS = "works"
    """The engine answered with a status below 400."""
    REFUSED = "refused"
    """The status was 4xx: the request does not suit this engine, so it says nothing."""
    FAILS = "fails"
    """The status was 5xx, or there was no answer."""


class Probing:
    """A probe under way. ``outcome`` is None until it is over."""

    def __init__(self, address: str, port: int, path: str, body: Mapping[str, object], key: str | None) -> None:
        """``key`` is the API key that the engine asks for."""
        self.outcome: Outcome | None = None
        self.reason = ""
        """What the engine did, as the end of a sentence."""
        self._target = (address, port, path, json.dumps(body).encode())
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        # A daemon thread: a watchdog that is told to end does not wait for an engine.
        threading.Thread(target=self._run, name="probe", daemon=True).start()

    def _run(self) -> None:
        import http.client  # noqa: PLC0415  most watchdogs never probe an engine

        address, port, path, body = self._target
        connection = http.client.HTTPConnection(address, port, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request("POST", path, body, self._headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.reason, outcome = f"got no answer ({type(error).__name__})", Outcome.FAILS
        else:
            self.reason = f"was answered with status {status}"
            outcome = Outcome.WORKS if status < 400 else Outcome.REFUSED if status < 500 else Outcome.FAILS
        finally:
            connection.close()
        self.outcome = outcome
