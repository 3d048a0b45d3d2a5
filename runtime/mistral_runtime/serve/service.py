"""What every route stands on: the engine, the model, the numbers that are counted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mistral_runtime.serve.answering import End, Piece, answer
from mistral_runtime.serve.engine_port import EnginePort, EngineUnavailable
from mistral_runtime.serve.event_stream import KEEP_ALIVE_SECONDS
from mistral_runtime.serve.metrics import Metrics
from mistral_runtime.serve.protocol import Generate, Ready
from mistral_runtime.serve.served_model import ServedModel


@dataclass
class Service:
    """One served model."""

    engine: EnginePort
    model: ServedModel
    metrics: Metrics
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    is_draining: bool = field(default=False)

    def require_ready(self) -> Ready:
        """Return what the engine said when it had loaded.

        Raises:
            EngineUnavailable: It cannot answer now.
        """
        if self.is_draining:
            raise EngineUnavailable("the server is about to end")
        if self.engine.state != "ready" or self.engine.ready is None:
            raise EngineUnavailable(f"it is {self.engine.state}")
        return self.engine.ready

    def answer(
        self, request: Generate, stops: tuple[str, ...], *, strip_leading_space: bool
    ) -> AsyncGenerator[Piece, None]:
        """Give one answer, see `answering.answer`, and count it."""
        pieces = answer(self.engine, request, self.model.tokenizer, stops, strip_leading_space=strip_leading_space)
        return self.metrics.watch(pieces, prompt_tokens=len(request.prompt))


def service_of(request: Request) -> Service:
    """Return the service that a request belongs to."""
    service: Service = request.app.state.service
    return service


def usage(prompt_tokens: int, ends: list[End]) -> dict[str, Any]:
    """Return OpenAI's `usage`. How much of the prompt was computed before is left out where nobody knows."""
    generated = sum(end.generated_tokens for end in ends)
    told: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }
    cached = [end.cached_tokens for end in ends if end.cached_tokens is not None]
    if cached and len(cached) == len(ends):
        told["prompt_tokens_details"] = {"cached_tokens": min(cached[0], prompt_tokens)}
    return told


def note_usage(request: Request, told: dict[str, Any]) -> None:
    """Leave the counts for the access log."""
    request.scope["mistral_usage"] = (told["prompt_tokens"], told["completion_tokens"])


def now() -> int:
    """Return the time as OpenAI's `created` has it: whole seconds since 1970."""
    return int(time.time())
