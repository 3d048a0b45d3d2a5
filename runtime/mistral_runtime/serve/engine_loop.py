"""The loop of the engine process: messages in, one step for everybody, messages out.

Between two steps it reads its inbox, so a request waits for one step at most and a cancelled one computes none any
more. Who runs is `seats.py`'s to decide, what a step holds `step_work.py`'s, what comes of it `token_rows.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from mistral_runtime.errors import BadRequest, MistralRuntimeError
from mistral_runtime.lookup import LookupMode
from mistral_runtime.serve.answer import Answer, Embedding, Writing
from mistral_runtime.serve.caches import CacheMaker
from mistral_runtime.serve.constraints import Constraint, Constraints
from mistral_runtime.serve.embedding import unit_vector
from mistral_runtime.serve.intake import needed_positions
from mistral_runtime.serve.protocol import (
    Cancel,
    Drain,
    Embed,
    Embedded,
    FinishReason,
    Generate,
    Message,
    Scored,
    Stats,
    Step,
)
from mistral_runtime.serve.scheduler import Limits
from mistral_runtime.serve.seats import Seats
from mistral_runtime.serve.step_work import StepResult, StepWorker
from mistral_runtime.serve.token_rows import Chosen, choose_tokens, score_chunk

STATS_SECONDS = 1.0


@dataclass(frozen=True)
class Compiled:
    """The grammar of an answer is ready, or was refused."""

    answer: Writing
    result: Constraint | MistralRuntimeError


Inbox: TypeAlias = "SimpleQueue[Message | Compiled]"


@dataclass
class Totals:
    """What was done since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class EngineLoop:
    """All answers under way, and the steps that carry them on.

    With `limits.deterministic` an answer has the same bits alone and in company, on the CPU in bfloat16. A decode row
    gets the same from the row kernels whatever lies beside it, up to MAX_ROWS of them in a product, and no product of
    decode rows has more. Products with more rows go through oneDNN, whose order of summation depends on their number;
    so prompts are cut at multiples of a fixed size from position 0 on, and no chunk ever shares a product with anybody:
    its shape depends on its prompt alone. What a cache brings along was computed in the same whole chunks, or is
    computed anew. Attention and everything between the products treat each position by itself. Where there are no row
    kernels, each sequence is computed alone.

    Args:
        inbox: Where messages come from, put there by any thread.
        emit: Called with everything there is to tell, in order; must not block for long.
        constraints: Builds grammars; None refuses requests that have one.
        eos_id: What ends an answer whose grammar allows it to end.
    """

    def __init__(
        self,
        limits: Limits,
        caches: CacheMaker,
        *,
        inbox: Inbox,
        emit: Callable[[Message], None],
        lookup: LookupMode = "off",
        constraints: Constraints | None = None,
        eos_id: int | None = None,
    ) -> None:
        self._inbox = inbox
        self.totals = Totals()
        self._caches = caches
        self._seats = Seats(limits, caches)
        self._worker = StepWorker(caches.model, deterministic=limits.deterministic, static=caches.static)
        self._emit = emit
        self._lookup: LookupMode = lookup if self._worker.may_guess else "off"
        self._constraints = constraints
        self._eos_id = eos_id
        self._compiling: dict[str, Writing] = {}
        self._arrivals = 0
        self._is_draining = False
        self._told: Stats | None = None
        self._told_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._seats and not self._compiling

    @property
    def has_nothing_to_compute(self) -> bool:
        """Whether only a message can bring anything on."""
        return len(self._seats) == 0

    def run(self) -> None:
        """Serve until told to drain and everything is answered."""
        while not (self._is_draining and self.is_idle):
            self.turn(wait=self.has_nothing_to_compute)

    def turn(self, *, wait: bool) -> None:
        """Read what has come and compute one step; with `wait`, something comes first."""
        self._read(wait=wait)
        self.totals.cached_tokens += sum(answer.cached for answer in self._seats.admit())
        plan = self._seats.plan()
        if plan.decode or plan.prefill:
            decode = [answer for answer in self._seats.answers(plan.decode) if isinstance(answer, Writing)]
            counts = [count for _, count in plan.prefill]
            prompts = list(zip(self._seats.answers(key for key, _ in plan.prefill), counts, strict=True))
            self._deliver(decode, prompts, self._worker.compute(decode, prompts))
            self.totals.steps += 1
        self._tell_stats()

    def _read(self, *, wait: bool) -> None:
        if wait:
            self._take(self._inbox.get())
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                return
            self._take(message)

    def _take(self, message: Message | Compiled) -> None:
        if isinstance(message, Cancel):
            self._cancel(message.id)
        elif isinstance(message, Drain):
            self._is_draining = True
        elif isinstance(message, Compiled):
            self._take_compiled(message)
        elif isinstance(message, Generate | Embed):
            try:
                self._begin(message)
            except MistralRuntimeError as error:
                self._emit(Answer(message, 0).finished("error", error))

    def _begin(self, request: Generate | Embed) -> None:
        self._arrivals += 1
        needed_positions(request, self._caches.model.config, self._caches.context)
        if request.id in self._seats or request.id in self._compiling:
            raise BadRequest("the id is in use", detail=f"expected a new id, found {request.id}", hint="choose another")
        if isinstance(request, Embed):
            self._seats.enqueue(Embedding(request, self._arrivals))
            return
        answer = Writing(request, self._arrivals, self._lookup)
        if request.grammar is None:
            self._seats.enqueue(answer)
            return
        if self._constraints is None:
            raise BadRequest("grammars are not built here", detail="expected none, found one", hint="leave it out")
        self._compiling[answer.key] = answer
        self._constraints.compile(request.grammar, lambda result: self._inbox.put(Compiled(answer, result)))

    def _take_compiled(self, message: Compiled) -> None:
        answer, result = message.answer, message.result
        if self._compiling.get(answer.key) is not answer:
            return  # cancelled meanwhile
        del self._compiling[answer.key]
        try:
            if isinstance(result, MistralRuntimeError):
                raise result
            answer.constraint = result
            self._seats.enqueue(answer)
        except MistralRuntimeError as error:
            self._emit(answer.finished("error", error))

    def _cancel(self, key: str) -> None:
        if (compiling := self._compiling.pop(key, None)) is not None:
            self._emit(compiling.finished("cancelled"))
        elif (answer := self._seats.get(key)) is not None:
            self._finish(answer, "cancelled")

    def _deliver(self, decode: Sequence[Writing], prompts: Sequence[tuple[Answer, int]], step: StepResult) -> None:
        """Turn a step's logits into tokens and say what there is to say."""
        ready = list(decode)
        for answer, count in prompts:
            if self._carry_prompt(answer, count, step) and isinstance(answer, Writing):
                ready.append(answer)
        chosen = choose_tokens(
            [(answer, step.rows[answer.key][-1 - len(answer.draft) :]) for answer in ready], eos_id=self._eos_id
        )
        for one in chosen:
            self._settle_guess(one, seconds=None if prompts else step.seconds)
        if tokens := [token for one in chosen for token in one.tokens]:
            self._emit(Step(tokens))
            self.totals.generated_tokens += len(tokens)
        for one in chosen:
            if one.reason is not None:
                self._finish(one.answer, one.reason, one.error)

    def _carry_prompt(self, answer: Answer, count: int, step: StepResult) -> bool:
        """Take in a chunk of a prompt; say whether an answer's first token is to be chosen now."""
        first = answer.computed
        self._seats.note_computed(answer, count)
        self.totals.prompt_tokens += count
        is_whole = answer.computed == answer.prompt_tokens
        try:
            if isinstance(answer, Embedding):
                if is_whole:
                    self._tell_embedding(answer)
                return False
            assert isinstance(answer, Writing)
            score_chunk(answer, step.rows[answer.key], first)
        except MistralRuntimeError as error:
            self._finish(answer, "error", error)
            return False
        if is_whole and answer.scores is not None:
            self._emit(Scored(answer.key, answer.scores.logprobs, answer.scores.top))
        if is_whole and answer.request.max_new_tokens == 0:
            self._finish(answer, "length")
            return False
        return is_whole

    def _tell_embedding(self, answer: Embedding) -> None:
        assert answer.total is not None
        self._emit(Embedded(answer.key, unit_vector(answer.total)))
        self._finish(answer, "stop")

    def _settle_guess(self, chosen: Chosen, *, seconds: float | None) -> None:
        """Take wrong guesses out of the cache; a step that computed prompts too says nothing about their cost."""
        answer = chosen.answer
        assert answer.slot is not None
        answer.slot.note_length()
        answer.slot.cache.rewind(len(answer.draft) - chosen.accepted)
        if seconds is not None:
            answer.pace.note(drafted=len(answer.draft), accepted=chosen.accepted, seconds=seconds)
        answer.draft = []

    def _finish(self, answer: Answer, reason: FinishReason, error: MistralRuntimeError | None = None) -> None:
        self._seats.release(answer, keep_cache=error is None)
        self._emit(answer.finished(reason, error))

    def _tell_stats(self) -> None:
        told, now = self._told, time.perf_counter()
        stats = Stats(
            self._seats.running,
            self._seats.waiting + len(self._compiling),
            self._seats.promised,
            self._seats.cache_positions,
            self.totals.steps,
            self.totals.prompt_tokens,
            self.totals.cached_tokens,
            self.totals.generated_tokens,
        )
        has_changed = told is None or (told.running, told.waiting) != (stats.running, stats.waiting)
        if has_changed or (now - self._told_at >= STATS_SECONDS and stats != told):
            self._told, self._told_at = stats, now
            self._emit(stats)
