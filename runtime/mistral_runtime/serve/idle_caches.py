"""Caches of finished answers, kept for the next prompt that begins the same way.

Owns which of them to take over and which to give up first. Knows of a cache only that it holds the positions of some
ids and can be cut back, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Fewer tokens are computed sooner than they are looked for.
MIN_SHARED = 16


class Rewindable(Protocol):
    """What is asked of a cache."""

    length: int

    def rewind(self, count: int) -> None:
        """Take back the last positions; ValueError where they cannot be."""


@dataclass
class CacheSlot:
    """A cache and what is in it.

    Attributes:
        capacity: Positions that it could hold.
        ids: The ids at the positions that it holds, `cache.length` of them.
        touched: The most positions that it ever held, whose memory is therefore taken; at most `capacity`.
        whole: So many of `ids` were computed in whole chunks of the fixed size, counted from position 0.
    """

    cache: Rewindable
    capacity: int
    ids: list[int]
    touched: int = 0
    whole: int = 0

    def note_length(self) -> None:
        """Remember how much was ever held."""
        self.touched = min(self.capacity, max(self.touched, self.cache.length))


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many ids two sequences begin with in common, by comparing slices: as fast as C is."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class IdleCaches:
    """Slots that nobody uses, the least recently used first.

    Args:
        chunk: Prefixes are shared in multiples of this alone, and only so far as they were computed in them; 1 shares
            anything.
    """

    def __init__(self, *, chunk: int = 1) -> None:
        self._chunk = chunk
        self._slots: list[CacheSlot] = []

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def positions(self) -> int:
        """Positions whose memory is taken."""
        return sum(slot.touched for slot in self._slots)

    def keep(self, slot: CacheSlot) -> None:
        """Add a slot as the most recently used, unless there is too little in it."""
        if slot.cache.length >= MIN_SHARED:
            self._slots.append(slot)

    def take(self, prompt: Sequence[int], *, positions: int) -> CacheSlot | None:
        """Remove and return the slot that has the longest beginning of `prompt`, cut back to that; or None.

        The prompt's last token is never part of it, since the logits after it are wanted.

        Args:
            positions: What the sequence may come to need of a cache.
        """
        offers = [(self._usable(slot, prompt), slot) for slot in self._slots if slot.capacity >= positions]
        for shared, slot in sorted(offers, key=lambda offer: -offer[0]):
            if shared < MIN_SHARED:
                break
            try:
                slot.cache.rewind(slot.cache.length - shared)
            except ValueError:  # a window has rolled past what would be needed
                continue
            self._slots.remove(slot)
            del slot.ids[shared:]
            slot.whole = min(slot.whole, shared)
            return slot
        return None

    def evict_to(self, positions: int) -> bool:
        """Give up slots until they take at most so many positions; say whether that is reached."""
        while self._slots and self.positions > positions:
            self._slots.pop(0)
        return self.positions <= positions

    def _usable(self, slot: CacheSlot, prompt: Sequence[int]) -> int:
        shared = min(shared_length(slot.ids, prompt), len(prompt) - 1)
        if self._chunk > 1:
            shared = min(shared, slot.whole) // self._chunk * self._chunk
        return shared
