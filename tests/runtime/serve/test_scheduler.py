"""Who runs next, as a table of cases; no model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.idle_caches import MIN_SHARED, CacheSlot, IdleCaches, shared_length
from mistral_runtime.serve.scheduler import Entry, Limits, Plan, Scheduler

LIMITS = Limits(cache_positions=100, max_running=3, prefill_chunk=8, prefill_alone=32)


def entry(key: str, arrival: int, *, prompt: int = 10, positions: int = 20, priority: int = 0) -> Entry:
    return Entry(priority, arrival, key, prompt, positions)


def admitted(scheduler: Scheduler) -> list[str]:
    keys = []
    while (found := scheduler.admit()) is not None:
        keys.append(found.key)
    return keys


def scheduler_of(*entries: Entry, limits: Limits = LIMITS) -> Scheduler:
    scheduler = Scheduler(limits)
    for one in entries:
        scheduler.add(one)
    return scheduler


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([entry("a", 1), entry("b", 2), entry("c", 3), entry("d", 4)], ["a", "b", "c"]),  # max_running
        ([entry("a", 1), entry("b", 2, priority=-1)], ["b", "a"]),
        ([entry("late", 2), entry("early", 1)], ["early", "late"]),
        ([entry("a", 1, positions=60), entry("b", 2, positions=60), entry("c", 3, positions=10)], ["a"]),
        ([entry("a", 1, positions=60), entry("b", 2, positions=40), entry("c", 3, positions=1)], ["a", "b"]),
        ([entry("a", 1, positions=100)], ["a"]),
    ],
    ids=["as many as may run", "priority first", "arrival order", "no overtaking", "exactly full", "alone"],
)
def test_admission(entries: list[Entry], expected: list[str]) -> None:
    assert admitted(scheduler_of(*entries)) == expected


def test_room_is_given_on_in_order() -> None:
    scheduler = scheduler_of(entry("a", 1, positions=60), entry("b", 2, positions=90), entry("c", 3, positions=10))
    assert admitted(scheduler) == ["a"]
    scheduler.remove("a")
    assert admitted(scheduler) == ["b", "c"]
    assert (scheduler.free, scheduler.running, scheduler.waiting) == (0, 2, 0)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(BadRequest, match=r"at most 100 positions, found 101"):
        Scheduler(LIMITS).add(entry("a", 1, positions=101))


def test_streams_go_on_beside_a_long_prompt() -> None:
    scheduler = scheduler_of(entry("a", 1, prompt=40, positions=41), entry("b", 2, prompt=30, positions=31))
    admitted(scheduler)
    assert scheduler.plan() == Plan([], [("a", 32)])
    scheduler.note_computed("a", 32)
    assert scheduler.plan() == Plan([], [("a", 8), ("b", 24)])  # what one leaves of the budget is the next one's
    scheduler.note_computed("a", 8)
    assert scheduler.plan() == Plan(["a"], [("b", 8)])  # somebody decodes: small chunks
    scheduler.note_computed("b", 30)
    assert scheduler.plan() == Plan(["a", "b"], [])
    scheduler.remove("a")
    assert scheduler.plan() == Plan(["b"], [])


def test_deterministic_chunks_end_at_multiples_and_come_one_at_a_time() -> None:
    scheduler = scheduler_of(
        entry("a", 1, prompt=20), entry("b", 2, prompt=9), limits=replace(LIMITS, deterministic=True)
    )
    admitted(scheduler)
    seen = []
    while chunks := scheduler.plan().prefill:
        ((key, count),) = chunks
        seen.append((key, count))
        scheduler.note_computed(key, count)
    assert seen == [("a", 8), ("a", 8), ("a", 4), ("b", 8), ("b", 1)]


class Rows:
    """A cache as `IdleCaches` sees it, of a window that takes nothing back if so wished."""

    def __init__(self, length: int, *, is_window: bool = False) -> None:
        self.length = length
        self.is_window = is_window

    def rewind(self, count: int) -> None:
        if count and self.is_window:
            raise ValueError("rolled")
        self.length -= count


def slot(ids: list[int], *, capacity: int = 100, whole: int = 0, is_window: bool = False) -> CacheSlot:
    return CacheSlot(Rows(len(ids), is_window=is_window), capacity, ids, len(ids), whole)


BASE = list(range(40))


@pytest.mark.parametrize(
    "ids, prompt, expected",
    [
        (BASE, [*BASE, 7], 40),
        (BASE, BASE, 39),  # the last token is always computed anew
        (BASE, [*BASE[:20], 99, 98], 20),
        (BASE, [*BASE[:MIN_SHARED], 99], MIN_SHARED),
        (BASE, [*BASE[: MIN_SHARED - 1], 99], None),
        (BASE, [99, *BASE], None),
    ],
)
def test_a_prompt_takes_over_what_it_shares(ids: list[int], prompt: list[int], expected: int | None) -> None:
    idle = IdleCaches()
    idle.keep(slot(list(ids)))
    taken = idle.take(prompt, positions=50)
    assert (None if taken is None else taken.cache.length) == expected
    assert len(idle) == (1 if taken is None else 0)
    if taken is not None:
        assert taken.ids == prompt[:expected]
        assert taken.touched == len(ids)  # its memory stays taken


def test_the_longest_beginning_wins_and_a_rolled_window_is_passed_over() -> None:
    idle = IdleCaches()
    rolled, good, small = slot([*BASE, 77], is_window=True), slot(BASE[:30]), slot(BASE[:38], capacity=39)
    for one in (rolled, good, small):
        idle.keep(one)
    assert idle.take([*BASE, 99], positions=41) is good
    assert idle.take([*BASE, 77, 99], positions=43) is rolled


def test_idle_caches_are_given_up_oldest_first() -> None:
    idle = IdleCaches()
    for start in (0, 100, 200):
        idle.keep(slot(list(range(start, start + 20))))
    assert idle.positions == 60
    idle.evict_to(45)
    assert (len(idle), idle.positions) == (2, 40)
    assert idle.take(list(range(30)), positions=31) is None
    idle.evict_to(0)
    assert len(idle) == 0


@pytest.mark.parametrize(
    "whole, prompt_length, expected", [(40, 41, 40), (40, 40, 32), (39, 41, 32), (24, 41, 24), (8, 41, None)]
)
def test_deterministic_prefixes_are_whole_chunks(whole: int, prompt_length: int, expected: int | None) -> None:
    idle = IdleCaches(chunk=8)
    idle.keep(slot(list(BASE), whole=whole))
    taken = idle.take([*BASE, 99][:prompt_length], positions=50)
    assert (None if taken is None else taken.cache.length) == expected


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
def test_shared_length(length: int) -> None:
    left = list(range(8))
    right = [*left[:length], *([99] if length < 8 else [])]
    assert shared_length(left, right) == shared_length(right, left) == length
