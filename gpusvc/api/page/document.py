"""The status page as HTML: values in, markup out. It reads nothing, and the markup works without a script.

``parts()`` is everything that a refresh replaces. An element with an ``id`` stays the same element over refreshes, so
that it keeps the focus. An element with ``data-since`` or ``data-until`` (seconds since the epoch) is a clock,
and the script moves it on.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpusvc import __version__
from gpusvc.api.page import gpus as gpus_section
from gpusvc.api.page import history
from gpusvc.api.page import models as models_section
from gpusvc.api.page.clock import clock, since
from gpusvc.api.page.html import Html, element, join
from gpusvc.api.page.moment import Log, Moment

STATIC = "gpusvc/static"

_HUES = 8


def page(moment: Moment, host: str, log: Log | None) -> str:
    """The whole document."""
    head = join(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"gpusvc on {host}"),
        element("link", rel="icon", href=f"{STATIC}/icon.svg", type="image/svg+xml"),
        element("link", rel="stylesheet", href=f"{STATIC}/page.css"),
        element("script", src=f"{STATIC}/page.js", defer=True),
    )
    as_of, again = clock(moment.now, moment.now), element("a", "Load again", href="./")
    body = join(
        element("a", "Skip to the models", class_="skip", href="#models"),
        element(
            "header",
            element("h1", "gpusvc", element("span", f" on {host}", class_="host")),
            element("p", element("noscript", "As of ", as_of, ". ", again), id="link", role="status"),
        ),
        element(
            "main",
            element("div", "", id="alert", role="alert"),
            element("div", parts(moment), id="parts"),
            history.log(log, moment.now),
        ),
        element("p", "", id="announcement", class_="unseen", role="status"),
        element(
            "footer",
            f"gpusvc {__version__}",
            element("a", "Metrics", href="metrics"),
            element("a", "API", href="gpusvc/openapi.json"),
        ),
    )
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en")


def parts(moment: Moment) -> Html:
    """What changes from moment to moment."""
    models = moment.models
    hues = {model.name: number % _HUES for number, model in enumerate(models or ())}
    facts = moment.facts
    summary = None if models is None else element("span", models_section.summary(models), class_="aside")
    return element(
        "div",
        *(element("p", problem, class_="problem") for problem in moment.problems),
        _section(
            "gpus",
            join("GPUs"),
            None if moment.gpus is None else [gpus_section.gpu(status, hues) for status in moment.gpus],
            empty="There is no GPU that NVML knows of.",
        ),
        _waiting(moment),
        _section(
            "models",
            join("Models", summary),
            None if models is None else [models_section.model(model, facts, hues, moment.now) for model in models],
            empty="No model is configured: gpusvc add makes the first one.",
        ),
        _section(
            "events",
            join("Recent events"),
            None if moment.events is None else [history.event(event, moment.now) for event in moment.events],
            empty="Nothing happened yet.",
        ),
        id="moment",
        data_now=f"{moment.now:.3f}",
    )


def error_page(message: str, hint: str | None) -> str:
    """Return the page that answers a form whose action failed."""
    head = join(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "That did not work"),
        element("link", rel="icon", href=f"/{STATIC}/icon.svg", type="image/svg+xml"),
        element("link", rel="stylesheet", href=f"/{STATIC}/page.css"),
    )
    body = element(
        "main",
        element("h1", "That did not work"),
        element("p", message, class_="problem"),
        element("p", hint) if hint else None,
        element("p", element("a", "Back to the models", href="/")),
    )
    return "<!doctype html>\n" + element("html", element("head", head), element("body", body), lang="en")


def _waiting(moment: Moment) -> Html | None:
    """Return the section of the starts that wait for room, if there are any."""
    if not moment.line:
        return None
    items = []
    for waiting in moment.line:
        before, after = waiting.parts()
        items.append(element("li", before, since(waiting.since, moment.now), after, data_name=waiting.model))
    return _section("line", join("Waiting for room"), items, empty="")


def _section(name: str, title: Html, items: Sequence[Html] | None, *, empty: str) -> Html:
    if items:
        # Without a role, Safari takes a list without bullets for none.
        content = element("ul", *items, class_=name, role="list")
    else:
        content = element("p", "Not known." if items is None else empty, class_="empty")
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, content, id=name, aria_labelledby=f"{name}-title", tabindex="-1")
