"""One answer under way in the engine: what was asked, what came of it so far, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from mistral_runtime.errors import MistralRuntimeError
from mistral_runtime.lookup import DraftPace, LookupMode, PromptLookup
from mistral_runtime.serve.choose import Chooser
from mistral_runtime.serve.constraints import Constraint
from mistral_runtime.serve.idle_caches import CacheSlot
from mistral_runtime.serve.protocol import Embed, Finished, FinishReason, Generate


def error_fields(error: MistralRuntimeError) -> dict[str, str]:
    """Return an error as `Finished` tells it."""
    return {"kind": type(error).__name__, "what": error.what, "detail": error.detail, "hint": error.hint}


@dataclass
class Clock:
    """When an answer was asked for, admitted and begun, in seconds of `time.perf_counter`."""

    asked: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None


@dataclass
class Scores:
    """Log probabilities of a prompt's tokens so far."""

    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)


class Answer:
    """What both kinds of requests have in common: a prompt that is computed chunk by chunk.

    Attributes:
        ids: The prompt, and behind it the answer so far.
        slot: Its cache, once it runs.
        computed: How much of the prompt is in the cache.
        cached: How much of it was there already.
        draft: The guess that goes into the next step behind the newest token.
    """

    def __init__(self, request: Generate | Embed, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.ids = list(request.prompt)
        self.prompt_tokens = len(request.prompt)
        self.slot: CacheSlot | None = None
        self.computed = 0
        self.cached = 0
        self.clock = Clock()

    @property
    def key(self) -> str:
        """The caller's name for it."""
        return self.request.id

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.prompt_tokens

    def finished(self, reason: FinishReason, error: MistralRuntimeError | None = None) -> Finished:
        """Return what is said at the end."""
        now, clock = time.perf_counter(), self.clock
        admitted = now if clock.admitted is None else clock.admitted
        first = max(admitted, now if clock.first_token is None else clock.first_token)
        return Finished(
            self.key,
            reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached,
            generated_tokens=self.generated,
            queue_seconds=admitted - clock.asked,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            error=None if error is None else error_fields(error),
        )


class Writing(Answer):
    """An answer of tokens."""

    request: Generate

    def __init__(self, request: Generate, arrival: int, lookup: LookupMode) -> None:
        super().__init__(request, arrival)
        self.chooser = Chooser(request)
        self.constraint: Constraint | None = None
        self.scores = None if request.prompt_logprobs is None else Scores()
        self.draft: list[int] = []
        self.pace = DraftPace(lookup)
        self._stop_ids = frozenset(request.stop_ids)
        self._lookup = None if lookup == "off" else PromptLookup()

    def guess(self, most: int) -> list[int]:
        """Return up to `most` ids that may come after the newest; none where a grammar decides."""
        if self._lookup is None or self.constraint is not None:
            return []
        for token in self.ids[len(self._lookup) :]:
            self._lookup.append(token)
        room = self.request.max_new_tokens - self.generated - 1
        return self._lookup.propose(min(self.pace.limit(), room, most))

    def is_stop(self, token: int, eos_id: int | None) -> bool:
        """Say whether a token ends the answer without being part of it."""
        if self.constraint is not None and token == eos_id:
            return True
        return token in self._stop_ids and self.generated >= self.request.min_tokens

    def note(self, token: int) -> None:
        """Add a token to the answer.

        Raises:
            BadRequest: The grammar's limits were reached.
        """
        self.ids.append(token)
        self.chooser.note(token)
        if self.clock.first_token is None:
            self.clock.first_token = time.perf_counter()
        if self.constraint is not None:
            self.constraint.advance(token)

    @property
    def reason(self) -> FinishReason | None:
        """Why the answer is at its end, if it is."""
        if self.constraint is not None and self.constraint.is_complete:
            return "stop"
        return "length" if self.generated >= self.request.max_new_tokens else None


class Embedding(Answer):
    """An embedding: the sum of what the last layer gave so far, (dim) in float32."""

    request: Embed

    def __init__(self, request: Embed, arrival: int) -> None:
        super().__init__(request, arrival)
        self.total: Tensor | None = None
