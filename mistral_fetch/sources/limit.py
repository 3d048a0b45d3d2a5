"""One cap on the rate of everything that is received: a token bucket shared by all connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# How much may come at once after a pause: more would be felt on the line, less would cost a wait for each chunk.
BURST_SECONDS = 0.25
# With less than this for each, more connections bring nothing and make all pieces late.
LEAST_PER_CONNECTION = 1_000_000.0
_LONGEST_NAP_SECONDS = 0.2


class RateLimit:
    """Lets ``bytes_per_second`` through, on average; from any thread.

    Args:
        bytes_per_second: The cap; None for none.
        clock: Monotonic seconds; tests pass their own.
        sleep: Waits; tests pass their own.
    """

    def __init__(
        self,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._paid_until = clock()

    @property
    def chunk_bytes(self) -> int | None:
        """Return how much to read at once so that the rate is even, or None for as much as there is."""
        if self.bytes_per_second is None:
            return None
        return max(4096, min(256 * 1024, int(self.bytes_per_second * BURST_SECONDS / 4)))

    def worthwhile_connections(self, most: int) -> int:
        """Return how many connections such a rate is worth: each holds an unfinished piece that a stop throws away."""
        if self.bytes_per_second is None:
            return most
        return max(1, min(most, int(self.bytes_per_second / LEAST_PER_CONNECTION)))

    def take(self, length: int, check_stop: Callable[[], None]) -> None:
        """Pay for bytes that were received; wait until they are within the rate.

        Args:
            length: How many bytes.
            check_stop: Called while waiting; may raise.
        """
        if self.bytes_per_second is None:
            return
        with self._lock:
            earliest = self._clock() - BURST_SECONDS
            self._paid_until = max(self._paid_until, earliest) + length / self.bytes_per_second
            wait_until = self._paid_until
        while (left := wait_until - self._clock()) > 0:
            check_stop()
            self._sleep(min(left, _LONGEST_NAP_SECONDS))
