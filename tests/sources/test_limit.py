"""The cap on the rate, with a clock of its own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mistral_fetch.errors import Interrupted
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.limit import BURST_SECONDS, RateLimit

RATE = 1_000_000.0


class Clock:
    """Moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.naps = 50.0, 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.naps += 1


def never() -> None:
    """Go on."""


def limited(rate: float | None = RATE) -> tuple[RateLimit, Clock]:
    clock = Clock()
    return RateLimit(rate, clock, clock.sleep), clock


def test_the_long_run_rate_is_exact_whatever_the_lengths() -> None:
    limit, clock = limited()
    began, total, chance = clock.now, 0, random.Random(1)
    while clock.now - began < 100:
        length = chance.randrange(1, 300_000)
        limit.take(length, never)
        total += length
    assert total / (clock.now - began) == pytest.approx(RATE, rel=0.005)


def test_never_more_than_the_burst_comes_at_once() -> None:
    limit, clock = limited()
    limit.take(1, never)
    clock.now += 3600  # a long pause saves up nothing beyond it
    began, taken = clock.now, 0
    while clock.now == began:
        limit.take(1000, never)
        taken += 1000
    assert taken - 1000 <= BURST_SECONDS * RATE


def test_after_a_pause_the_burst_is_free() -> None:
    limit, clock = limited()
    clock.now += 10
    limit.take(int(BURST_SECONDS * RATE), lambda: pytest.fail("waited"))
    assert clock.naps == 0


def test_any_window_is_within_the_rate_and_the_burst() -> None:
    limit, clock = limited()
    chance, log = random.Random(2), []
    for _ in range(2000):
        length = chance.randrange(1, 50_000)
        limit.take(length, never)
        log.append((clock.now, length))
        if chance.random() < 0.1:
            clock.now += chance.random()
    for first in range(0, len(log), 50):
        total = 0
        for moment, length in log[first:]:
            total += length
            # The first of a window was paid for before it.
            assert total - log[first][1] <= RATE * (moment - log[first][0] + BURST_SECONDS) + 1


def test_without_a_cap_nobody_waits() -> None:
    limit, clock = limited(None)
    limit.take(10**12, lambda: pytest.fail("waited"))
    assert clock.naps == 0
    assert limit.chunk_bytes is None


def test_the_stop_is_asked_for_while_waiting_and_ends_it() -> None:
    limit, clock = limited()
    asked: list[float] = []

    def stop() -> None:
        asked.append(clock.now)
        if len(asked) == 3:
            raise Interrupted("stop", detail="", hint="")

    with pytest.raises(Interrupted):
        limit.take(int(100 * RATE), stop)
    assert clock.now - 50.0 < 1.0


def test_a_real_stop_ends_a_long_wait_at_once() -> None:
    limit, stop = RateLimit(1000.0), StopSignal()
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        limit.take(1_000_000, stop.check)
    assert time.monotonic() - began < 1.0


def test_threads_share_one_cap() -> None:
    limit = RateLimit(4_000_000.0)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(_take_many, limit.take, 20, 25_000) for _ in range(8)]
        for future in futures:
            future.result()
    elapsed = time.monotonic() - began
    assert elapsed >= 8 * 20 * 25_000 / 4_000_000 - BURST_SECONDS - 0.05
    assert elapsed < 4.0


def _take_many(take: Callable[[int, Callable[[], None]], None], times: int, length: int) -> None:
    for _ in range(times):
        take(length, never)


@pytest.mark.parametrize("rate, chunk", [(1_000.0, 4096), (1_000_000.0, 62_500), (1e9, 256 * 1024)])
def test_what_is_read_at_once_is_a_fraction_of_the_burst(rate: float, chunk: int) -> None:
    assert limited(rate)[0].chunk_bytes == chunk


@pytest.mark.parametrize("rate, connections", [(None, 16), (100_000, 1), (3_500_000, 3), (10**9, 16)])
def test_a_low_rate_is_not_spread_over_many_connections(rate: float | None, connections: int) -> None:
    assert RateLimit(rate).worthwhile_connections(16) == connections
