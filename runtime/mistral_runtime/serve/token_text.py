"""Single tokens and their log probabilities as OpenAI's two shapes tell them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mistral_runtime.serve.answering import TokenPlace
from mistral_runtime.serve.protocol import Token
from mistral_runtime.tokenizer import Tokenizer

# JSON has no infinity; this is what OpenAI and vLLM tell for a token that could not come.
IMPOSSIBLE = -9999.0


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text: a byte that is no character by itself, and a control token, as the vocabulary writes it.

    So different tokens have different texts, as far as the vocabulary has.
    """
    data = tokenizer.token_bytes(token)
    try:
        return data.decode() or tokenizer.piece(token)
    except UnicodeDecodeError:
        return tokenizer.piece(token)


def chat_logprobs(tokenizer: Tokenizer, places: Iterable[TokenPlace], top: int) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice."""
    return {"content": [_chat_token(tokenizer, place.token, top) for place in places], "refusal": None}


def _chat_token(tokenizer: Tokenizer, token: Token, top: int) -> dict[str, Any]:
    told = _told(tokenizer, token.token, token.logprob)
    return {**told, "top_logprobs": [_told(tokenizer, other, logprob) for other, logprob in token.top[:top]]}


def _told(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": IMPOSSIBLE if logprob is None else max(logprob, IMPOSSIBLE),
        "bytes": list(tokenizer.token_bytes(token)),
    }


class LegacyLogprobs:
    """The `logprobs` of a completion choice: four lists of equal length."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(self, token: int, logprob: float | None, top: list[tuple[int, float]] | None, offset: int) -> None:
        """Append one token; the first of a prompt has neither logprob nor alternatives."""
        text = token_text(self._tokenizer, token)
        self.tokens.append(text)
        self.token_logprobs.append(None if logprob is None else max(logprob, IMPOSSIBLE))
        self.top_logprobs.append(None if top is None else self._alternatives(text, logprob, top))
        self.text_offset.append(offset)

    def _alternatives(self, text: str, logprob: float | None, top: list[tuple[int, float]]) -> dict[str, float]:
        told: dict[str, float] = {}
        for other, value in top[: self._top]:
            # Two tokens with one text: the likelier came first.
            told.setdefault(token_text(self._tokenizer, other), max(value, IMPOSSIBLE))
        if logprob is not None:
            told.setdefault(text, max(logprob, IMPOSSIBLE))
        return told

    def add_answer(self, places: Iterable[TokenPlace], offset: int) -> None:
        """Append tokens of an answer whose text begins at `offset`."""
        for place in places:
            self.add(place.token.token, place.token.logprob, place.token.top, offset + place.offset)

    def body(self) -> dict[str, Any]:
        """Return the object."""
        return {
            "text_offset": self.text_offset,
            "token_logprobs": self.token_logprobs,
            "tokens": self.tokens,
            "top_logprobs": self.top_logprobs,
        }
