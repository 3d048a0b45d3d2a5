"""What is learned about one mirror: how many connections it is worth, how fast it is, when it is given up."""

from __future__ import annotations

import pytest

from mistral_fetch.errors import MirrorStatus, MirrorUnreachable
from mistral_fetch.sources.meter import PROGRESS_BYTES
from mistral_fetch.sources.mirror_state import (
    GROWTH_SECONDS,
    MOST_REFUSED_SECONDS,
    REFUSED_SECONDS,
    SETTLED_SECONDS,
    Growth,
    MirrorState,
)
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.status import PassingStatus
from mistral_fetch.units import MIB

NOW = 1000.0
POLICY = RetryPolicy(attempts=3, first_delay_seconds=1.0, longest_delay_seconds=8.0)
BROKEN = MirrorUnreachable("it broke", detail="", hint="")
GONE = MirrorStatus("it is not there", detail="", hint="", status=404)


def busy(status: int = 429, retry_after: float | None = None) -> PassingStatus:
    return PassingStatus("busy", detail="", hint="", status=status, retry_after_seconds=retry_after)


def state(active: int = 1, limit: int = 2) -> MirrorState:
    mirror = MirrorState("http://m", "m", Growth(limit, 16), Backoff(POLICY, jitter=lambda: 1.0))
    mirror.active = active
    return mirror


class Line:
    """Watches a growth second by second: each second so much comes over so many connections."""

    def __init__(self, growth: Growth) -> None:
        self.growth, self.now = growth, NOW
        growth.observe(self.now)

    def second(self, bytes_per_second: float) -> int:
        self.growth.received(int(bytes_per_second))
        self.now += GROWTH_SECONDS
        self.growth.observe(self.now)
        return self.growth.limit


def test_connections_are_doubled_as_long_as_that_brings_more() -> None:
    line = Line(Growth(2, 16))
    limits = [line.second(min(line.growth.limit, 100) * MIB) for _ in range(6)]
    assert limits[:3] == [4, 8, 16]
    assert max(limits) == 16


def test_doubling_that_brings_nothing_is_taken_back_and_left_alone_for_a_while() -> None:
    line = Line(Growth(2, 16))
    limits = [line.second(min(line.growth.limit, 4) * MIB) for _ in range(10)]
    assert limits[:3] == [4, 8, 4]
    assert set(limits[3:]) == {4}


def test_a_line_that_has_changed_is_found_out_about_later() -> None:
    line = Line(Growth(2, 16))
    for _ in range(3):
        line.second(min(line.growth.limit, 4) * MIB)
    assert line.growth.limit == 4
    limits = [line.second(line.growth.limit * MIB) for _ in range(int(SETTLED_SECONDS) + 3)]
    assert limits[int(SETTLED_SECONDS) - 2] == 4
    assert limits[-1] == 16


def test_nothing_is_judged_before_a_window_is_over() -> None:
    growth = Growth(2, 16)
    growth.observe(NOW)
    growth.received(100 * MIB)
    growth.observe(NOW + GROWTH_SECONDS - 0.01)
    assert growth.limit == 2


def test_a_mirror_that_is_slow_to_begin_is_not_settled_at_its_first_connections() -> None:
    line = Line(Growth(2, 16))
    for _ in range(3):
        assert line.second(0) == 2
    assert [line.second(line.growth.limit * MIB) for _ in range(3)] == [4, 8, 16]


def test_more_than_the_most_is_never_tried() -> None:
    line = Line(Growth(2, 3))
    assert [line.second(line.growth.limit * MIB) for _ in range(3)] == [3, 3, 3]


def test_a_number_that_was_refused_is_never_tried_again() -> None:
    growth = Growth(8, 16)
    growth.refused(8)
    assert growth.limit == 7
    growth.refused(5)
    assert growth.limit == 4
    growth.refused(8)  # one of the first eight, heard of late
    assert growth.limit == 4
    line = Line(growth)
    assert max(line.second(line.growth.limit * MIB) for _ in range(100)) == 4


def test_a_refusal_does_not_raise_what_growth_had_given_up() -> None:
    growth = Growth(2, 16)
    growth.refused(8)  # connections from before it was lowered
    assert growth.limit == 2


def test_at_least_one_connection_is_left() -> None:
    growth = Growth(2, 16)
    growth.refused(1)
    assert growth.limit == 1


@pytest.mark.parametrize(
    "active, error, expected",
    [(2, busy(429), True), (2, busy(503), True), (1, busy(429), False), (2, busy(500), False), (2, BROKEN, False)],
)
def test_a_busy_mirror_refuses_one_of_several_connections(active: int, error: object, expected: bool) -> None:
    assert state(active).is_refusing(error, delivering=0) is expected  # type: ignore[arg-type]


def test_a_mirror_that_wants_nobody_before_tomorrow_is_not_waited_for() -> None:
    mirror = state(active=2)
    tomorrow = busy(retry_after=86400.0)
    assert not mirror.is_refusing(tomorrow, delivering=0)
    assert mirror.delay_after(tomorrow, NOW, NOW + 1) is None
    assert mirror.is_refusing(tomorrow, delivering=1), "then it is for this connection that there is no room"


