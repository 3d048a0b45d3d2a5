"""Where questions come from: lines of a pipe, or of a terminal with editing and history.

Owns what makes several lines one message: three quotes on a line of their own before and after, or a backslash at a
line's end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mistral_runtime.chat.history import HistoryFile, history_path
from mistral_runtime.errors import BadRequest
from mistral_runtime.terminal import MAX_PROMPT_BYTES, decode_input, write_err

QUOTES = '"""'
PROMPT, MORE = "> ", ". "


class LineSource(Protocol):
    """Gives one line after the other, without its line break; None at the end of input."""

    def line(self, prompt: str) -> str | None:
        """Return the next line. Raises BadRequest for one that is not UTF-8, Interrupted for a signal."""


@dataclass(frozen=True)
class Typed:
    """One message; `is_quoted` ones are never commands."""

    text: str
    is_quoted: bool = False


def read_message(source: LineSource) -> Typed | None:
    """Return the next message, None at the end of input. What the end of input leaves open counts as closed.

    Raises:
        BadRequest: Not UTF-8, or absurdly long.
    """
    line = source.line(PROMPT)
    if line is None:
        return None
    if line.strip() == QUOTES:
        return Typed(_until_quotes(source), is_quoted=True)
    lines, size = [line], len(line)
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        following = source.line(MORE)
        if following is None:
            break
        lines.append(following)
        size = _require_size(size + len(following))
    return Typed("\n".join(lines).strip(), is_quoted=len(lines) > 1)


def _until_quotes(source: LineSource) -> str:
    lines: list[str] = []
    size = 0
    while (line := source.line(MORE)) is not None and line.strip() != QUOTES:
        lines.append(line)
        size = _require_size(size + len(line) + 1)
    return "\n".join(lines).strip()


def _require_size(size: int) -> int:
    if size > MAX_PROMPT_BYTES:
        raise BadRequest(
            "the message is too long",
            detail=f"expected at most {MAX_PROMPT_BYTES} characters, found more",
            hint="shorten it",
        )
    return size


class PipedLines:
    """Lines of standard input as it is. On a terminal whose output goes elsewhere the prompt is on stderr."""

    def line(self, prompt: str) -> str | None:
        """Return the next line, None at the end."""
        if sys.stdin.isatty():
            sys.stderr.write(prompt)
            sys.stderr.flush()
        data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES)
        return decode_input(data).removesuffix("\n").removesuffix("\r") if data else None


class EditedLines:
    """Lines typed at a terminal, with what the readline library offers: editing, arrow keys, search, completion."""

    def __init__(self, commands: Sequence[str], history: HistoryFile | None) -> None:
        import readline

        self._readline, self._history = readline, history
        # Whatever the locale says, a terminal of today sends UTF-8; what is not is refused with its own words.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        readline.set_auto_history(False)
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, state: _completions(text, commands)[state])
        readline.parse_and_bind("tab: complete")
        for line in history.read() if history else ():
            readline.add_history(line)

    def line(self, prompt: str) -> str | None:
        """Return the next line, None for Ctrl-D on an empty one."""
        try:
            text = input(prompt)
        except EOFError:
            sys.stderr.write("\n")
            return None
        text = decode_input(text.encode("utf-8", "surrogateescape"))
        if text.strip():
            self._remember(text)
        return text

    def _remember(self, text: str) -> None:
        self._readline.add_history(text)
        if self._history and (problem := self._history.add(text)):
            self._history = None
            write_err(f"(what you type is not kept: {problem})")


def _completions(text: str, commands: Sequence[str]) -> list[str | None]:
    return [*(name for name in commands if text.startswith("/") and name.startswith(text)), None]


def open_lines(commands: Sequence[str], *, keeps_history: bool) -> LineSource:
    """Return editing where a person types and sees it, plain lines otherwise."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PipedLines()
    try:
        return EditedLines(commands, HistoryFile(history_path(os.environ)) if keeps_history else None)
    except ImportError:  # Python may be built without it
        return PipedLines()
