"""Telling what an answer says from the calls that it makes, while it comes."""

from __future__ import annotations

from typing import Literal

from mistral_runtime.serve.answering import Piece
from mistral_runtime.serve.chat_schema import ToolCall, ToolUse
from mistral_runtime.serve.tool_calls import CallScanner

Told = tuple[str, list[ToolCall]]


class ToolReader:
    """Splits one answer into text and calls.

    Args:
        use: The tools there are.
        call_token: The token behind which calls stand, for templates that have one.
    """

    def __init__(self, use: ToolUse, call_token: int | None) -> None:
        self._scanner = CallScanner(tool.name for tool in use.tools)
        self._call_token = call_token
        # Without a token for it, an answer that begins like an object may be a call; its end tells.
        self._mode: Literal["text", "calls", "unsure"] = "text"
        if use.forced:
            self._mode = "calls"
        elif use.tools and call_token is None:
            self._mode = "unsure"
        self._has_tools = bool(use.tools)
        self._held: list[str] = []
        self.calls = 0

    def feed(self, piece: Piece) -> Told:
        """Return the text to show and the calls that are complete."""
        if self._mode == "text":
            if self._has_tools and any(place.token.token == self._call_token for place in piece.tokens):
                self._mode = "calls"
            return piece.text, []
        if self._mode == "unsure":
            return self._decide(piece.text)
        self._held.append(piece.text)
        calls = self._scanner.feed(piece.text)
        self.calls += len(calls)
        return "", calls

    def finish(self) -> Told:
        """Return what is left once the answer has ended: text that turned out to be no call is text."""
        if self._mode == "unsure":
            calls = self._scanner.feed("".join(self._held).strip())
            self.calls += len(calls)
            return ("" if calls else "".join(self._held)), calls
        if self._mode == "calls" and not self.calls:
            return "".join(self._held), []
        return "", []

    def _decide(self, text: str) -> Told:
        self._held.append(text)
        so_far = "".join(self._held) if len(self._held) < 64 else "{"
        if so_far.strip() and not so_far.lstrip().startswith("{"):
            self._mode = "text"
            return so_far, []
        return "", []