@pytest.mark.parametrize(
    "retry_after, seconds",
    [(None, REFUSED_SECONDS), (0.0, REFUSED_SECONDS), (7.0, 7.0), (86400.0, MOST_REFUSED_SECONDS)],
)
def test_after_a_refusal_no_connection_is_opened_before_the_mirror_wants_it(
    retry_after: float | None, seconds: float
) -> None:
    mirror = state(active=4, limit=8)
    mirror.refused(busy(retry_after=retry_after), NOW)
    mirror.active = 1
    assert not mirror.is_free(NOW + seconds - 0.01)
    assert mirror.is_free(NOW + seconds)
    assert mirror.growth.limit == 3


def test_a_mirror_that_wants_too_much_patience_is_asked_once_more_when_nothing_else_comes() -> None:
    mirror = state(active=2)
    mirror.refused(busy(retry_after=86400.0), NOW)
    mirror.active = 0
    assert mirror.is_free(NOW)
    assert mirror.delay_after(busy(retry_after=86400.0), NOW + 1, NOW + 2) is None
    patient = state(active=2)
    patient.refused(busy(retry_after=30.0), NOW)
    patient.active = 0
    assert not patient.is_free(NOW + 29)


def test_a_connection_that_fails_together_with_one_that_was_to_wait_till_tomorrow_does_not_wait() -> None:
    mirror = state(active=3)
    tomorrow = busy(retry_after=86400.0)
    mirror.refused(tomorrow, NOW)  # a third connection was being sent something at that moment
    assert mirror.delay_after(tomorrow, NOW - 1, NOW + 0.1) is None


def test_refusals_are_no_failures() -> None:
    mirror = state(active=4, limit=8)
    for number in range(20):
        mirror.refused(busy(), NOW + number)
    assert mirror.delay_after(BROKEN, NOW + 30, NOW + 31) == 1.0, "the first failure's delay"


def test_refusals_that_come_together_are_one_piece_of_news() -> None:
    mirror = state(active=4)
    assert not mirror.is_echo(busy(), NOW - 1)
    mirror.refused(busy(), NOW)
    assert mirror.is_echo(busy(), NOW - 1)
    assert not mirror.is_echo(busy(), NOW)


def test_connections_that_break_together_are_one_failure() -> None:
    mirror = state(active=16)
    delays = [mirror.delay_after(BROKEN, NOW - 5, NOW + number / 100) for number in range(16)]
    assert delays[0] == 1.0
    assert all(delay is not None and 0.8 <= delay <= 1.0 for delay in delays[1:]), "they wait for the same moment"
    assert mirror.delay_after(BROKEN, NOW + 1, NOW + 2) == 2.0


def test_failures_one_after_the_other_end_in_giving_up() -> None:
    mirror = state()
    assert [mirror.delay_after(BROKEN, NOW + n, NOW + n + 0.5) for n in range(3)] == [1.0, 2.0, None]


def test_a_failed_mirror_gets_no_new_connection_while_it_is_waited_for() -> None:
    mirror = state(active=0)
    mirror.delay_after(BROKEN, NOW - 1, NOW)
    assert not mirror.is_free(NOW + 0.99)
    assert mirror.is_free(NOW + 1.0)


def test_what_cannot_pass_gives_up_at_once_even_amid_other_failures() -> None:
    mirror = state(active=4)
    mirror.delay_after(BROKEN, NOW - 1, NOW)
    assert mirror.delay_after(GONE, NOW - 1, NOW) is None


def test_a_piece_forgives_failures() -> None:
    mirror = state()
    mirror.delay_after(BROKEN, NOW, NOW + 1)
    mirror.delay_after(BROKEN, NOW + 2, NOW + 3)
    mirror.delivered(MIB, 1.0)
    assert mirror.delay_after(BROKEN, NOW + 4, NOW + 5) == 1.0


def test_a_mirror_has_as_many_connections_as_it_may() -> None:
    mirror = state(active=1, limit=2)
    assert mirror.is_free(NOW)
    mirror.active = 2
    assert not mirror.is_free(NOW)


def test_the_rate_is_that_of_one_connection_and_smooth() -> None:
    mirror = state()
    assert mirror.rate_bytes_per_second is None
    mirror.delivered(4 * MIB, 2.0)
    assert mirror.rate_bytes_per_second == 2 * MIB
    mirror.delivered(4 * MIB, 0.4)
    assert 2 * MIB < (mirror.rate_bytes_per_second or 0) < 10 * MIB / 2
    for _ in range(20):
        mirror.delivered(4 * MIB, 0.4)
    assert mirror.rate_bytes_per_second == pytest.approx(10 * MIB, rel=0.01)


def test_a_tiny_file_says_nothing_about_a_rate() -> None:
    mirror = state()
    mirror.delivered(PROGRESS_BYTES - 1, 10.0)
    assert mirror.rate_bytes_per_second is None


def test_bytes_count_for_the_mirror_and_its_growth() -> None:
    mirror = state()
    line = Line(mirror.growth)
    mirror.received(5 * MIB)
    assert mirror.received_bytes == 5 * MIB
    assert line.second(0) == 4
