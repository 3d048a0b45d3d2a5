"""Who runs in the next step, decided by numbers alone: no torch, no clock, no thread.

Waiting sequences are admitted in strict order (priority, then arrival) while what they promise to need fits into the
cache. The first that does not fit holds up all behind it, so a large request is never overtaken for ever. Every step
holds all sequences that decode, and as much of the oldest prompts as its budget of rows allows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Literal

from mistral_runtime.errors import BadRequest

State = Literal["waiting", "prefill", "decode"]


@dataclass(frozen=True)
class Limits:
    """How much runs at once.

    Attributes:
        cache_positions: Positions that all caches together may come to hold.
        max_running: Sequences in a step.
        prefill_chunk: Rows of prompts in a step while others decode: what bounds the pause in their streams.
        prefill_alone: The same while nobody decodes.
        deterministic: Prompts are cut at multiples of `prefill_chunk` and are computed one at a time, whoever else is
            there, so that the shape of every product with a prompt depends on that prompt alone.
    """

    cache_positions: int
    max_running: int = 8
    prefill_chunk: int = 64
    prefill_alone: int = 512
    deterministic: bool = False


@dataclass(order=True)
class Entry:
    """One sequence as the scheduler sees it. Entries compare by who goes first."""

    priority: int
    arrival: int
    key: str = field(compare=False)
    prompt_tokens: int = field(compare=False)
    positions: int = field(compare=False)  # what it may come to need of the cache
    computed: int = field(default=0, compare=False)  # positions of the prompt that are in its cache
    state: State = field(default="waiting", compare=False)


@dataclass(frozen=True)
class Plan:
    """One step: the keys that decode, and how many positions of which prompts are computed."""

    decode: list[str]
    prefill: list[tuple[str, int]]


class Scheduler:
    """The queue, and the set of those running."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: list[Entry] = []
        self._running: dict[str, Entry] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._running)

    @property
    def promised(self) -> int:
        """Positions that those running may come to need."""
        return sum(entry.positions for entry in self._running.values())

    @property
    def free(self) -> int:
        """Positions that nobody who runs was promised."""
        return self.limits.cache_positions - self.promised

    def add(self, entry: Entry) -> None:
        """Let a sequence wait.

        Raises:
            BadRequest: It could not run even alone.
        """
        if entry.positions > self.limits.cache_positions:
            raise BadRequest(
                "the request can never fit into the cache",
                detail=f"expected at most {self.limits.cache_positions} positions, found {entry.positions}",
                hint="shorten the prompt, ask for fewer tokens, or start the server with more --cache-positions",
            )
        bisect.insort(self._waiting, entry)

    def admit(self) -> Entry | None:
        """Move the next of the queue to the running and return it; None where it has to wait, or nobody does."""
        if not self._waiting or len(self._running) >= self.limits.max_running:
            return None
        entry = self._waiting[0]
        if entry.positions > self.free:
            return None
        self._waiting.pop(0)
        entry.state = "prefill"
        self._running[entry.key] = entry
        return entry

    def promise(self, key: str, positions: int) -> None:
        """Correct what a running sequence may come to need: a cache that it took over may hold more."""
        entry = self._running[key]
        entry.positions = max(entry.positions, positions)

    def note_computed(self, key: str, count: int) -> None:
        """Count positions of a prompt as computed; with the last of them its sequence decodes."""
        entry = self._running[key]
        entry.computed += count
        if entry.computed >= entry.prompt_tokens:
            entry.state = "decode"

    def remove(self, key: str) -> None:
        """Forget a sequence, whatever its state. Unknown keys are no error."""
        if self._running.pop(key, None) is None:
            self._waiting = [entry for entry in self._waiting if entry.key != key]

    def plan(self) -> Plan:
        """Return the next step; an empty one where nobody runs."""
        decode = [entry.key for entry in self._running.values() if entry.state == "decode"]
        prompts = sorted(entry for entry in self._running.values() if entry.state == "prefill")
        return Plan(decode, self._fixed_chunk(prompts) if self.limits.deterministic else self._chunks(prompts, decode))

    def _chunks(self, prompts: list[Entry], decode: list[str]) -> list[tuple[str, int]]:
        budget = self.limits.prefill_chunk if decode else max(self.limits.prefill_chunk, self.limits.prefill_alone)
        chunks = []
        for entry in prompts:
            count = min(budget, entry.prompt_tokens - entry.computed)
            if count < 1:
                break
            chunks.append((entry.key, count))
            budget -= count
        return chunks

    def _fixed_chunk(self, prompts: list[Entry]) -> list[tuple[str, int]]:
        size = self.limits.prefill_chunk
        return [
            (entry.key, min(size - entry.computed % size, entry.prompt_tokens - entry.computed))
            for entry in prompts[:1]
        ]
