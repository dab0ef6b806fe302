"""The OpenAPI document, made from the routes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gpusvc import __version__
from gpusvc.api.routes.endpoints import NAMED, Endpoint

_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A model, or an alias of it.",
    "schema": {"type": "string"},
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "hint", "type", "code"],
            "properties": {
                "message": {"type": "string", "description": "A sentence for a person."},
                "hint": {"type": ["string", "null"], "description": "What to do about it."},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "code": {"type": "string", "description": "A word for programs."},
                "log": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "Of a start that failed: the engine's last lines.",
                },
            },
        }
    },
}


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(_path(endpoint.path), {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gpusvc",
            "version": __version__,
            "description": "Model servers on a GPU machine: what there is, starts, stops and evictions. "
            "On /run/gpusvc/api.sock, and through the gateway for keys with the right to it.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "responses": {
                "Error": {
                    "description": "It did not work, and why.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    parameters = [_NAME] if NAMED in endpoint.path else []
    parameters += [
        {"name": each.name, "in": "query", "description": each.summary, "schema": dict(each.schema)}
        for each in endpoint.parameters
    ]
    operation: dict[str, Any] = {
        "operationId": _identifier(endpoint),
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "Done.", "content": {media: {} for media in endpoint.media}},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": dict(endpoint.body)}}}
    return operation


def _identifier(endpoint: Endpoint) -> str:
    words = re.findall(r"\w+", endpoint.path)
    return "_".join([endpoint.method.lower(), *words]) if words else endpoint.method.lower()


def _path(path: str) -> str:
    """Return the path without aiohttp's patterns in braces."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)
