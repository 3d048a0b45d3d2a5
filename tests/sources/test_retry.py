from __future__ import annotations

import pytest

from mistral_fetch.errors import Interrupted, MirrorStatus, MirrorTimeout, MirrorUnreachable, RangeRefused
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.retry import Backoff, RetryPolicy, is_too_silent, retrying
from mistral_fetch.sources.status import PassingStatus, parse_retry_after

POLICY = RetryPolicy(attempts=4, first_delay_seconds=1, longest_delay_seconds=3, longest_retry_after_seconds=60)
BROKEN = MirrorUnreachable("a", detail="b", hint="c")


def busy(retry_after_seconds: float | None) -> PassingStatus:
    return PassingStatus("a", detail="b", hint="c", status=429, retry_after_seconds=retry_after_seconds)


def test_waits_double_up_to_a_ceiling_and_end() -> None:
    backoff = Backoff(POLICY, jitter=lambda: 1.0)
    assert [backoff.delay_after(BROKEN) for _ in range(4)] == [1, 2, 3, None]


def test_jitter_is_full() -> None:
    assert Backoff(POLICY, jitter=lambda: 0.0).delay_after(BROKEN) == 0


def test_progress_forgives() -> None:
    backoff = Backoff(POLICY, jitter=lambda: 1.0)
    for _ in range(10):
        assert backoff.delay_after(BROKEN) == 1
        backoff.progressed()


def test_permanent_failures_are_not_tried_again() -> None:
    assert Backoff(POLICY).delay_after(RangeRefused("a", detail="b", hint="c")) is None
    assert Backoff(POLICY).delay_after(MirrorStatus("a", detail="b", hint="c", status=404)) is None


@pytest.mark.parametrize("asked, waited", [(0, 0), (60, 60), (61, None)])
def test_retry_after_is_obeyed_within_bounds(asked: float, waited: float | None) -> None:
    assert Backoff(POLICY, jitter=lambda: 1.0).delay_after(busy(asked)) == waited


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 60.0),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("9" * 40, None),
    ],
)
def test_retry_after_is_read(value: str, seconds: float | None) -> None:
    assert parse_retry_after(value, now=1445412480 - 60) == seconds


def test_retrying_returns_what_came_at_last() -> None:
    answers = iter([BROKEN, busy(0), "at last"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retrying(ask, RetryPolicy(first_delay_seconds=0)) == "at last"


def test_retrying_can_be_stopped() -> None:
    stop = StopSignal()

    def ask() -> str:
        stop.set()
        raise BROKEN

    with pytest.raises(Interrupted):
        retrying(ask, RetryPolicy(first_delay_seconds=30), stop)


def test_a_passing_status_keeps_its_public_name() -> None:
    assert busy(None).kind == "mirror-status"


SILENT = MirrorTimeout("a", detail="b", hint="c")


@pytest.mark.parametrize(
    ("error", "silent_seconds", "timeout_seconds", "ends"),
    [
        (SILENT, 7.1, 7.0, False),
        (SILENT, 14.2, 7.0, True),
        (SILENT, 30.0, 30.0, False),
        (SILENT, 60.0, 30.0, True),
        (SILENT, 2.0, 1.0, False),
        (BROKEN, 100.0, 7.0, False),
        (busy(60.0), 100.0, 7.0, False),
    ],
)
def test_the_second_timeout_in_a_row_ends_it_where_nobody_delivers(
    error, silent_seconds, timeout_seconds, ends
) -> None:
    assert is_too_silent(error, silent_seconds, timeout_seconds) is ends
