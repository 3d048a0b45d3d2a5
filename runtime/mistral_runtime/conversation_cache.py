"""What the model remembers of a sequence, kept from one answer to the next.

Owns which token ids lie behind the cached keys and values, so that a prompt that begins alike is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

from mistral_runtime.kv_cache import RollingKVCache


class ConversationCache:
    """A cache and the ids stored in it, in order.

    The keys and values of a position depend on the ids up to it and on nothing else. So whatever two prompts have in
    common at their beginning holds for both; the rest is taken back. Where the cache cannot go back, because a window
    has overwritten what would be seen again, it starts anew.

    Args:
        make: Makes an empty cache, large enough for every sequence that is to come.
        may_rewind: Whether positions can be taken back; not where other processes hold parts of the cache.
    """

    def __init__(self, make: Callable[[], RollingKVCache], *, may_rewind: bool = True) -> None:
        self._make = make
        self._may_rewind = may_rewind
        self._cache: RollingKVCache | None = None
        self._ids: list[int] = []
        self._is_whole = True

    def begin(self, prompt: Sequence[int]) -> tuple[RollingKVCache, int]:
        """Return a cache that holds the beginning of `prompt`, and how many ids that is; at least one is left over."""
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompt[:-1], strict=False)))
        cache = None if self._cache is None or not common else self._gone_back(self._cache, common)
        if cache is None:
            cache, common = self._make(), 0
        self._cache, self._ids, self._is_whole = cache, list(prompt[:common]), True
        return cache, common

    @contextmanager
    def storing(self, ids: Sequence[int]) -> Iterator[None]:
        """Note, once the block has ended, that a step has stored these."""
        # A step that breaks off has overwritten some layers' slots and not others': such a cache is of no more use.
        self._is_whole = False
        yield
        self._is_whole = True
        self._ids += ids

    def rewind(self, count: int) -> None:
        """Take back the last `count` ids."""
        if count and self._cache is not None:
            self._cache.rewind(count)
            del self._ids[-count:]

    def _gone_back(self, cache: RollingKVCache, length: int) -> RollingKVCache | None:
        """Return the cache cut to `length` positions, or None where that cannot be."""
        if not self._is_whole or (cache.length > length and not self._may_rewind):
            return None
        try:
            cache.rewind(cache.length - length)
        except ValueError:
            return None
        return cache
