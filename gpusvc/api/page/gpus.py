"""The section of the GPUs on the status page: a bar for each GPU, and who holds what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpusvc.api.page.html import Content, Html, element
from gpusvc.quantity import format_size
from gpusvc.status.gpus import GpuStatus, Holder

_BAR = 1000


@dataclass(frozen=True, slots=True)
class _Share:
    """A part of a GPU's memory and its holder. ``size`` in bytes, or None if unknown."""

    label: str
    size: int | None
    css: str
    note: str | None = None


def gpu(status: GpuStatus, hues: Mapping[str, int]) -> Html:
    gpu = status.gpu
    shares = list(_shares(status, hues))
    # The legend says the same as text, so screen readers skip the picture.
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
    # Attributes instead of styles: the page's policy allows no style in the markup.
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
