"""The sections of events and of one model's log on the status page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpusvc.api.page.clock import clock
from gpusvc.api.page.html import Content, Html, element, join
from gpusvc.api.page.moment import Log
from gpusvc.journal.eventlog import Event


def event(shown: Event, now: float) -> Html:
    first, _, rest = shown.message.partition("\n")
    return element(
        "li",
        clock(shown.seconds, now),
        element("span", shown.kind, class_=f"kind level{shown.level}"),
        element("span", first, class_="message", title=rest or None),
        id=f"event-{shown.cursor}",
    )


def log(chosen: Log | None, now: float) -> Html:
    lines: Content = None
    if chosen is not None:
        lines = join(*(_line(entry, now) for entry in chosen.entries))
    name = "" if chosen is None else chosen.model
    note = "Choose the log of a model above." if chosen is None else chosen.problem
    return element(
        "section",
        element("h2", "Log", element("span", f" of {name}" if name else "", id="log-name"), id="log-title"),
        element("p", note or "", id="log-note", class_="empty"),
        # A screen reader reads the log when its user goes there, not by itself.
        element(
            "div",
            lines,
            id="log-lines",
            role="log",
            aria_live="off",
            aria_labelledby="log-title",
            tabindex="0",
            hidden=chosen is None,
        ),
        id="log",
        aria_labelledby="log-title",
        data_log=name or None,
    )


def _line(entry: Mapping[str, Any], now: float) -> Html:
    text = element("span", str(entry["message"]))
    return element("p", clock(float(entry["time"]), now), " ", text, class_=f"level{entry['level']}")
