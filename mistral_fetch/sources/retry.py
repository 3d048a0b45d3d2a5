"""How often and how long to wait before a mirror is asked again: exponential back-off with full jitter.

Pure but for the waiting itself, which a stop signal ends.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mistral_fetch.errors import MirrorError, MirrorTimeout
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.status import PassingStatus

T = TypeVar("T")

# Where nobody delivers, a person should know within 15 s: two timeouts of 7 s, and the pause between them.
LEAST_PATIENCE_SECONDS = 13.0
_TIMEOUTS_IN_A_ROW = 1.8


def is_too_silent(error: MirrorError, silent_seconds: float, timeout_seconds: float) -> bool:
    """Return whether to give up on a mirror that let a request time out, although others are still due.

    Args:
        error: How the request failed.
        silent_seconds: For how long not a byte has come from anybody.
        timeout_seconds: How long one request waits.
    """
    patience = max(LEAST_PATIENCE_SECONDS, _TIMEOUTS_IN_A_ROW * timeout_seconds)
    return isinstance(error, MirrorTimeout) and silent_seconds >= patience


@dataclass(frozen=True)
class RetryPolicy:
    """How patient to be with one mirror."""

    attempts: int = 5
    """Requests in a row that bring nothing before the mirror is given up."""
    first_delay_seconds: float = 0.5
    """The first wait is between 0 and this; each further one may be twice as long."""
    longest_delay_seconds: float = 20.0
    longest_retry_after_seconds: float = 60.0
    """A server that asks for more patience (``Retry-After``) than this is given up at once."""


class Backoff:
    """Counts failures in a row against one mirror; progress forgives them.

    Args:
        policy: The limits.
        jitter: A function giving a number from 0 to 1; tests pass a constant.
    """

    def __init__(self, policy: RetryPolicy, jitter: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._jitter = jitter
        self._failures = 0

    def progressed(self) -> None:
        """Forget past failures: bytes came."""
        self._failures = 0

    def delay_after(self, error: MirrorError) -> float | None:
        """Return how many seconds to wait before the next request, or None to give up."""
        self._failures += 1
        if error.is_permanent or self._failures >= self._policy.attempts:
            return None
        if isinstance(error, PassingStatus) and error.retry_after_seconds is not None:
            asked = error.retry_after_seconds
            return asked if asked <= self._policy.longest_retry_after_seconds else None
        # Full jitter: clients that failed together must not come back together.
        ceiling = min(
            self._policy.longest_delay_seconds, self._policy.first_delay_seconds * 2.0 ** (self._failures - 1)
        )
        return ceiling * self._jitter()


def retrying(
    action: Callable[[], T], policy: RetryPolicy, stop: StopSignal | None = None, timeout_seconds: float = 0.0
) -> T:
    """Return what ``action`` returns, asking again after failures that may pass.

    ``timeout_seconds`` is how long one request waits; see :func:`is_too_silent`.

    Raises:
        MirrorError: It failed permanently, or too often.
        Interrupted: A stop was asked for while waiting.
    """
    backoff = Backoff(policy)
    stop = stop or StopSignal()
    began = time.monotonic()
    while True:
        stop.check()
        try:
            return action()
        except MirrorError as error:
            stop.check()
            delay = backoff.delay_after(error)
            if delay is None or is_too_silent(error, time.monotonic() - began, timeout_seconds):
                raise
        stop.wait(delay)
