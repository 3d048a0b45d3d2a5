"""What a transfer learns about one mirror while it runs. Values and arithmetic; the time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from mistral_fetch.errors import MirrorError
from mistral_fetch.sources.meter import PROGRESS_BYTES
from mistral_fetch.sources.retry import Backoff
from mistral_fetch.sources.status import PassingStatus
from mistral_fetch.units import smoothed

# How long a number of connections is watched before another one is tried.
GROWTH_SECONDS = 1.0
# More connections must bring this much more, or they are given up again.
WORTHWHILE = 1.1
# A line that has changed is found out about after this long.
SETTLED_SECONDS = 30.0
# How long no further connection is tried after one was too many, where the mirror does not say.
REFUSED_SECONDS = 1.0
MOST_REFUSED_SECONDS = 60.0
# A mirror that is so many times slower than another one gets a single connection.
NEGLIGIBLE = 10.0
_SMOOTHING = 0.3
_BUSY = {429, 503}


@dataclass
class Growth:
    """How many connections to a mirror are worth having: doubled as long as that brings more, then left alone."""

    limit: int
    most: int
    _best_rate: float = 0.0
    _previous: int = 0
    _window_began: float = 0.0
    _window_bytes: int = 0
    _settled_until: float = 0.0

    def received(self, length: int) -> None:
        """Count bytes."""
        self._window_bytes += length

    def observe(self, now_seconds: float) -> None:
        """Judge the last window, if it is over."""
        elapsed = now_seconds - self._window_began
        if elapsed < GROWTH_SECONDS:
            return
        rate, had_begun = self._window_bytes / elapsed, self._window_began > 0
        self._window_began, self._window_bytes = now_seconds, 0
        if not had_begun or rate == 0 or now_seconds < self._settled_until:
            return  # before its first byte, or in a pause, a mirror says nothing about its connections
        if rate > self._best_rate * WORTHWHILE:
            self._best_rate, self._previous = rate, self.limit
            self.limit = min(2 * self.limit, self.most)
        else:
            self.limit = min(self._previous or self.limit, self.most)
            self._best_rate, self._settled_until = 0.0, now_seconds + SETTLED_SECONDS

    def refused(self, active: int) -> None:
        """The mirror said that there are too many: never so many again."""
        self.most = min(self.most, max(1, active - 1))
        self.limit = min(self.limit, self.most)


@dataclass(eq=False)
class MirrorState:
    """One mirror: how fast it is, how often it failed, how many connections it has and may have."""

    origin: str
    host: str
    growth: Growth
    backoff: Backoff
    rate_bytes_per_second: float | None = None
    """What one connection reaches, smoothed; at first what it reached in earlier transfers."""
    measured_rate: float | None = None
    """The same, of this transfer alone."""
    request_seconds: float | None = None
    """How long it takes to begin an answer, connecting included, smoothed."""
    active: int = 0
    not_before_seconds: float = 0.0
    is_connected: bool = False
    received_bytes: int = 0
    failure_count: int = 0
    _wants_too_much: bool = False
    """It asked for more patience than anybody has: once no connection is left, one more request decides."""
    _last_failure_seconds: float = field(default=float("-inf"))

    def is_free(self, now_seconds: float) -> bool:
        """Return whether another connection may be opened."""
        is_time = now_seconds >= self.not_before_seconds or (self._wants_too_much and self.active == 0)
        return self.active < self.growth.limit and is_time

    def is_slow_beside(self, rate_bytes_per_second: float) -> bool:
        """Return whether a connection to another mirror brings so much more that this one is hardly felt."""
        known = self.rate_bytes_per_second
        return known is not None and known * NEGLIGIBLE < rate_bytes_per_second

    def received(self, length: int) -> None:
        """Count bytes that came."""
        self.received_bytes += length
        self.growth.received(length)

    def answered(self, seconds: float) -> None:
        """Learn how long an answer took to begin."""
        self.request_seconds = smoothed(self.request_seconds, seconds, _SMOOTHING)

    def delivered(self, length: int, seconds: float) -> None:
        """Learn from a piece that one connection brought in ``seconds``."""
        self.backoff.progressed()
        if length < PROGRESS_BYTES:
            return  # the time a tiny file takes says nothing about a rate
        rate = length / max(seconds, 1e-6)
        self.rate_bytes_per_second = smoothed(self.rate_bytes_per_second, rate, _SMOOTHING)
        self.measured_rate = self.rate_bytes_per_second

    def is_refusing(self, error: MirrorError, delivering: int) -> bool:
        """Return whether this connection is one too many, rather than the mirror being of no use.

        Args:
            error: What it was told.
            delivering: How many other connections are being sent bytes at this moment.
        """
        if not isinstance(error, PassingStatus) or error.status not in _BUSY or self.active < 2:
            return False
        # Who wants more patience than anybody has, and sends nothing to the others either, turns all away.
        return delivering > 0 or (error.retry_after_seconds or 0.0) <= MOST_REFUSED_SECONDS

    def refused(self, error: MirrorError, now_seconds: float) -> None:
        """Learn that a connection was one too many: fewer from now on, and none anew before the mirror wants it."""
        self.growth.refused(self.active)
        asked_for = (error.retry_after_seconds if isinstance(error, PassingStatus) else None) or REFUSED_SECONDS
        self._wants_too_much = asked_for > MOST_REFUSED_SECONDS
        self.not_before_seconds = now_seconds + min(asked_for, MOST_REFUSED_SECONDS)
        self._last_failure_seconds = now_seconds

    def is_echo(self, error: MirrorError, asked_seconds: float) -> bool:
        """Return whether a request failed together with another one: what broke both is known already."""
        return asked_seconds < self._last_failure_seconds and not error.is_permanent

    def delay_after(self, error: MirrorError, asked_seconds: float, now_seconds: float) -> float | None:
        """Return how long to wait before asking again, or None to give the mirror up.

        Connections that break together are one failure: only a request begun after the last failure counts as another.
        """
        self.failure_count += 1
        # Where a refusal already asked for too much patience, the moment to wait for is not to come.
        if self.is_echo(error, asked_seconds) and not self._wants_too_much:
            return max(0.0, self.not_before_seconds - now_seconds)
        delay = self.backoff.delay_after(error)
        self._wants_too_much = False
        self._last_failure_seconds = now_seconds
        if delay is not None:
            self.not_before_seconds = now_seconds + delay
        return delay
