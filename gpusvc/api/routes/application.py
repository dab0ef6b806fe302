"""The API as an aiohttp application: all routes, errors as JSON, and limits on what is read."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from aiohttp import web

from gpusvc.api.backend import metrics
from gpusvc.api.backend.backend import Backend
from gpusvc.api.backend.responses import error_response, json_response
from gpusvc.api.page import page
from gpusvc.api.routes import compatible, history, machine, models, weights
from gpusvc.api.routes.endpoints import Endpoint
from gpusvc.api.routes.openapi import document
from gpusvc.errors import GpusvcError
from gpusvc.log import log

_MAX_BODY_BYTES = 64 * 1024

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _HttpError(GpusvcError):
    """An error of aiohttp: no such route, no such method, a body that is too large."""

    def __init__(self, error: web.HTTPException) -> None:
        super().__init__(f"{error.reason}.", hint="GET /gpusvc/openapi.json has all routes.")
        self.http_status = error.status


class _InternalError(GpusvcError):
    pass


class _ExhaustedError(GpusvcError):
    """The machine has no process, file descriptor or memory left for the request."""

    http_status = 503
    retry_after_seconds = 5


def application(backend: Backend) -> web.Application:
    """Return the whole API over ``backend``."""
    made = web.Application(middlewares=[_errors], client_max_size=_MAX_BODY_BYTES)
    made.router.add_routes([endpoint.route() for endpoint in endpoints(backend)])
    return made


def endpoints(backend: Backend) -> list[Endpoint]:
    """Return every route."""
    found = [
        *models.endpoints(backend),
        *machine.endpoints(backend),
        *weights.endpoints(backend),
        *history.endpoints(backend),
        *compatible.endpoints(backend),
        *map(Endpoint.from_route, [*metrics.routes(backend), *page.routes(backend)]),
    ]

    async def openapi(_: web.Request) -> web.Response:
        """This API, as an OpenAPI document."""
        return json_response(document(found))

    found += [Endpoint("GET", "/gpusvc/openapi.json", openapi), Endpoint("GET", "/openapi.json", openapi)]
    return found


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GpusvcError as error:
        # A form that the page sent without JavaScript is read by a person.
        is_form = request.method == "POST" and "text/html" in request.headers.get("Accept", "")
        return page.error_page(error) if is_form else error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = error_response(_HttpError(error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except (ConnectionError, TimeoutError):
        raise  # of the client's connection
    except Exception as error:  # one failing request must not end the API
        if _is_want(error):
            return error_response(
                _ExhaustedError(f"This machine has too little of something: {error}.", hint="Try again.")
            )
        log(3, f"{request.method} {request.path} failed: {type(error).__name__}: {error}.")
        return error_response(_InternalError("Something went wrong here.", hint="The journal of gpusvc-api has more."))


def _is_want(error: Exception) -> bool:
    """Whether the machine has not enough of something that programs need."""
    if isinstance(error, OSError):
        return error.errno in {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
    return isinstance(error, RuntimeError) and "new thread" in str(error)  # Python has no class for that
