"""Progress of a waiting command: changing lines on a terminal, elsewhere a new line for each change."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TextIO

from gpusvc.printable import printable

_NUMBERS = re.compile(r"[0-9][0-9.:]*( [KMGTP]?i?B\b)?")


class Progress:
    """A context manager. Call ``show()`` as often as you like; it leaves no line on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._lines = 0
        self._told: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def show(self, sentences: Mapping[str, str]) -> None:
        """Show one sentence for each model, by name."""
        if self._live:
            self._draw(sentences)
            return
        for name, sentence in sentences.items():
            # A log needs the line once, not with a new number every second.
            gist = _NUMBERS.sub("#", sentence)
            if sentence and self._told.get(name) != gist:
                self._told[name] = gist
                self._stream.write(f"{name}: {printable(sentence)}\n")
                self._stream.flush()

    def clear(self) -> None:
        """Erase the lines, so that something else may be printed."""
        if self._lines:
            self._stream.write(f"\x1b[{self._lines}F\x1b[J")
            self._stream.flush()
            self._lines = 0

    def _draw(self, sentences: Mapping[str, str]) -> None:
        import shutil  # noqa: PLC0415  loaded by typer anyhow, but that is its business

        size = shutil.get_terminal_size()
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        lines = [f"{name}  {minutes}:{seconds:02}  {printable(text)}" for name, text in sentences.items()]
        # Lines beyond the screen could not be redrawn.
        lines = [line[: size.columns - 1] for line in lines[: max(1, size.lines - 1)]]
        start = f"\x1b[{self._lines}F\x1b[J" if self._lines else ""
        self._stream.write(start + "".join(line + "\n" for line in lines))
        self._stream.flush()
        self._lines = len(lines)
