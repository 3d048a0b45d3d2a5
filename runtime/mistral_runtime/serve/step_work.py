"""One step for everybody whose turn it is: prompts' chunks, newest tokens, and guesses where rows are to spare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mistral_runtime.batched_step import Segment, batched_step
from mistral_runtime.gpu.static_cache import SlotCache
from mistral_runtime.gpu.static_step import MAX_BATCH, StaticStep
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.serve.answer import Answer, Embedding, Writing
from mistral_runtime.serve.embedding import summed_states
from mistral_runtime.serve.row_groups import Work, groups_of_rows, rows_are_independent
from mistral_runtime.transformer import Transformer

# As many rows as are still bound by memory on a CPU; see `lookup.MAX_DRAFT`.
MAX_GUESSING_ROWS = 16


@dataclass(frozen=True)
class StepResult:
    """The logits of each answer that computed any, by its name, and the seconds it took."""

    rows: dict[str, Tensor]
    seconds: float


class StepWorker:
    """Compute steps with one model. How rows share products is told in `engine_loop.EngineLoop`."""

    def __init__(self, model: Transformer, *, deterministic: bool, static: StaticStep | None = None) -> None:
        self._model = model
        self._static = static
        self._deterministic = deterministic
        self._independent = rows_are_independent(model)
        # A step with guesses has no static shape, and costs more than they save where static steps are worth having.
        self.may_guess = static is None and (self._independent or not deterministic)

    def compute(self, decode: Sequence[Writing], prompts: Sequence[tuple[Answer, int]]) -> StepResult:
        """Append to every sequence what the step holds for it.

        Args:
            prompts: The answers whose prompts are carried on, and by how many positions.
        """
        started = time.perf_counter()
        if self._static is not None and not prompts and (slots := _slots(decode)):
            return StepResult(_static_rows(self._static, decode, slots), time.perf_counter() - started)
        works = self._decode_work(decode, may_guess=self.may_guess and not prompts)
        chunks = [_chunk_work(answer, count) for answer, count in prompts if isinstance(answer, Writing)]
        rows: dict[str, Tensor] = {}
        for group in groups_of_rows(works, chunks, deterministic=self._deterministic, independent=self._independent):
            logits = batched_step(self._model, [work.segment for work in group])
            rows |= {work.answer.key: part for work, part in zip(group, logits, strict=True)}
        for answer, count in prompts:
            if isinstance(answer, Embedding):
                self._add_states(answer, count)
        return StepResult(rows, time.perf_counter() - started)

    def _decode_work(self, decode: Sequence[Writing], *, may_guess: bool) -> list[Work]:
        spare = MAX_GUESSING_ROWS - len(decode) if may_guess else 0
        works = []
        for answer in decode:
            answer.draft = answer.guess(spare) if spare > 0 else []
            spare -= len(answer.draft)
            ids = [answer.ids[-1], *answer.draft]
            works.append(Work(answer, Segment(_cache(answer), ids, "all" if answer.draft else "last")))
        return works

    def _add_states(self, answer: Embedding, count: int) -> None:
        ids = answer.ids[answer.computed : answer.computed + count]
        states = summed_states(self._model, ids, _cache(answer))
        answer.total = states if answer.total is None else answer.total + states


def _slots(decode: Sequence[Writing]) -> list[SlotCache] | None:
    """Return everybody's cache, or None where one is no slot of a pool."""
    slots = [cache for answer in decode if isinstance(cache := _cache(answer), SlotCache)]
    return slots if len(slots) == len(decode) else None


def _static_rows(static: StaticStep, decode: Sequence[Writing], slots: Sequence[SlotCache]) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    for first in range(0, len(decode), MAX_BATCH):
        answers = decode[first : first + MAX_BATCH]
        tokens = [answer.ids[-1] for answer in answers]
        logits = static.decode(list(zip(slots[first : first + MAX_BATCH], tokens, strict=True))).cpu()
        rows |= {answer.key: logits[index : index + 1] for index, answer in enumerate(answers)}
    return rows


def _chunk_work(answer: Writing, count: int) -> Work:
    end = answer.computed + count
    ids = answer.ids[answer.computed : end]
    if answer.scores is not None:
        return Work(answer, Segment(_cache(answer), ids, "all"))
    return Work(answer, Segment(_cache(answer), ids, "last" if end == answer.prompt_tokens else "none"))


def _cache(answer: Answer) -> RollingKVCache:
    assert answer.slot is not None
    assert isinstance(answer.slot.cache, RollingKVCache)
    return answer.slot.cache
