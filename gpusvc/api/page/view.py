"""The status page as HTML: values in, markup out; it asks nobody, and needs no script to be read.

Everything that a refresh replaces is in ``parts()``. What has an ``id`` stays the same element over refreshes, so that
the focus stays, too. What has ``data-since`` or ``data-until`` (seconds since the epoch) is a clock, and a script moves
it on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from gpusvc import __version__
from gpusvc.api.page.html import Content, Html, element, join
from gpusvc.journal.eventlog import Event
from gpusvc.quantity import format_size
from gpusvc.status.inventory import GpuStatus, Holder, ModelState, ModelStatus

STATIC = "gpusvc/static"

# Relative, so that all of it works below a prefix of a front proxy, too.
_MODELS = "gpusvc/models"

_BAR = 1000
_HUES = 8

_ORDER = (
    ModelState.READY,
    ModelState.STARTING,
    ModelState.STOPPING,
    ModelState.STUCK,
    ModelState.FAILED,
    ModelState.STOPPED,
)
_IN_MOTION = frozenset({ModelState.STARTING, ModelState.STOPPING})


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's file says that people want to see. None: not known."""

    description: str = ""
    idle_timeout_seconds: float | None = None
    """0: never."""


@dataclass(frozen=True, slots=True)
class Log:
    """The log of one model: entries as journal.told() has them, or why there are none."""

    model: str
    entries: Sequence[Mapping[str, Any]] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """All that the page shows at one moment, ``now`` in seconds since the epoch. None: not known."""

    now: float
    models: Sequence[ModelStatus] | None
    facts: Mapping[str, Facts]
    gpus: Sequence[GpuStatus] | None
    events: Sequence[Event] | None
    """The newest first."""
    problems: Sequence[str] = ()
    """Why some of it is missing."""


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
    clock, again = _clock(moment.now, moment.now), element("a", "Load again", href="./")
    body = join(
        element("a", "Skip to the models", class_="skip", href="#models"),
        element(
            "header",
            element("h1", "gpusvc", element("span", f" on {host}", class_="host")),
            element("p", element("noscript", "As of ", clock, ". ", again), id="link", role="status"),
        ),
        element(
            "main",
            element("div", "", id="alert", role="alert"),
            element("div", parts(moment), id="parts"),
            _log(log, moment.now),
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
    summary = None if models is None else element("span", _summary(models), class_="aside")
    return element(
        "div",
        *(element("p", problem, class_="problem") for problem in moment.problems),
        _section(
            "gpus",
            join("GPUs"),
            None if moment.gpus is None else [_gpu(status, hues) for status in moment.gpus],
            empty="There is no GPU that NVML knows of.",
        ),
        _section(
            "models",
            join("Models", summary),
            None if models is None else [_model(model, facts, hues, moment.now) for model in models],
            empty="No model is configured: gpusvc add makes the first one.",
        ),
        _section(
            "events",
            join("Recent events"),
            None if moment.events is None else [_event(event, moment.now) for event in moment.events],
            empty="Nothing happened yet.",
        ),
        id="moment",
        data_now=f"{moment.now:.3f}",
    )


def refusal(message: str, hint: str | None) -> str:
    """The answer to a form of the page whose wish could not be granted."""
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


def _section(name: str, title: Html, items: Sequence[Html] | None, *, empty: str) -> Html:
    if items:
        # Without a role, Safari takes a list without bullets for none.
        content = element("ul", *items, class_=name, role="list")
    else:
        content = element("p", "Not known." if items is None else empty, class_="empty")
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, content, id=name, aria_labelledby=f"{name}-title", tabindex="-1")


# -- models -----------------------------------------------------------------------------------------------------------


def _summary(models: Sequence[ModelStatus]) -> str:
    counts = Counter(model.state for model in models)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _model(model: ModelStatus, all_facts: Mapping[str, Facts], hues: Mapping[str, int], now: float) -> Html:
    name, state = model.name, model.state
    key = quote(name, safe="")
    facts, hue = all_facts.get(name, Facts()), hues[name]
    described = facts.description if facts.description != name else None
    # What a model says of itself while all is well is where it listens, which is of no use through the gateway.
    told = model.text if state not in {ModelState.READY, ModelState.STOPPED} else None
    return element(
        "li",
        element(
            "div",
            element("h3", element("span", class_=f"swatch hue{hue}", aria_hidden="true") if model.gpus else None, name),
            element("p", described, class_="description") if described else None,
            class_="name",
        ),
        element("p", element("span", str(state), class_="badge"), class_="state"),
        element("p", *_holdings(model), class_="holds"),
        element("p", *_use(model, facts, now), class_="use"),
        element("p", told, class_="told", id=f"told-{key}") if told else None,
        element("div", *_actions(model, key), class_="actions", id=f"actions-{key}"),
        class_="model",
        id=f"model-{key}",
        data_name=name,
        data_state=str(state),
    )


def _holdings(model: ModelStatus) -> Iterator[Content]:
    if not model.gpus:
        return
    indices = ", ".join(str(gpu.index) for gpu in model.gpus)
    size = model.vram_bytes
    yield element("strong", "unknown VRAM" if size is None else format_size(size))
    yield f" on GPU {indices}"


def _use(model: ModelStatus, facts: Facts, now: float) -> Iterator[Content]:
    """Whether it is in use, or since when it is not and when it therefore goes."""
    standing = model.standing
    if model.state in _IN_MOTION and model.since is not None:
        yield "for "
        yield _since(model.since, now)
        return
    if model.state is not ModelState.READY or standing is None:
        return
    if standing.in_use:
        yield element("span", "in use", class_="busy")
    elif standing.in_use is False and standing.last_use is not None:
        yield "idle for "
        yield _since(standing.last_use, now)
        if standing.pinned:
            return  # the button says so
        if facts.idle_timeout_seconds == 0:
            yield ", stays loaded"
        elif facts.idle_timeout_seconds is not None:
            yield ", unloads in "
            yield _until(standing.last_use + facts.idle_timeout_seconds, now)


def _actions(model: ModelStatus, key: str) -> Iterator[Html]:
    name, state, standing = model.name, model.state, model.standing
    if state in {ModelState.STOPPED, ModelState.FAILED}:
        yield _button(name, key, "start", "Start", kind="main")
    elif state is ModelState.STUCK:
        yield _button(name, key, "release", "Look again", kind="main")
    else:
        in_use = standing is not None and standing.in_use
        question = f"{name} is in use. Stop it all the same?" if in_use and state is ModelState.READY else None
        yield _button(name, key, "stop", "Stop", question=question, disabled=state is ModelState.STOPPING)
    if standing is not None and standing.pinned_by_file and not standing.pinned_by_hand:
        yield element("span", "pinned by its file", class_="fact")
    elif standing is not None:
        action = "unpin" if standing.pinned_by_hand else "pin"
        yield _button(name, key, action, "Pin", slot="pin", pressed=standing.pinned_by_hand)
    yield element(
        "a",
        "Log",
        element("span", f" of {name}", class_="unseen"),
        href=f"?log={key}#log",
        class_="button",
        id=f"show-{key}",
        data_log=name,
    )


def _button(
    name: str,
    key: str,
    action: str,
    label: str,
    *,
    slot: str = "run",
    kind: str | None = None,
    question: str | None = None,
    pressed: bool | None = None,
    disabled: bool = False,
) -> Html:
    return element(
        "form",
        element(
            "button",
            label,
            element("span", f" {name}", class_="unseen"),
            class_=kind,
            id=f"{slot}-{key}",
            aria_pressed=None if pressed is None else str(pressed).lower(),
            # One that is disabled for good loses the focus.
            aria_disabled="true" if disabled else None,
        ),
        method="post",
        action=f"{_MODELS}/{key}/{action}",
        data_question=question,
    )


# -- GPUs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Share:
    """A part of a GPU's memory and who has it. ``size`` None: not known how much."""

    label: str
    size: int | None
    css: str
    note: str | None = None


def _gpu(status: GpuStatus, hues: Mapping[str, int]) -> Html:
    gpu = status.gpu
    shares = list(_shares(status, hues))
    # The table of names beside it says the same, to everybody: the picture has nothing to add for who cannot see it.
    return element(
        "li",
        element(
            "div",
            element("h3", f"GPU {gpu.index}", element("span", f" {gpu.name}", class_="aside")),
            element("p", *_load(status), class_="load"),
            class_="title",
        ),
        element("p", gpu.problem, class_="problem") if gpu.problem else None,
        _bar(shares, gpu.total_bytes),
        element("ul", *(_legend(share) for share in shares), class_="legend", role="list"),
        class_="gpu",
        id=f"gpu-{gpu.index}",
    )


def _load(status: GpuStatus) -> Iterator[Content]:
    gpu = status.gpu
    if gpu.used_bytes is not None and gpu.total_bytes is not None:
        yield element("strong", format_size(gpu.used_bytes))
        yield f" of {format_size(gpu.total_bytes)}"
    if gpu.utilisation_percent is not None:
        yield f", {gpu.utilisation_percent} % busy"


def _shares(status: GpuStatus, hues: Mapping[str, int]) -> Iterator[_Share]:
    gpu = status.gpu
    own = [holder for holder in status.holders if holder.model is not None]
    foreign = [holder for holder in status.holders if holder.model is None]
    coming = 0
    for holder in own:
        css = f"hue{hues.get(holder.model or '', 0)}"
        missing = max(0, (holder.reserved_bytes or 0) - (holder.vram_bytes or 0))
        yield _Share(holder.model or "", holder.vram_bytes, css)
        if missing:
            coming += missing
            yield _Share(holder.model or "", missing, f"{css} promised", note="promised")
    for holder in foreign:
        yield _Share(_process(holder), holder.vram_bytes, "foreign", note="no model")
    known = [holder.vram_bytes for holder in status.holders]
    if gpu.used_bytes is not None and None not in known:
        rest = gpu.used_bytes - sum(size for size in known if size is not None)
        if rest > 0:
            yield _Share("driver and others", rest, "rest")
    if gpu.free_bytes is not None:
        yield _Share("free", max(0, gpu.free_bytes - coming), "free")


def _process(holder: Holder) -> str:
    return f"{holder.command or 'unknown'} (PID {holder.pid})"


def _bar(shares: Sequence[_Share], total_bytes: int | None) -> Html | None:
    if not total_bytes:
        return None
    rects = []
    left = 0.0
    for share in shares:
        width = min(_BAR * (share.size or 0) / total_bytes, _BAR - left)
        if share.css != "free" and width > 0:
            rects.append(element("rect", x=f"{left:.1f}", y="0", width=f"{width:.1f}", height="1", class_=share.css))
        left += width
    # Attributes and not styles: the page's policy allows no style in the markup.
    bar = {"viewBox": f"0 0 {_BAR} 1", "preserveAspectRatio": "none", "aria-hidden": "true", "class": "bar"}
    return element("svg", *rects, **bar)


def _legend(share: _Share) -> Html:
    return element(
        "li",
        element("span", class_=f"swatch {share.css}", aria_hidden="true"),
        element("span", share.label, class_="label", title=share.label),
        element("span", share.note, class_="note") if share.note else None,
        element("span", "unknown" if share.size is None else format_size(share.size), class_="size"),
    )


# -- events and logs --------------------------------------------------------------------------------------------------


def _event(event: Event, now: float) -> Html:
    first, _, rest = event.message.partition("\n")
    return element(
        "li",
        _clock(event.seconds, now),
        element("span", event.kind, class_=f"kind level{event.level}"),
        element("span", first, class_="message", title=rest or None),
        id=f"event-{event.cursor}",
    )


def _log(log: Log | None, now: float) -> Html:
    lines: Content = None
    if log is not None:
        lines = join(*(_line(entry, now) for entry in log.entries))
    name = "" if log is None else log.model
    note = "Choose the log of a model above." if log is None else log.problem
    return element(
        "section",
        element("h2", "Log", element("span", f" of {name}" if name else "", id="log-name"), id="log-title"),
        element("p", note or "", id="log-note", class_="empty"),
        # A reader who wants it read out goes there; a log that talks by itself is unbearable.
        element(
            "div",
            lines,
            id="log-lines",
            role="log",
            aria_live="off",
            aria_labelledby="log-title",
            tabindex="0",
            hidden=log is None,
        ),
        id="log",
        aria_labelledby="log-title",
        data_log=name or None,
    )


def _line(entry: Mapping[str, Any], now: float) -> Html:
    text = element("span", str(entry["message"]))
    return element("p", _clock(float(entry["time"]), now), " ", text, class_=f"level{entry['level']}")


# -- words ------------------------------------------------------------------------------------------------------------


def _clock(seconds: float, now: float) -> Html:
    """The time of day, and of another day the day."""
    moment = time.localtime(seconds)
    is_today = moment[:3] == time.localtime(now)[:3]
    return element(
        "time",
        time.strftime("%H:%M:%S" if is_today else "%d %b %H:%M", moment),
        datetime=time.strftime("%Y-%m-%dT%H:%M:%S%z", moment),
        title=time.strftime("%Y-%m-%d %H:%M:%S %Z", moment),
    )


def _since(then: float, now: float) -> Html:
    return element("span", duration(now - then), data_since=f"{then:.3f}")


def _until(then: float, now: float) -> Html:
    return element("span", duration(then - now), data_until=f"{then:.3f}")


def duration(seconds: float) -> str:
    """Seconds to the minute, then minutes to the hour, and so on; a moment if it is none. As page.js has it."""
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
