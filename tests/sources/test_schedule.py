"""The schedule: what it hands out, takes back, steals and races; then whole transfers in a simulated world."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_fetch.sources import schedule as rules
from mistral_fetch.sources.schedule import Run, Schedule
from mistral_fetch.spans import PieceGrid
from mistral_fetch.units import MIB
from tests.sources.world import LATENCY_SECONDS, STEP_SECONDS, Rate, World, constant, dying, turning

PIECE = MIB
A, B, C = "mirror a", "mirror b", "mirror c"
NOW = 100.0
LATER = NOW + rules.SETTLE_SECONDS


def plan(
    pieces: int = 100,
    *,
    rates: dict[str, float] | None = None,
    missing: list[int] | None = None,
    mirrors: tuple[str, ...] = (A, B, C),
) -> Schedule:
    """Return the schedule of one file of so many pieces of a MiB."""
    wanted = list(range(pieces)) if missing is None else missing
    return Schedule([(PieceGrid(pieces * PIECE, PIECE), wanted, mirrors)], (rates or {}).get)


def take(schedule: Schedule, mirror: str, now: float = NOW) -> Run:
    run = schedule.take(mirror, now)
    assert run is not None
    return run


def indices(run: Run) -> list[int]:
    return list(range(run.next, run.end))


def fast(run: Run, rate: float, until: float = LATER) -> None:
    """Let bytes of a run come at a rate, from its beginning on."""
    run.received(int(rate * (until - run.began_seconds)), until)


def test_pieces_are_handed_out_from_the_front_without_gaps_or_overlaps() -> None:
    schedule = plan(30)
    runs = [take(schedule, mirror) for mirror in (A, B, A, C)]
    assert [index for run in runs for index in indices(run)] == list(range(30))


def test_only_what_is_missing_is_handed_out_and_no_run_spans_a_gap() -> None:
    schedule = plan(10, missing=[0, 1, 4, 5, 9])
    assert [indices(take(schedule, A)) for _ in range(3)] == [[0, 1], [4, 5], [9]]
    assert schedule.jobs[0].missing_count == 5


def test_a_mirror_that_nobody_knows_gets_a_probe() -> None:
    assert len(indices(take(plan(1000), A))) * PIECE == rules.FIRST_RUN_BYTES


@pytest.mark.parametrize(
    "rate, pieces, left",
    [
        (2 * MIB, 16, 1000),  # eight seconds' worth
        (0.01 * MIB, 1, 1000),  # never less than a piece
        (900 * MIB, 256, 5000),  # never more than the longest
        (20 * MIB, 80, 100),  # most of what is left
        (20 * MIB, 20, 24),  # but never less than a second's worth
        (40 * MIB, 24, 24),  # nor more than there is
    ],
)
def test_a_run_is_as_long_as_its_mirror_is_fast(rate: float, pieces: int, left: int) -> None:
    assert len(indices(take(plan(left, rates={A: rate}), A))) == pieces


def test_towards_the_end_each_mirror_gets_what_it_brings_in_the_same_time() -> None:
    schedule = plan(108, rates={A: 20.0 * MIB, B: 5.0 * MIB})
    slow = take(schedule, B)
    quick = take(schedule, A)
    assert (len(indices(slow)), len(indices(quick))) == (40, 43)
    # 25 pieces are left for 25 pieces a second: neither gets more than a second's worth.
    assert len(indices(take(schedule, B))) == 5
    assert len(indices(take(schedule, A))) == 20


def test_what_is_left_is_that_of_all_files() -> None:
    grid = PieceGrid(10 * PIECE, PIECE)
    schedule = Schedule([(grid, range(10), (A,))] * 8, {A: 5.0 * MIB}.get)
    assert len(indices(take(schedule, A))) == 10, "the end of a file is not the end of the transfer"


def test_files_that_a_mirror_lacks_are_nothing_left_for_it() -> None:
    grid = PieceGrid(10 * PIECE, PIECE)
    schedule = Schedule([(grid, range(10), (A,)), *[(grid, range(10), (B,))] * 8], {A: 5.0 * MIB}.get)
    assert len(indices(take(schedule, A))) == 8


def test_files_are_begun_in_their_order() -> None:
    grid = PieceGrid(2 * PIECE, PIECE)
    schedule = Schedule([(grid, range(2), (A, B)), (grid, range(2), (A, B))], {}.get)
    assert [(run.job, indices(run)) for run in (take(schedule, A), take(schedule, B))] == [(0, [0, 1]), (1, [0, 1])]


def test_a_mirror_that_has_one_of_the_files_is_asked_for_that_one_only() -> None:
    grid = PieceGrid(2 * PIECE, PIECE)
    schedule = Schedule([(grid, range(2), (A,)), (grid, range(2), (A, B))], {}.get)
    take(schedule, A)
    run = take(schedule, B)
    assert (run.job, indices(run)) == (1, [0, 1])
    schedule.piece_done(run, 0)
    schedule.piece_done(run, 1)
    assert schedule.take(B, NOW + 60) is None, "not even what others fetch of the file that it lacks"


def test_what_a_failed_run_did_not_bring_is_handed_out_again_first() -> None:
    schedule = plan(100)
    run = take(schedule, A)
    schedule.piece_done(run, 0)
    schedule.piece_done(run, 1)
    schedule.release(run)
    assert indices(take(schedule, B))[0] == 2
    assert schedule.jobs[0].missing_count == 98


def test_a_run_given_back_twice_is_handed_out_once() -> None:
    schedule = plan(3)
    run = take(schedule, A)
    schedule.release(run)
    again = take(schedule, B)
    schedule.release(run)
    assert indices(again) == [0, 1, 2]
    assert schedule.take(C, NOW) is None


def test_a_mirror_that_was_left_out_gets_nothing_and_the_others_everything() -> None:
    schedule = plan(20)
    run = take(schedule, A)
    schedule.exclude(0, A)
    schedule.release(run)
    assert schedule.take(A, NOW) is None
    assert indices(take(schedule, B))[0] == 0


def test_a_free_connection_takes_the_end_of_the_run_that_would_finish_last() -> None:
    schedule = plan(16, rates={A: 1.0 * MIB, B: 1.0 * MIB})
    slow, quick = take(schedule, A), take(schedule, B)
    schedule.release(take(schedule, C))
    slow.end, quick.end = 8, 16
    schedule.jobs[0].waiting.clear()
    fast(slow, 0.5 * MIB, NOW + 2)
    fast(quick, 4 * MIB, NOW + 2)
    stolen = take(schedule, B, NOW + 2)
    assert stolen.end == 8
    assert slow.end == stolen.next
    assert quick.end == 16


def test_a_steal_divides_by_rate_and_leaves_the_piece_that_is_coming() -> None:
    schedule = plan(9, rates={B: 3.0 * MIB})
    run = take(schedule, A)
    rest = take(schedule, A)
    schedule.piece_done(rest, 8)
    fast(run, 1 * MIB)
    stolen = take(schedule, B, LATER)
    assert (indices(run), indices(stolen)) == ([0, 1, 2], [3, 4, 5, 6, 7])


def test_nothing_is_stolen_that_its_own_connection_brings_sooner() -> None:
    schedule = plan(2, rates={A: 50.0 * MIB, B: 50.0 * MIB})
    fast(take(schedule, A), 50 * MIB)
    assert schedule.take(B, LATER) is None


def test_a_run_of_an_unknown_mirror_is_let_settle() -> None:
    schedule = plan(8)
    take(schedule, A)
    assert schedule.take(B, LATER - 0.01) is None
    assert schedule.take(B, LATER) is not None


def last_piece_raced() -> tuple[Schedule, Run, Run]:
    schedule = plan(1, rates={B: 50.0 * MIB})
    victim = take(schedule, A)
    fast(victim, 0.1 * MIB)
    return schedule, victim, take(schedule, B, LATER)


def test_a_last_piece_that_is_slow_is_raced_once() -> None:
    schedule, victim, race = last_piece_raced()
    assert race.is_race
    assert (indices(race), indices(victim)) == ([0], [0])
    assert schedule.take(C, LATER) is None


def test_a_last_piece_that_nearly_is_there_is_not_raced() -> None:
    schedule = plan(1, rates={A: 1.0 * MIB, B: 20.0 * MIB})
    fast(take(schedule, A), 0.9 * MIB, NOW + 1)
    assert schedule.take(B, NOW + 1) is None


@pytest.mark.parametrize("winner_is_race", [True, False])
def test_the_loser_of_a_race_is_told_and_its_piece_not_handed_out_again(winner_is_race: bool) -> None:
    schedule, victim, race = last_piece_raced()
    winner, loser = (race, victim) if winner_is_race else (victim, race)
    assert schedule.piece_done(winner, 0) == [loser]
    assert loser.is_abandoned
    assert schedule.is_complete
    assert schedule.runs == []
    assert schedule.take(C, LATER) is None
    assert schedule.piece_done(loser, 0) == [], "a loser may have its piece whole before it hears of it"
    assert schedule.jobs[0].missing_count == 0


def test_a_loser_still_names_the_piece_that_it_is_reading() -> None:
    # Its thread reads ``next`` without asking anybody: were it moved on, a whole piece would be kept as the one after.
    schedule = plan(3, missing=[1], rates={B: 50.0 * MIB})
    victim = take(schedule, A)
    fast(victim, 0.1 * MIB)
    race = take(schedule, B, LATER)
    schedule.piece_done(race, 1)
    assert (victim.next, victim.end) == (1, 2)


@pytest.mark.parametrize("who_fails", ["victim", "race"])
def test_a_raced_piece_is_given_back_when_both_have_failed(who_fails: str) -> None:
    schedule, victim, race = last_piece_raced()
    first, second = (victim, race) if who_fails == "victim" else (race, victim)
    schedule.release(first)
    assert schedule.jobs[0].waiting == [], "the other one is still at it"
    schedule.release(second)
    assert schedule.jobs[0].waiting == [(0, 1)]


def test_a_race_that_is_left_alone_may_be_raced_itself() -> None:
    schedule, victim, race = last_piece_raced()
    schedule.release(victim)
    silent = LATER + rules.SILENT_SECONDS
    assert not race.is_race
    assert take(schedule, C, silent).is_race


def test_a_race_that_has_stalled_does_not_keep_others_from_racing() -> None:
    schedule, _, race = last_piece_raced()
    schedule.exclude(0, A)
    assert take(schedule, C, race.began_seconds + rules.SILENT_SECONDS).is_race


def test_a_slow_race_does_not_keep_a_faster_mirror_from_racing() -> None:
    rates = {B: 50.0 * MIB, C: 50.0 * MIB}
    schedule = plan(1, rates=rates)
    fast(take(schedule, A), 10_000)
    slow = take(schedule, B, LATER)
    rates[B] = 10_000  # it turns out not to be what it was
    later = LATER + rules.SETTLE_SECONDS
    fast(slow, 10_000, later)
    assert take(schedule, C, later).is_race


def test_a_run_that_has_stalled_does_not_live_on_its_past() -> None:
    schedule = plan(8, rates={A: 50.0 * MIB, B: 50.0 * MIB})
    run = take(schedule, A)
    run.next = 7
    run.received(8 * MIB - 1000, NOW + 1)  # fast, and then silent a thousand bytes before the end
    assert schedule.take(B, NOW + 2) is None
    assert take(schedule, B, NOW + 1 + rules.SILENT_SECONDS).is_race


def test_a_last_short_piece_that_came_whole_and_wrong_is_taken_over() -> None:
    """A liar's peer sends all of it, the piece fails, and nobody else would ever be asked for the rest of nothing."""
    short = PieceGrid(PIECE // 2, PIECE)
    schedule = Schedule([(short, [0], (A, B))], {A: 5.0 * MIB, B: 5.0 * MIB}.get)
    take(schedule, A).received(PIECE // 2, NOW + 1)
    assert schedule.take(B, NOW + 2) is None
    assert take(schedule, B, NOW + 1 + rules.SILENT_SECONDS).is_race


def test_a_run_that_trickles_is_known_by_its_last_seconds() -> None:
    run = Run(0, A, 0, 8, NOW)
    run.received(100 * MIB, NOW + 1)
    for second in range(2, 6):
        run.received(1000, NOW + second)
    assert 500 <= run.recent_rate(NOW + 5) <= 2000


def test_on_a_slow_line_long_silence_is_no_stall() -> None:
    rate = 4096.0
    schedule = plan(1, rates={A: rate, B: rate})
    run = take(schedule, A)
    fast(run, 2 * rate, NOW + 100)
    assert schedule.take(B, NOW + 100 + 2 * rules.SILENT_SECONDS) is None


@pytest.mark.parametrize("mirror", [A, B])
def test_a_new_connection_on_a_slow_line_expects_no_miracles(mirror: str) -> None:
    # Nobody has finished a piece yet, so no mirror's rate is known; what comes at present is.
    schedule = plan(1)
    fast(take(schedule, A), 10_000, NOW + 5)
    assert schedule.take(mirror, NOW + 5) is None


def test_a_mirror_that_was_too_slow_to_bring_a_piece_is_remembered_as_slow() -> None:
    schedule = plan(3, missing=[0, 2])
    failed = take(schedule, A)
    fast(failed, 1000)
    schedule.release(failed)
    slow, quick = take(schedule, B, LATER), take(schedule, C, LATER)
    fast(slow, 10_000, LATER + 1)
    fast(quick, 0.9 * MIB, LATER + 1)
    assert schedule.take(A, LATER + 1) is None
    assert schedule.take(C, LATER + 1) is not None


# Whole transfers. 64 MiB/s and more for seconds, so that what the end costs is seen.

MB = 1_000_000
FILE = PieceGrid(1024 * MIB, 4 * MIB)
STALL_COSTS = rules.SILENT_SECONDS + 0.5


def play(rates: list[Rate], connections_each: int = 1, grid: PieceGrid = FILE) -> World:
    world = World([(grid, range(grid.count), range(len(rates)))], rates, connections_each)
    world.play()
    return world


def bound(world: World, ideal: float, fastest: float) -> float:
    """Return how long a good schedule may take: 5 % and a piece more than ideal, its requests, and one at the end."""
    requests = len(world.requests) / len(world.connections)
    costs = requests * (LATENCY_SECONDS + STEP_SECONDS) + rules.REQUEST_SECONDS
    return 1.05 * ideal + FILE.piece_length / fastest + costs


def assert_each_once(world: World) -> None:
    for number, (grid, missing, _) in enumerate(world.jobs):
        assert all(1 <= world.delivered[number, index] <= 2 for index in missing)
        assert sum(world.delivered[number, index] for index in range(grid.count)) >= len(missing)


@pytest.mark.parametrize(
    "rates, connections_each",
    [((50, 50, 50, 1.25), 1), ((25, 25, 25, 25), 2), ((100, 10, 1, 0.5), 1), ((6, 6, 6, 6), 4), ((80,), 4)],
)
def test_mirrors_of_any_rates_are_used_to_the_full(rates: tuple[float, ...], connections_each: int) -> None:
    world = play([constant(rate * MB) for rate in rates], connections_each)
    ideal = FILE.size / (sum(rates) * connections_each * MB)
    assert world.elapsed <= bound(world, ideal, max(rates) * MB)
    assert_each_once(world)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_mirror_that_dies_costs_no_more_than_its_rate(share: float) -> None:
    death = share * FILE.size / (150 * MB)
    world = play([constant(50 * MB), constant(50 * MB), dying(50 * MB, death)])
    ideal = death + (FILE.size - 150 * MB * death) / (100 * MB)
    assert world.elapsed <= bound(world, ideal, 50 * MB)
    assert_each_once(world)


@pytest.mark.parametrize("rate_later", [0, 1000], ids=["stalls", "trickles"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_a_mirror_that_goes_bad_does_not_hold_up_the_end(share: float, rate_later: float) -> None:
    turn = share * FILE.size / (150 * MB)
    world = play([constant(50 * MB), constant(50 * MB), turning(50 * MB, turn, rate_later)])
    ideal = turn + (FILE.size - 150 * MB * turn) / (100 * MB)
    assert world.elapsed <= bound(world, ideal, 50 * MB) + STALL_COSTS
    assert_each_once(world)


def test_a_stalled_connection_is_raced_by_another_one_to_the_same_mirror() -> None:
    class OneStalls(World):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.connections[0].rate = turning(50 * MB, 3.0, 0)

    world = OneStalls([(FILE, range(FILE.count), [0])], [constant(50 * MB)], 3)
    ideal = 3.0 + (FILE.size - 150 * MB * 3.0) / (100 * MB)
    assert world.play() <= bound(world, ideal, 50 * MB) + STALL_COSTS


def test_many_files_cost_few_requests() -> None:
    grid = PieceGrid(100 * MIB, 4 * MIB)
    world = World([(grid, range(grid.count), range(4))] * 10, [constant(25 * MB)] * 4, 4)
    elapsed = world.play()
    assert elapsed <= bound(world, 1000 * MIB / (400 * MB), 25 * MB)
    assert len(world.requests) <= 80
    assert_each_once(world)


def test_a_line_that_is_slow_for_everybody_brings_few_bytes_twice() -> None:
    world = play([constant(MB / 16)] * 16, grid=PieceGrid(64 * MIB, 4 * MIB))
    assert world.wasted_bytes == 0
    assert set(world.delivered.values()) == {1}


RATES = st.floats(0.05 * MB, 200 * MB)
MOMENTS = st.floats(0.0, 20.0)
BEHAVIOURS = st.one_of(
    st.builds(constant, RATES),
    st.builds(dying, RATES, MOMENTS),
    st.builds(turning, RATES, MOMENTS, st.sampled_from([0.0, 500.0])),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(BEHAVIOURS, max_size=4),
    st.floats(5 * MB, 200 * MB),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3 * MIB)), min_size=1, max_size=3),
    st.data(),
)
def test_whatever_mirrors_do_every_piece_comes_as_long_as_one_lives(
    others: list[Rate], living: float, connections_each: int, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    rates = [constant(living), *others]
    jobs = []
    for pieces, surplus in sizes:
        grid = PieceGrid(pieces * 4 * MIB + surplus, 4 * MIB)
        missing = sorted(data.draw(st.sets(st.integers(0, grid.count - 1), min_size=1)))
        having = [0, *sorted(data.draw(st.sets(st.integers(0, len(others)))) - {0})]
        jobs.append((grid, missing, having))
    world = World(jobs, rates, connections_each)
    # At worst the living mirror brings all of it, after waiting for each of the others to be found out.
    total = sum(len(missing) * grid.piece_length for grid, missing, _ in jobs)
    world.play(60 + 4 * total / living)
    assert_each_once(world)
    assert {(n, i) for n, (_, missing, _) in enumerate(jobs) for i in missing} == set(world.delivered)
    assert world.schedule.runs == []


@pytest.mark.parametrize(
    "request_seconds, pieces",
    [
        (0.001, 5),  # next door: a quarter of a second is long enough
        (0.04, 20),  # 25 times what the request took
        (5.0, 160),  # never longer than some seconds
    ],
)
def test_a_run_lasts_so_long_that_its_request_does_not_matter(request_seconds: float, pieces: int) -> None:
    grid = PieceGrid(5000 * MIB, MIB)
    schedule = Schedule([(grid, range(5000), [A])], lambda _: 20.0 * MIB, lambda _: request_seconds)
    run = schedule.take(A, 100.0)
    assert run is not None
    assert run.end - run.next == pieces


def test_a_first_run_that_is_far_too_long_for_its_mirror_gives_up_what_it_has_not_begun() -> None:
    # The slow mirror was given two pieces before anybody knew, and whoever hashes the file waits for them.
    rates = {A: None, B: 20.0 * MIB}
    schedule = Schedule([(PieceGrid(400 * MIB, 4 * MIB), range(100), [A, B])], lambda mirror: rates[mirror])
    slow = schedule.take(A, 100.0)
    assert slow is not None
    assert (slow.next, slow.end) == (0, 2)
    slow.received(100_000, 101.0)
    relief = schedule.take(B, 101.0)
    assert relief is not None
    assert ((slow.next, slow.end), (relief.next, relief.end)) == ((0, 1), (1, 2))
    following = schedule.take(B, 101.0)
    assert following is not None
    assert following.next == 2  # the piece under way is left to whoever has begun it


def test_a_mirror_that_would_be_done_after_everybody_else_is_given_nothing() -> None:
    rates = {A: 20.0 * MIB, B: 0.5 * MIB}
    schedule = Schedule([(PieceGrid(80 * MIB, 4 * MIB), range(20), [A, B])], lambda mirror: rates[mirror])
    assert schedule.take(A, 100.0) is not None
    assert schedule.take(B, 100.0) is None  # eight seconds for a piece, and three are left
    schedule.exclude(0, A)
    for run in list(schedule.runs):
        schedule.release(run)
    assert schedule.take(B, 100.0) is not None  # but alone it is better than nobody
