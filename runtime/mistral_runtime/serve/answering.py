"""From the engine's tokens to text that may be sent: one answer as a stream of pieces.

No character is cut, no part of a stop string is shown, and every token is told together with the end of its text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from mistral_runtime.serve.api_error import engine_error
from mistral_runtime.serve.engine_port import EnginePort
from mistral_runtime.serve.protocol import Finished, Generate, Scored, Token
from mistral_runtime.text_stream import StopMatcher, StreamingDecoder
from mistral_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class End:
    """How an answer ended. `cached_tokens` is None where the answer was ended before the engine could tell."""

    reason: str
    generated_tokens: int
    stop_text: str | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class TokenPlace:
    """One token of the answer and where its text begins, counted in characters from the answer's start."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """What there is to tell next: text, the tokens whose text is complete, the prompt's scores, the end."""

    text: str = ""
    tokens: list[TokenPlace] = field(default_factory=list)
    scored: Scored | None = None
    end: End | None = None


class _Text:
    """The text so far: what was decoded, what of it may be shown, and which tokens wait for their text."""

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], min_tokens: int, strip_leading_space: bool
    ) -> None:
        self._decoder = StreamingDecoder(tokenizer, strip_leading_space=strip_leading_space)
        self.matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._decoded = 0
        self._shown = 0
        self._waiting: list[TokenPlace] = []
        self.count = 0

    def feed(self, token: Token) -> Piece:
        self.count += 1
        place = TokenPlace(token, self._decoded)
        text = self._decoder.feed(token.token)
        self._waiting.append(place)
        return self._show(text)

    def flush(self) -> Piece:
        last = self._show(self._decoder.flush())
        held = self.matcher.flush()
        self._shown += len(held)
        waiting, self._waiting = self._waiting, []
        return Piece(last.text + held, last.tokens + waiting)

    def _show(self, text: str) -> Piece:
        self._decoded += len(text)
        # Up to min_tokens a stop string is text like any other.
        shown = text if self.count <= self._min_tokens else self.matcher.feed(text)
        self._shown += len(shown)
        return Piece(shown, list(self._release()))

    def _release(self) -> Iterator[TokenPlace]:
        """Give the tokens whose text is shown whole; once a stop string is found, those that began before it."""
        stopped = self.matcher.matched is not None
        while self._waiting:
            ends = self._waiting[1].offset if len(self._waiting) > 1 else self._decoded
            begins = self._waiting[0].offset
            if not (begins < self._shown if stopped else ends <= self._shown):
                break
            yield self._waiting.pop(0)


async def answer(
    engine: EnginePort, request: Generate, tokenizer: Tokenizer, stops: tuple[str, ...], *, strip_leading_space: bool
) -> AsyncGenerator[Piece, None]:
    """Give one answer piece by piece; the last has an `end`. Closing it early ends the computing.

    Raises:
        ApiError: The engine ended it with an error.
        EngineUnavailable: There is no engine.
        QueueFull: Too many wait.
    """
    text = _Text(tokenizer, stops, request.min_tokens, strip_leading_space)
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                piece = text.feed(event)
                if piece.text or piece.tokens:
                    yield piece
                if text.matcher.matched is not None:
                    yield Piece(end=End("stop", text.count, text.matcher.matched))
                    return
            elif isinstance(event, Scored):
                yield Piece(scored=event)
            else:
                yield text.flush()
                yield Piece(end=_end(event, text.count))
                return


def _end(event: Finished, count: int) -> End:
    if event.reason in ("stop", "length"):
        return End(event.reason, count, cached_tokens=event.cached_tokens)
    raise engine_error(event.error)
