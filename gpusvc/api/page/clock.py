"""Times and durations on the status page. ``page.js`` moves them on."""

from __future__ import annotations

import time

from gpusvc.api.page.html import Html, element


def clock(seconds: float, now: float) -> Html:
    """Return the time of day; for another day also the date."""
    moment = time.localtime(seconds)
    is_today = moment[:3] == time.localtime(now)[:3]
    return element(
        "time",
        time.strftime("%H:%M:%S" if is_today else "%d %b %H:%M", moment),
        datetime=time.strftime("%Y-%m-%dT%H:%M:%S%z", moment),
        title=time.strftime("%Y-%m-%d %H:%M:%S %Z", moment),
    )


def since(then: float, now: float) -> Html:
    return element("span", duration(now - then), data_since=f"{then:.3f}")


def until(then: float, now: float) -> Html:
    return element("span", duration(then - now), data_until=f"{then:.3f}")


def duration(seconds: float) -> str:
    """Return a duration in one or two units, or "a moment". page.js has the same rule."""
    whole = int(seconds)
    if whole <= 0:
        return "a moment"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
