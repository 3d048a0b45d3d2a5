"""The last pieces of a transfer: no slow connection holds them, not even one that won the right to race for them."""

from __future__ import annotations

from mistral_fetch.sources.schedule import SETTLE_SECONDS, Run, Schedule
from mistral_fetch.spans import PieceGrid
from mistral_fetch.units import MIB

FAST, SLOW = "fast", "slow"
# A slow mirror's rate is not known before it has brought a piece, which is what it does not do.
RATES = {FAST: 10.0 * MIB, SLOW: None}
LATER = 2 * SETTLE_SECONDS


def one_piece() -> tuple[Schedule, Run]:
    """Return a schedule of a single piece, and the slow mirror's run for it."""
    schedule = Schedule([(PieceGrid(4 * MIB, 4 * MIB), [0], [SLOW, FAST])], lambda mirror: RATES[str(mirror)])
    run = schedule.take(SLOW, 0.0)
    assert run is not None
    return schedule, run


def test_a_slow_mirror_does_not_race_itself_on_the_strength_of_a_rate_it_never_reached() -> None:
    schedule, run = one_piece()
    run.received(1000, LATER)
    assert schedule.take(SLOW, LATER) is None
    race = schedule.take(FAST, LATER)
    assert race is not None
    assert race.is_race


def test_a_race_that_turns_out_slow_is_raced_again() -> None:
    rates = {FAST: 10.0 * MIB, SLOW: 10.0 * MIB}  # what the slow one reached in an earlier transfer
    schedule = Schedule([(PieceGrid(4 * MIB, 4 * MIB), [0], [SLOW, FAST])], lambda m: rates[str(m)])
    run = schedule.take(SLOW, 0.0)
    race = schedule.take(SLOW, LATER)
    assert run is not None
    assert race is not None
    run.received(1000, LATER)
    race.received(500, LATER)
    assert schedule.take(FAST, LATER) is None, "nobody knows yet how fast the race is"
    second = schedule.take(FAST, 2 * LATER)
    assert second is not None
    assert set(schedule.piece_done(second, 0)) == {run, race}
    assert schedule.is_complete


def test_a_race_that_is_left_alone_and_slow_is_raced() -> None:
    schedule, run = one_piece()
    run.received(1000, LATER)
    race = schedule.take(FAST, LATER)
    assert race is not None
    schedule.release(run)  # its connection broke: the race is all there is now
    race.received(1000, 2 * LATER)
    assert schedule.take(FAST, 2 * LATER) is not None


def test_a_race_that_is_fast_enough_is_left_alone() -> None:
    schedule, run = one_piece()
    run.received(1000, LATER)
    race = schedule.take(FAST, LATER)
    assert race is not None
    race.received(3 * MIB, 2 * LATER)
    assert schedule.take(FAST, 2 * LATER) is None
