"""Markdown to a terminal's own styles, as the text comes: what has been written is never painted again.

Owns the state of one answer. Expects text without control characters but line break and tab, and adds none but the
SGR sequences below (ECMA-48, section 8.3.117).
"""

from __future__ import annotations

import re

RESET = "\x1b[0m"
BOLD, DIM, ITALIC, CODE = "1", "2", "3", "36"

# What a line may turn out to begin with, while it is still too short to tell.
_MAYBE_BLOCK = re.compile(r"[ \t]*(#{1,6}|[-*+]|\d{1,9}[.)]?|>|`+|-{2,}|\*{2}|_{2,})?$")
_FENCE = re.compile(r"[ \t]*(`{3,})[^`]*$")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_ITEM = re.compile(r"([ \t]*)[-*+][ \t]+")
_QUOTE = re.compile(r" {0,3}> ?")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$")
_RULE_WIDTH = 40


class MarkdownStream:
    """Style text piece by piece. Marks that never close end with their line, so one stray star styles one line."""

    def __init__(self) -> None:
        self._head: str | None = ""  # the line's beginning while its kind is open; None once it is known
        self._held = ""  # a star or backtick whose meaning depends on the next character
        self._fence = ""  # the backticks that opened the code block we are in
        self._is_info = False  # on the line that opens a code block
        self._line: list[str] = []  # styles of the whole line
        self._inline: list[str] = []  # styles that a mark has switched on
        self._before = " "

    def feed(self, text: str) -> str:
        """Return what can be shown of the text so far."""
        return "".join(map(self._character, text))

    def finish(self) -> str:
        """Return what was held back, all styles off."""
        shown = self._open_line(self._head or "") + self._release("\n")
        styled = bool(self._line or self._inline or self._fence)
        self.__init__()  # type: ignore[misc]
        return shown + (RESET if styled else "")

    def _character(self, character: str) -> str:
        if character == "\n":
            return self._end_line()
        if self._head is None:
            return self._inside(character)
        self._head += character
        if self._may_change(self._head):
            return ""
        return self._open_line(self._head)

    def _may_change(self, head: str) -> bool:
        """Say whether more of the line could still make it another kind of line."""
        if self._fence:
            return not head.strip(" \t`")
        return bool(_MAYBE_BLOCK.match(head)) or bool(_RULE.match(head))

    def _open_line(self, head: str) -> str:
        """Return the line's beginning, styled as the kind that it has turned out to be."""
        self._head = None
        if self._fence:
            return self._styled(head)
        if match := _FENCE.match(head):
            self._fence, self._is_info = match[1], True
            self._line = [DIM]
            return self._styled(head)
        for pattern, styles, mark in ((_HEADING, [BOLD], ""), (_QUOTE, [DIM], "│ ")):
            if match := pattern.match(head):
                self._line = styles
                return self._styled(mark) + self._inner(head[match.end() :])
        if match := _ITEM.match(head):
            return f"{match[1]}• {self._inner(head[match.end() :])}"
        return self._inner(head)

    def _end_line(self) -> str:
        head, shown = self._head, ""
        if head is not None and self._fence and _closes(head, self._fence):
            self._fence, self._line, shown = "", [], f"{RESET}\x1b[{DIM}m{head}"
        elif head and not self._fence and _RULE.match(head):
            shown = f"\x1b[{DIM}m{'─' * _RULE_WIDTH}"
            self._inline = [DIM]
        elif head is not None:
            shown = self._open_line(head)
        shown += self._release("\n")
        was_styled = bool(self._line or self._inline or self._fence or RESET in shown)
        self._head, self._line, self._inline, self._before, self._is_info = "", [], [], " ", False
        if self._fence:
            self._line = [CODE]
        return f"{shown}{RESET}\n" if was_styled else f"{shown}\n"

    def _inner(self, text: str) -> str:
        return "".join(map(self._inside, text))

    def _inside(self, character: str) -> str:
        """Return one character of a line whose kind is known, or the style that it switches."""
        if self._is_info or self._fence:
            return character
        is_code = CODE in self._inline
        if character == "`" or (character == "*" and not is_code):
            if self._held and self._held[0] != character:
                return self._release(character) + self._hold(character)
            return self._hold(character)
        shown = self._release(character)
        self._before = character
        return shown + character

    def _hold(self, character: str) -> str:
        self._held += character
        return ""

    def _release(self, following: str) -> str:
        """Return what the marks held back mean, now that the next character is known."""
        held, self._held = self._held, ""
        if not held:
            return ""
        style = CODE if held[0] == "`" else {1: ITALIC, 2: BOLD}.get(len(held))
        if style in self._inline and (style == CODE or not self._before.isspace()):
            self._inline.remove(style)
            return RESET + self._styled("")
        opens = style == CODE or not (following.isspace() or self._before.isalnum())
        if style is None or not opens or following == "\n":
            self._before = held[-1]
            return held
        self._inline.append(style)
        return f"\x1b[{style}m"

    def _styled(self, text: str) -> str:
        styles = [*self._line, *self._inline]
        return (f"\x1b[{';'.join(styles)}m" if styles else "") + text


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    return len(bare) >= len(fence) and set(bare) == {"`"}
