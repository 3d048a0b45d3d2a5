"""Sequences and the caches they sit in: from the queue to a cache, and back to those that are idle.

Joins the pure parts, `scheduler.py` and `idle_caches.py`, and keeps their sum within the cache that was planned for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from mistral_runtime.serve.answer import Answer, Writing
from mistral_runtime.serve.caches import CacheMaker
from mistral_runtime.serve.idle_caches import CacheSlot, IdleCaches
from mistral_runtime.serve.intake import needed_positions
from mistral_runtime.serve.protocol import Generate
from mistral_runtime.serve.scheduler import Entry, Limits, Plan, Scheduler


class Seats:
    """Every answer that waits or runs."""

    def __init__(self, limits: Limits, caches: CacheMaker) -> None:
        self._limits, self._caches = limits, caches
        self._scheduler = Scheduler(limits)
        self._idle = IdleCaches(chunk=limits.prefill_chunk if limits.deterministic else 1)
        self._answers: dict[str, Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    @property
    def running(self) -> int:
        """How many run."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._scheduler.waiting

    @property
    def promised(self) -> int:
        """Positions of the cache that those running may come to need."""
        return self._scheduler.promised

    @property
    def cache_positions(self) -> int:
        """Positions that all caches together may come to hold."""
        return self._limits.cache_positions

    def get(self, key: str) -> Answer | None:
        """Return the answer of that name, if it waits or runs."""
        return self._answers.get(key)

    def answers(self, keys: Iterable[str]) -> list[Answer]:
        """Return those of these names."""
        return [self._answers[key] for key in keys]

    def enqueue(self, answer: Answer) -> None:
        """Let a checked request wait for its turn.

        Raises:
            RequestError: It could not run even alone.
        """
        request = answer.request
        positions = self._caches.cost(needed_positions(request, self._caches.model.config, self._caches.context))
        priority = request.priority if isinstance(request, Generate) else 0
        self._scheduler.add(Entry(priority, answer.arrival, answer.key, answer.prompt_tokens, positions))
        self._answers[answer.key] = answer

    def admit(self) -> list[Answer]:
        """Give a cache to everybody whose turn it is, and return them."""
        admitted = []
        while (entry := self._scheduler.admit()) is not None:
            answer = self._answers[entry.key]
            answer.clock.admitted = time.perf_counter()
            answer.slot = self._slot(answer, entry)
            answer.computed = answer.cached = answer.slot.cache.length
            self._scheduler.promise(entry.key, answer.slot.touched)
            self._scheduler.note_computed(entry.key, answer.cached)
            self._idle.evict_to(self._scheduler.free)
            admitted.append(answer)
        return admitted

    def _slot(self, answer: Answer, entry: Entry) -> CacheSlot:
        """Return the idle cache that begins as the prompt does, or a new one."""
        if isinstance(answer, Writing) and answer.scores is None:
            slot = self._idle.take(answer.request.prompt, positions=entry.positions)
            # A cache that was longer once takes more memory than was promised to this one, and there may not be more.
            if slot is not None and slot.touched <= self._scheduler.free + entry.positions:
                return slot
        self._idle.evict_to(self._scheduler.free)  # first: a device's memory, and a pool's slots, are taken at once
        return self._caches.make(entry.positions)

    def plan(self) -> Plan:
        """Return who takes part in the next step."""
        return self._scheduler.plan()

    def note_computed(self, answer: Answer, count: int) -> None:
        """Count positions of an answer's prompt as computed."""
        answer.computed += count
        self._scheduler.note_computed(answer.key, count)

    def release(self, answer: Answer, *, keep_cache: bool) -> None:
        """Forget an answer; its cache serves the next prompt that begins as it does, unless it is not to be trusted."""
        self._scheduler.remove(answer.key)
        del self._answers[answer.key]
        slot, answer.slot = answer.slot, None
        if slot is None:
            return
        slot.note_length()
        # A stop token that had been guessed is in the cache and no part of the answer.
        slot.cache.rewind(max(0, slot.cache.length - len(answer.ids)))
        slot.ids = answer.ids[: slot.cache.length]
        slot.whole = answer.computed // self._limits.prefill_chunk * self._limits.prefill_chunk
        if keep_cache:
            self._idle.keep(slot)
            self._idle.evict_to(self._scheduler.free)
