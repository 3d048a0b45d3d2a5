"""How an answer is shown: as it is, or with markdown as a terminal's styles."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Protocol

from mistral_runtime.chat.markdown import DIM, RESET, MarkdownStream
from mistral_runtime.terminal import escape_controls, write_err, write_escaped, write_out


class Screen(Protocol):
    """Where one answer after the other goes."""

    def show(self, text: str) -> None:
        """Show the next piece of an answer."""

    def end(self) -> None:
        """End the answer, on a line of its own."""

    def remark(self, text: str) -> None:
        """Show a line that is not the model's."""


class PlainScreen:
    """The text as the model wrote it; on a terminal its control characters are written out."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, text: str) -> None:
        """Write the text and flush."""
        self._last = text or self._last
        write_out(text)

    def end(self) -> None:
        """End the line if the answer did not."""
        write_out("" if self._last.endswith("\n") else "\n")
        self._last = ""

    def remark(self, text: str) -> None:
        """Write the line to stderr."""
        write_err(text)


class StyledScreen:
    """Markdown as bold, italic and colour, written once and never again."""

    def __init__(self) -> None:
        self._markdown = MarkdownStream()
        self._is_line_open = True

    def show(self, text: str) -> None:
        """Write what the text lets be shown."""
        self._is_line_open = not text.endswith("\n")
        write_escaped(self._markdown.feed(escape_controls(text)))

    def end(self) -> None:
        """Write what was held back, styles off, and end the line."""
        write_escaped(self._markdown.finish() + "\n" * self._is_line_open)
        self._is_line_open = True

    def remark(self, text: str) -> None:
        """Write the line to stderr, dimmed."""
        write_err(f"\x1b[{DIM}m{escape_controls(text)}{RESET}")


def choose_screen(*, is_plain: bool, environment: Mapping[str, str] = os.environ) -> Screen:
    """Return styles where both streams are a terminal that knows them and nobody has refused them."""
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if is_plain or not is_terminal or environment.get("NO_COLOR") or environment.get("TERM", "dumb") == "dumb":
        return PlainScreen()
    return StyledScreen()
