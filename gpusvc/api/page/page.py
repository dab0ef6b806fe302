"""The status page at ``/``, for a person with a browser.

It works without a script. The script follows the events and loads ``/gpusvc/page`` when something changed. The buttons
are forms for the API's own routes. The page loads nothing from other servers, and no markup of strangers is run: model
names, descriptions, commands of foreign processes and logs are untrusted text.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from gpusvc import names
from gpusvc.api.backend import journal
from gpusvc.api.page import document
from gpusvc.api.page.moment import Facts, Log, Moment
from gpusvc.config.files import HostConfig, load_host
from gpusvc.config.model import read_model
from gpusvc.config.table import read_table
from gpusvc.errors import GpusvcError
from gpusvc.paths import Paths
from gpusvc.state import line

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from gpusvc.api.backend.backend import Backend

_T = TypeVar("_T")

_STATIC = Path(__file__).with_name("static")
_TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

_EVENTS = 20
_LOG_LINES = 200

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: a browser would then send forms without the origin that the gateway checks.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def routes(backend: Backend) -> list[web.RouteDef]:
    async def page(request: web.Request) -> web.Response:
        """The status page."""
        chosen = request.query.get("log")
        log = None if chosen is None else await _read_log(chosen)
        return _html(document.page(await moment(backend), socket.gethostname(), log))

    async def parts(_: web.Request) -> web.Response:
        """The parts of the status page that change, as HTML."""
        return _html(document.parts(await moment(backend)))

    async def static(request: web.Request) -> web.StreamResponse:
        """A file of the status page."""
        name = request.match_info["file"]
        if name not in _TYPES:
            raise web.HTTPNotFound
        headers = {**_HEADERS, "Content-Type": _TYPES[name], "Cache-Control": "no-cache"}
        return web.FileResponse(_STATIC / name, headers=headers)

    return [web.get("/", page), web.get("/gpusvc/page", parts), web.get("/gpusvc/static/{file}", static)]


def error_page(error: GpusvcError) -> web.Response:
    """Return ``error`` as a page, for a browser that sent a form."""
    return _html(document.error_page(error.message, error.hint), status=error.http_status)


async def moment(backend: Backend) -> Moment:
    """Read what the page shows. A part that cannot be read is left out, and the page says so."""
    problems: list[str] = []
    models = await _or_none(backend.snapshots.models(), problems)
    gpus = await _or_none(backend.snapshots.gpus(), problems)
    events = await _or_none(backend.events.last(_EVENTS), problems)
    facts = await backend.snapshots.beside(lambda: facts_of(backend.paths, [model.name for model in models or ()]))
    waiting = await backend.snapshots.beside(lambda: line.read(backend.paths))
    return Moment(time.time(), models, facts, gpus, events and events[::-1], waiting, list(dict.fromkeys(problems)))


async def _or_none(question: Awaitable[Sequence[_T]], problems: list[str]) -> Sequence[_T] | None:
    try:
        return await question
    except GpusvcError as error:
        problems.append(str(error))
        return None


async def _read_log(name: str) -> Log:
    if not names.is_name(name):
        return Log(name, problem="There is no such model.")
    try:
        async with journal.log_of(name, _LOG_LINES, follow=False) as entries:
            found = [entry async for entry in entries]
    except GpusvcError as error:
        return Log(name, problem=str(error))
    return Log(name, found, None if found else "It wrote nothing yet.")


def facts_of(paths: Paths, models: Iterable[str]) -> dict[str, Facts]:
    """Read what the files of these models say, without checking whether they could start."""
    try:
        host = load_host(paths)
    except GpusvcError:
        host = HostConfig()
    return {name: _facts(paths, name, host) for name in models}


def _facts(paths: Paths, name: str, host: HostConfig) -> Facts:
    try:
        table = read_table(paths.model_file(name))
    except (GpusvcError, FileNotFoundError):
        return Facts()
    model = read_model(table, name, host)  # whatever is wrong with the file: a default stands in for it
    return Facts(model.description, 0.0 if model.serving.keep else model.idle_timeout_seconds)


def _html(text: str, *, status: int = 200) -> web.Response:
    headers = {**_HEADERS, "Cache-Control": "no-store"}
    return web.Response(text=text, status=status, content_type="text/html", headers=headers)
