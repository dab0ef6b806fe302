"""JSON responses, and errors in the one form that the whole API uses."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from gpusvc.errors import GpusvcError
from gpusvc.printable import escaped_json


def json_response(value: Any, *, status: int = 200) -> web.Response:
    """Return ``value`` as a JSON response."""
    text = escaped_json(json.dumps(value, ensure_ascii=False)) + "\n"
    return web.Response(text=text, status=status, content_type="application/json")


def error_response(error: GpusvcError, *, with_log: bool = True) -> web.Response:
    """Return ``error`` as JSON: its message, its hint, and for a failed start the engine's last lines."""
    status = error.http_status
    told: dict[str, Any] = {
        "message": error.message,
        "hint": error.hint,
        "type": "invalid_request_error" if status < 500 else "server_error",
        "code": error.word(),
    }
    log = getattr(error, "log", None)
    if log is not None and with_log:
        told["log"] = list(log)
    response = json_response({"error": told}, status=status)
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response
