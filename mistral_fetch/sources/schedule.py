"""Which pieces to ask of which mirror next. Pure: no threads, no sockets, no clock; the time is handed in.

Work is handed out from the front of each file in runs of consecutive pieces, so that whoever hashes the file from its
beginning can follow. A run is as long as its mirror's rate lets it take a few seconds, and towards the end most of the
time that is left. When nothing is left to hand out, a free connection takes the end of the run that would finish last,
and where that run is down to its last piece, races it for the piece. How fast a run is, is what it reached in the last
seconds: one that has stalled must not live on its past.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from mistral_fetch.spans import PieceGrid, Span
from mistral_fetch.units import KIB, MIB

# A request and a new connection for each run must not be felt: it lasts so many times what asking for it took. Not
# longer, because whoever hashes the file waits for the first of the runs under way.
RUN_PER_REQUEST = 25.0
LEAST_RUN_SECONDS = 0.25
RUN_SECONDS = 8.0
LONGEST_RUN_BYTES = 256 * MIB
# A run shorter than this pays its request too often even at the end; a longer one is taken apart by others then.
SHORTEST_RUN_SECONDS = 1.0
# How much of the time that is left a run may take: so the last ones end together, however unlike their mirrors are.
FAIR_SHARE = 0.8
# What is assumed of a mirror before anything is known: a probe of a piece or two.
FIRST_RUN_BYTES = 8 * MIB
# What a request costs before its first byte; a steal that saves less is none.
REQUEST_SECONDS = 0.25
# Before this, nobody knows how fast a run is: its mirror's rate stands for it, and nobody races it.
SETTLE_SECONDS = 0.5
# A run that is so many times slower than the connection that is free gives up what it has not begun.
RELIEF_FACTOR = 4.0
# A race makes somebody's bytes superfluous, so it must save much.
RACE_FACTOR = 2.0
# A run's rate is that of its last one or two such windows.
WINDOW_SECONDS = 1.0
# Without a byte for so long, a run counts as stalled. A slow line brings less often: see SILENT_BYTES.
SILENT_SECONDS = 2.0
MOST_SILENT_SECONDS = 15.0
# What comes of a connection at once, at worst: a run that is silent while so much would have come has stalled.
SILENT_BYTES = 32 * KIB

Mirror = Hashable


@dataclass(eq=False)
class Run:
    """Consecutive pieces of one file that one connection is fetching. Its ``end`` may be moved up by a steal."""

    job: int
    mirror: Mirror
    next: int
    """The piece being fetched."""
    end: int
    """One past its last piece."""
    began_seconds: float
    received_bytes: int = 0
    """Bytes that came for this run so far."""
    is_race: bool = False
    is_abandoned: bool = False
    """Somebody else brought its last piece: what still comes is of no use."""
    is_shared: bool = False
    """One of many pieces that a source works on in an order of its own: they share what it brings."""
    heard_seconds: float = 0.0
    """When the last byte came."""
    _window: tuple[float, int] = (0.0, 0)
    """When the current window began, and what had come until then."""
    _window_before: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self.heard_seconds = self.began_seconds
        self._window = self._window_before = (self.began_seconds, 0)

    def received(self, length: int, now_seconds: float) -> None:
        """Count bytes; told by whoever fetches the run."""
        if now_seconds - self._window[0] >= WINDOW_SECONDS:
            self._window_before, self._window = self._window, (now_seconds, self.received_bytes)
        self.received_bytes += length
        self.heard_seconds = now_seconds

    def recent_rate(self, now_seconds: float) -> float:
        """Return the bytes per second of late."""
        is_long = now_seconds - self._window[0] >= WINDOW_SECONDS
        began, had_come = self._window if is_long else self._window_before
        return (self.received_bytes - had_come) / max(now_seconds - began, 1e-6)


@dataclass(eq=False)
class Job:
    """One file: its grid, what nobody fetches yet, and which mirrors have it."""

    grid: PieceGrid
    mirrors: set[Mirror]
    waiting: list[tuple[int, int]] = field(default_factory=list)
    """Half-open ranges of piece indices, sorted."""
    done: set[int] = field(default_factory=set)
    missing_count: int = 0

    @property
    def is_complete(self) -> bool:
        """Return whether every piece is there."""
        return self.missing_count == 0


class Schedule:
    """Hands out the missing pieces of several files to connections.

    Args:
        jobs: Each file's grid, missing pieces in order, and the mirrors that may have it.
        rate_of: The rate, in bytes per second, that one connection to a mirror reaches; None while unknown.
        request_seconds_of: How long a mirror takes to begin an answer; None while unknown.
    """

    def __init__(
        self,
        jobs: Iterable[tuple[PieceGrid, Sequence[int], Iterable[Mirror]]],
        rate_of: Callable[[Mirror], float | None],
        request_seconds_of: Callable[[Mirror], float | None] = lambda _: None,
    ) -> None:
        self.jobs = [
            Job(grid, set(mirrors), _ranges(missing), missing_count=len(missing)) for grid, missing, mirrors in jobs
        ]
        self.runs: list[Run] = []
        self._rate_of = rate_of
        self._request_seconds_of = request_seconds_of
        self._seen_rates: dict[Mirror, float] = {}

    @property
    def is_complete(self) -> bool:
        """Return whether every piece of every file is there."""
        return all(job.is_complete for job in self.jobs)

    def take(self, mirror: Mirror, now_seconds: float) -> Run | None:
        """Return the next run for a free connection to ``mirror``, or None when it cannot help at present."""
        relief = self._relieve(mirror, now_seconds)
        if relief is not None:
            return relief
        for number, job in enumerate(self.jobs):
            if job.waiting and mirror in job.mirrors and not self._would_be_late(job, mirror, now_seconds):
                return self._hand_out(number, job, mirror, now_seconds)
        return self._steal(mirror, now_seconds, lambda _run: True)

    def take_last(self, mirror: Mirror, has: Callable[[int, int], bool], now_seconds: float) -> Run | None:
        """Return one more piece for a source that brings pieces in an order of its own, or None.

        It works from the end, towards the connections that work from the front; where they meet, it takes the end of
        the slowest run, as a connection would.

        Args:
            mirror: The source.
            has: Whether it can bring a piece, by the number of the file and of the piece.
            now_seconds: The time.
        """
        for number, job in reversed(list(enumerate(self.jobs))):
            if mirror not in job.mirrors:
                continue
            for place, (first, end) in reversed(list(enumerate(job.waiting))):
                for index in reversed(range(first, end)):
                    if has(number, index):
                        job.waiting[place : place + 1] = [
                            part for part in ((first, index), (index + 1, end)) if part[0] < part[1]
                        ]
                        run = Run(number, mirror, index, index + 1, now_seconds, is_shared=True)
                        self.runs.append(run)
                        return run
        stolen = self._steal(
            mirror, now_seconds, lambda run: run.mirror != mirror and has(run.job, run.end - 1), most=1
        )
        if stolen is not None:
            stolen.is_shared = True
        return stolen

    def piece_done(self, run: Run, index: int) -> list[Run]:
        """Note that a piece is there, and return the runs that have become superfluous by it."""
        job = self.jobs[run.job]
        if index not in job.done:
            job.done.add(index)
            job.missing_count -= 1
        if run.next == index:
            run.next += 1
        if run.next >= run.end:
            self._drop(run)
        # In a race, the loser's connection is broken off rather than waited for. Its ``next`` stays as it is: its own
        # thread may be about to read it.
        losers = [other for other in self.runs if other.job == run.job and other is not run and other.next == index]
        for loser in losers:
            loser.is_abandoned = True
            self.release(loser)
        return losers

    def release(self, run: Run) -> None:
        """Take back what a failed run did not bring."""
        if run in self.runs:
            self._drop(run)
            self._give_back(run)
            for other in self.runs:
                if other.is_race and other.job == run.job and other.next == run.next:
                    other.is_race = False  # it is the only one now, and may be raced itself

    def exclude(self, job: int, mirror: Mirror) -> None:
        """Ask this mirror no more for this file."""
        self.jobs[job].mirrors.discard(mirror)

    def _drop(self, run: Run) -> None:
        if run in self.runs:
            self.runs.remove(run)
        if run.heard_seconds - run.began_seconds >= SETTLE_SECONDS:
            # A slow mirror may lose every piece to others before it has brought one: that must teach something.
            self._seen_rates[run.mirror] = run.received_bytes / (run.heard_seconds - run.began_seconds)

    def _give_back(self, run: Run) -> None:
        others = {index for other in self.runs if other.job == run.job for index in range(other.next, other.end)}
        job = self.jobs[run.job]
        again = [index for index in range(run.next, run.end) if index not in job.done and index not in others]
        job.waiting = _ranges(sorted({*again, *(i for first, end in job.waiting for i in range(first, end))}))

    def _hand_out(self, number: int, job: Job, mirror: Mirror, now_seconds: float) -> Run:
        first, end = job.waiting[0]
        stop = min(end, first + self._run_length(job, mirror, now_seconds))
        if stop < end:
            job.waiting[0] = (stop, end)
        else:
            del job.waiting[0]
        run = Run(number, mirror, first, stop, now_seconds)
        self.runs.append(run)
        return run

    def _run_length(self, job: Job, mirror: Mirror, now_seconds: float) -> int:
        """Return how many pieces a run may have: a few seconds' worth, less towards the end."""
        rate = self._rate_of(mirror)
        wanted: float = FIRST_RUN_BYTES
        if rate is not None:
            everybody = rate + sum(self._rate_now(run, now_seconds) for run in self.runs)
            seconds_left = self._waiting_bytes(mirror) / everybody
            longest = self._worthwhile_seconds(mirror)
            seconds = min(longest, max(SHORTEST_RUN_SECONDS, FAIR_SHARE * seconds_left))
            wanted = min(rate * seconds, LONGEST_RUN_BYTES)
        return max(1, int(wanted // job.grid.piece_length))

    def _relieve(self, mirror: Mirror, now_seconds: float) -> Run | None:
        """Take what a run has not begun that turned out far too long for its mirror: the first one, of unknown rate.

        Whoever hashes the file waits for it, so this comes before any other work.
        """
        for victim in self.runs:
            mine = self._rate_of(mirror) or 0.0
            is_far_slower = self._rate_now(victim, now_seconds) * RELIEF_FACTOR < mine
            if (
                is_far_slower
                and victim.next + 1 < victim.end
                and mirror in self.jobs[victim.job].mirrors
                and self._is_settled(victim, now_seconds)
                and self._seconds_left(victim, now_seconds) > RUN_SECONDS
            ):
                run = Run(victim.job, mirror, victim.next + 1, victim.end, now_seconds)
                victim.end = victim.next + 1
                self.runs.append(run)
                return run
        return None

    def _would_be_late(self, job: Job, mirror: Mirror, now_seconds: float) -> bool:
        """Return whether the others will be done with everything before this mirror is with a single piece."""
        rate, others = self._rate_of(mirror), sum(self._rate_now(run, now_seconds) for run in self.runs)
        if rate is None or others <= rate:
            return False
        left = self._waiting_bytes(mirror) / others
        return job.grid.piece_length / rate > max(left, SHORTEST_RUN_SECONDS)

    def _worthwhile_seconds(self, mirror: Mirror) -> float:
        """Return how long a run may last: as long as it takes for its request not to matter."""
        request = self._request_seconds_of(mirror)
        return RUN_SECONDS if request is None else min(RUN_SECONDS, max(LEAST_RUN_SECONDS, RUN_PER_REQUEST * request))

    def _waiting_bytes(self, mirror: Mirror) -> int:
        """Return how much there is to hand out to a mirror, of all files."""
        return sum(
            (end - first) * job.grid.piece_length
            for job in self.jobs
            if mirror in job.mirrors
            for first, end in job.waiting
        )

    def _steal(
        self, mirror: Mirror, now_seconds: float, may_take: Callable[[Run], bool], most: int | None = None
    ) -> Run | None:
        candidates = [
            run
            for run in self.runs
            if mirror in self.jobs[run.job].mirrors
            and not run.is_race
            and may_take(run)
            and (self._is_settled(run, now_seconds) or self._rate_of(run.mirror))
        ]
        candidates.sort(key=lambda run: -self._seconds_left(run, now_seconds))
        for victim in candidates:
            stolen = self._take_from(victim, mirror, now_seconds, most)
            if stolen is not None:
                self.runs.append(stolen)
                return stolen
        return None

    def _take_from(self, victim: Run, mirror: Mirror, now_seconds: float, most: int | None) -> Run | None:
        piece = self.jobs[victim.job].grid.piece_length
        mine = self._expected_rate(mirror, now_seconds)
        theirs = max(self._rate_now(victim, now_seconds), 1.0)
        left = self._seconds_left(victim, now_seconds)
        not_begun = victim.end - victim.next - 1
        if not_begun > 0:
            share = min(max(1, round(not_begun * mine / (mine + theirs))), most or not_begun)
            if REQUEST_SECONDS + share * piece / mine >= left:
                return None
            victim.end -= share
            return Run(victim.job, mirror, victim.end, victim.end + share, now_seconds)
        if not self._is_settled(victim, now_seconds):
            return None
        runners = [run for run in self.runs if run.job == victim.job and run.next == victim.next]
        soonest = min(self._seconds_left(run, now_seconds) for run in runners)
        if soonest < RACE_FACTOR * (REQUEST_SECONDS + piece / mine):
            return None
        return Run(victim.job, mirror, victim.next, victim.next + 1, now_seconds, is_race=True)

    def _expected_rate(self, mirror: Mirror, now_seconds: float) -> float:
        """Return what a new connection to a mirror is likely to reach: what its others do, or else anybody's."""
        known = self._rate_of(mirror)
        if known:
            return known
        rates = {
            run: run.recent_rate(now_seconds)
            for run in self.runs
            if self._is_settled(run, now_seconds) and not self._is_silent(run, now_seconds) and not run.is_shared
        }
        own = [rate for run, rate in rates.items() if run.mirror == mirror]
        return max(own, default=0.0) or self._seen_rates.get(mirror) or max(rates.values(), default=0.0) or float(MIB)

    def _rate_now(self, run: Run, now_seconds: float) -> float:
        """Return what a run's connection reaches: measured once there is something to measure."""
        if not self._is_settled(run, now_seconds):
            return self._expected_rate(run.mirror, now_seconds)
        if self._is_silent(run, now_seconds):
            return 0.0
        # A piece that its source has not come to yet is not a slow one.
        return self._expected_rate(run.mirror, now_seconds) if run.is_shared else run.recent_rate(now_seconds)

    @staticmethod
    def _is_settled(run: Run, now_seconds: float) -> bool:
        return now_seconds - run.began_seconds >= SETTLE_SECONDS

    def _is_silent(self, run: Run, now_seconds: float) -> bool:
        rate = self._rate_of(run.mirror)
        patience = max(SILENT_SECONDS, min(SILENT_BYTES / rate, MOST_SILENT_SECONDS) if rate else 0.0)
        return now_seconds - run.heard_seconds >= patience

    def _seconds_left(self, run: Run, now_seconds: float) -> float:
        grid = self.jobs[run.job].grid
        whole = Span(grid.span(run.next).start, grid.span(run.end - 1).end).length if run.next < run.end else 0
        # A run that went silent with all of a piece received brought a wrong one: nothing of it is begun.
        begun = 0 if self._is_silent(run, now_seconds) else run.received_bytes % grid.piece_length
        return max(whole - begun, 0) / max(self._rate_now(run, now_seconds), 1.0)


def _ranges(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return sorted indices as half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges
