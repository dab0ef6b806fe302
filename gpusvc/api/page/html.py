"""HTML as values: every text is escaped, and only this module makes markup."""

from __future__ import annotations

from html import escape

_VOID = frozenset({"input", "link", "meta"})


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


Content = str | None
"""Html is kept, other text is escaped, and None is left out."""

Attribute = str | float | bool | None
"""True: present without a value; False and None: absent."""


def element(tag: str, /, *content: Content, **attributes: Attribute) -> Html:
    """``<tag …>…</tag>``. In attributes' names "_" stands for "-", and one at the end is left out, as in ``class_``."""
    start = "".join([tag, *(_attribute(key, value) for key, value in attributes.items())])
    return Html(f"<{start}>") if tag in _VOID else Html(f"<{start}>{join(*content)}</{tag}>")


def join(*content: Content) -> Html:
    """Return all of ``content`` in a row."""
    return Html("".join(part if isinstance(part, Html) else escape(plain(part)) for part in content if part))


def plain(text: str) -> str:
    """Return ``text`` without control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in " \n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(plain(str(value)))}"'
