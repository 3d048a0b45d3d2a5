"""Where sequences of the engine get their caches from, and what they cost.

On the CPU memory that was never written costs nothing, so every cache is made large enough for the longest sequence and
the next turn of a conversation can take it over; what is counted is what was promised, or once written. On other
devices a cache takes its memory at once and is made as large as it has to be.
"""

from __future__ import annotations

from dataclasses import dataclass

from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.kv_cache import cache_positions
from mistral_runtime.lookup import MAX_DRAFT
from mistral_runtime.serve.idle_caches import CacheSlot
from mistral_runtime.transformer import Transformer

# A conversation's next prompt may part from the last answer this many tokens before its end, in a window too.
_TURN_SLACK = 32


SERVING_SLACK = _TURN_SLACK + MAX_DRAFT
"""How many positions a cache of the engine must be able to take back."""


@dataclass(frozen=True)
class CacheMaker:
    """Make caches for one model.

    Attributes:
        context: The longest sequence.
        slack: What can be taken back.
        static: Computes decode steps of sequences in its pool; then all of them live there, and each costs a whole
            slot, so that there is always one for who was promised it.
    """

    model: Transformer
    context: int
    slack: int
    static: StaticStep | None = None

    def cost(self, positions: int) -> int:
        """Return how many positions of memory a sequence may come to need: less than it has, under a window."""
        if self.static is not None:
            return self.static.pool.capacity
        return cache_positions(self.model.config, positions, slack=self.slack)

    def make(self, positions: int) -> CacheSlot:
        """Return an empty cache for a sequence of up to so many positions."""
        if self.static is not None and (slot := self.static.pool.new_cache(positions)) is not None:
            return CacheSlot(slot, slot.capacity, [], touched=slot.capacity)
        is_lazy = self.model.device.type == "cpu"
        room = self.context if is_lazy else positions
        cache = self.model.new_cache(room, slack=self.slack)
        capacity = self.cost(room)
        return CacheSlot(cache, capacity, [], touched=0 if is_lazy else capacity)
