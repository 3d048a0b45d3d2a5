"""What the schedule gives to a source that brings pieces in an order of its own, and what it takes from it."""

from __future__ import annotations

from mistral_fetch.sources import schedule as rules
from tests.sources.test_schedule import LATER, NOW, PIECE, A, B, fast, indices, plan, take

SWARM = "swarm"
EVERYWHERE = (A, B, SWARM)


def has_all(_number: int, _index: int) -> bool:
    return True


def test_it_works_from_the_end_a_piece_at_a_time() -> None:
    schedule = plan(10, mirrors=EVERYWHERE)
    taken = [schedule.take_last(SWARM, has_all, NOW) for _ in range(3)]
    assert [indices(run) for run in taken if run] == [[9], [8], [7]]
    assert indices(take(schedule, A))[0] == 0


def test_only_what_it_has_is_given_to_it() -> None:
    schedule = plan(10, mirrors=EVERYWHERE)
    taken = [schedule.take_last(SWARM, lambda _, index: index in {2, 5}, NOW) for _ in range(3)]
    assert [run and run.next for run in taken] == [5, 2, None]
    rest = [index for _ in range(3) for index in indices(take(schedule, A))]
    assert not {2, 5} & set(rest)


def test_it_gets_nothing_of_files_that_it_is_not_asked_for() -> None:
    assert plan(10, mirrors=(A, B)).take_last(SWARM, has_all, NOW) is None


def test_it_takes_the_end_of_a_slow_run_when_nothing_is_waiting() -> None:
    schedule = plan(8, rates={SWARM: 50.0 * PIECE}, mirrors=EVERYWHERE)
    run = take(schedule, A)
    fast(run, 0.1 * PIECE)
    while schedule.jobs[0].waiting:
        schedule.take_last(SWARM, lambda _, index: index >= run.end, NOW)
    end = run.end
    stolen = schedule.take_last(SWARM, has_all, LATER)
    assert stolen is not None
    assert (indices(stolen), run.end) == ([end - 1], end - 1)


def test_it_takes_nothing_from_itself() -> None:
    schedule = plan(2, rates={SWARM: 50.0 * PIECE}, mirrors=EVERYWHERE)
    for _ in range(2):
        assert schedule.take_last(SWARM, has_all, NOW) is not None
    assert schedule.take_last(SWARM, has_all, LATER + 60) is None


def test_a_piece_in_line_is_not_raced_while_its_source_delivers() -> None:
    schedule = plan(2, rates={SWARM: 1.0 * PIECE, A: 1.0 * PIECE}, mirrors=EVERYWHERE)
    runs = [schedule.take_last(SWARM, has_all, NOW) for _ in range(2)]
    for run in runs:
        assert run is not None
        run.heard_seconds = LATER
    assert schedule.take(A, LATER) is None


def test_a_piece_of_a_source_that_has_fallen_silent_is_raced() -> None:
    schedule = plan(2, rates={SWARM: 1.0 * PIECE, A: 1.0 * PIECE}, mirrors=EVERYWHERE)
    for _ in range(2):
        schedule.take_last(SWARM, has_all, NOW)
    race = schedule.take(A, NOW + rules.MOST_SILENT_SECONDS + 1)
    assert race is not None
    assert race.is_race
