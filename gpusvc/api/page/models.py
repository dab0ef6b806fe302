"""The section of the models on the status page: values in, markup out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from gpusvc.api.page.clock import since, until
from gpusvc.api.page.html import Content, Html, element
from gpusvc.api.page.moment import Facts
from gpusvc.quantity import format_size
from gpusvc.status.models import ModelState, ModelStatus

# Relative, so that all of it works below a prefix of a front proxy, too.
_MODELS = "gpusvc/models"

_ORDER = (
    ModelState.READY,
    ModelState.STARTING,
    ModelState.STOPPING,
    ModelState.STUCK,
    ModelState.FAILED,
    ModelState.STOPPED,
)
_IN_MOTION = frozenset({ModelState.STARTING, ModelState.STOPPING})


def summary(models: Sequence[ModelStatus]) -> str:
    counts = Counter(model.state for model in models)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def model(model: ModelStatus, all_facts: Mapping[str, Facts], hues: Mapping[str, int], now: float) -> Html:
    name, state = model.name, model.state
    key = quote(name, safe="")
    facts, hue = all_facts.get(name, Facts()), hues[name]
    described = facts.description if facts.description != name else None
    # The status text of a ready model is its address, which clients of the gateway do not need.
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
    """Return whether the model is in use, or since when it is idle and when it will be unloaded."""
    standing = model.standing
    if model.state in _IN_MOTION and model.since is not None:
        yield "for "
        yield since(model.since, now)
        return
    if model.state is not ModelState.READY or standing is None:
        return
    if standing.in_use:
        yield element("span", "in use", class_="busy")
    elif standing.in_use is False and standing.last_use is not None:
        yield "idle for "
        yield since(standing.last_use, now)
        if standing.pinned:
            return  # the button says so
        timeout_seconds = standing.idle_timeout_seconds if standing.is_kept_by_client else facts.idle_timeout_seconds
        if timeout_seconds == 0:
            yield ", stays loaded"
        elif timeout_seconds is not None:
            yield ", unloads in "
            yield until(standing.last_use + timeout_seconds, now)


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
            # The attribute disabled would take the focus away.
            aria_disabled="true" if disabled else None,
        ),
        method="post",
        action=f"{_MODELS}/{key}/{action}",
        data_question=question,
    )
