"""Which pieces to ask of which mirror next. Pure: no threads, no sockets, no clock; the time is handed in.

Work is handed out from the front of each file in runs of consecutive pieces, so that whoever hashes the file from its
beginning can follow. A run is as long as its mirror's rate lets it take a few seconds, and never more than a fair
share of what is left. When nothing is left to hand out, a free connection takes the end of the run that would finish
last, and where that run is down to its last piece, races it for the piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from mistral_fetch.spans import PieceGrid, Span
from mistral_fetch.units import MIB

# A run shorter than this pays its request too often; a longer one is taken apart by others at the end.
RUN_SECONDS = 4.0
LONGEST_RUN_BYTES = 64 * MIB
# What is assumed of a mirror before anything is known: a probe of a piece or two.
FIRST_RUN_BYTES = 8 * MIB
# What a request costs before its first byte; a steal that saves less is none.
REQUEST_SECONDS = 0.25
# Before this, nobody knows how fast a run is, and taking from it would break off an answer for nothing.
SETTLE_SECONDS = 0.5
# A race makes somebody's bytes superfluous, so it must save much.
RACE_FACTOR = 2.0

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
    """Bytes that came for this run so far; kept by whoever fetches it."""
    is_race: bool = False
    is_abandoned: bool = False
    """Somebody else brought its last piece: what still comes is of no use."""


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
        connections: How many connections there may be in all: the fair share of one.
    """

    def __init__(
        self,
        jobs: Iterable[tuple[PieceGrid, Sequence[int], Iterable[Mirror]]],
        rate_of: Callable[[Mirror], float | None],
        connections: int,
    ) -> None:
        self.jobs = [
            Job(grid, set(mirrors), _ranges(missing), missing_count=len(missing)) for grid, missing, mirrors in jobs
        ]
        self.runs: list[Run] = []
        self._rate_of = rate_of
        self._connections = max(1, connections)

    @property
    def is_complete(self) -> bool:
        """Return whether every piece of every file is there."""
        return all(job.is_complete for job in self.jobs)

    def take(self, mirror: Mirror, now_seconds: float) -> Run | None:
        """Return the next run for a free connection to ``mirror``, or None when it cannot help at present."""
        for number, job in enumerate(self.jobs):
            if job.waiting and mirror in job.mirrors:
                return self._hand_out(number, job, mirror, now_seconds)
        return self._steal(mirror, now_seconds)

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
        # In a race, the loser's connection is broken off rather than waited for.
        losers = [other for other in self.runs if other.job == run.job and other is not run and other.next == index]
        for loser in losers:
            loser.is_abandoned = True
            loser.next = index + 1
            self.release(loser)
        return losers

    def release(self, run: Run) -> None:
        """Take back what a failed run did not bring."""
        if run in self.runs:
            self._drop(run)
            self._give_back(run)

    def exclude(self, job: int, mirror: Mirror) -> None:
        """Ask this mirror no more for this file."""
        self.jobs[job].mirrors.discard(mirror)

    def missing_of(self, job: int) -> int:
        """Return how many pieces of a file are missing."""
        return self.jobs[job].missing_count

    def _drop(self, run: Run) -> None:
        if run in self.runs:
            self.runs.remove(run)

    def _give_back(self, run: Run) -> None:
        others = {index for other in self.runs if other.job == run.job for index in range(other.next, other.end)}
        job = self.jobs[run.job]
        again = [index for index in range(run.next, run.end) if index not in job.done and index not in others]
        job.waiting = _ranges(sorted({*again, *(i for first, end in job.waiting for i in range(first, end))}))

    def _hand_out(self, number: int, job: Job, mirror: Mirror, now_seconds: float) -> Run:
        first, end = job.waiting[0]
        stop = min(end, first + self._run_length(job, mirror))
        if stop < end:
            job.waiting[0] = (stop, end)
        else:
            del job.waiting[0]
        run = Run(number, mirror, first, stop, now_seconds)
        self.runs.append(run)
        return run

    def _run_length(self, job: Job, mirror: Mirror) -> int:
        """Return how many pieces a run may have: a few seconds' worth, at most a fair share of what is left."""
        rate = self._rate_of(mirror)
        wanted = FIRST_RUN_BYTES if rate is None else min(rate * RUN_SECONDS, LONGEST_RUN_BYTES)
        waiting = sum(end - first for first, end in job.waiting)
        fair = waiting // self._connections if rate is not None else waiting
        return max(1, min(int(wanted // job.grid.piece_length), fair))

    def _steal(self, mirror: Mirror, now_seconds: float) -> Run | None:
        candidates = [
            run
            for run in self.runs
            if mirror in self.jobs[run.job].mirrors and now_seconds - run.began_seconds >= SETTLE_SECONDS
        ]
        candidates.sort(key=lambda run: -self._seconds_left(run, now_seconds))
        for victim in candidates:
            stolen = self._take_from(victim, mirror, now_seconds)
            if stolen is not None:
                self.runs.append(stolen)
                return stolen
        return None

    def _take_from(self, victim: Run, mirror: Mirror, now_seconds: float) -> Run | None:
        piece = self.jobs[victim.job].grid.piece_length
        mine = self._rate_of(mirror) or self._rate_so_far(mirror, now_seconds) or self._usual_rate()
        theirs = max(self._rate_now(victim, now_seconds), 1.0)
        left = self._seconds_left(victim, now_seconds)
        not_begun = victim.end - victim.next - 1
        if not_begun > 0:
            share = max(1, round(not_begun * mine / (mine + theirs)))
            if REQUEST_SECONDS + share * piece / mine >= left:
                return None
            victim.end -= share
            return Run(victim.job, mirror, victim.end, victim.end + share, now_seconds)
        # A race may be run on a line that is no better, and by whoever is slow itself: then there is another one.
        rivals = [run for run in self.runs if run.job == victim.job and run.next == victim.next]
        if any(now_seconds - run.began_seconds < SETTLE_SECONDS for run in rivals):
            return None
        left = min(self._seconds_left(run, now_seconds) for run in rivals)
        if left < RACE_FACTOR * (REQUEST_SECONDS + piece / mine):
            return None
        return Run(victim.job, mirror, victim.next, victim.next + 1, now_seconds, is_race=True)

    def _rate_so_far(self, mirror: Mirror, now_seconds: float) -> float | None:
        """Return what a mirror that has not brought a piece yet reaches on its best connection, if that is known."""
        return max(
            (
                max(run.received_bytes / (now_seconds - run.began_seconds), 1.0)
                for run in self.runs
                if run.mirror == mirror and now_seconds - run.began_seconds >= SETTLE_SECONDS
            ),
            default=None,
        )

    def _usual_rate(self) -> float:
        rates = [rate for rate in map(self._rate_of, {run.mirror for run in self.runs}) if rate]
        return sum(rates) / len(rates) if rates else float(MIB)

    def _rate_now(self, run: Run, now_seconds: float) -> float:
        """Return what a run's connection reaches: measured once there is something to measure."""
        elapsed = now_seconds - run.began_seconds
        if elapsed < SETTLE_SECONDS:
            return self._rate_of(run.mirror) or self._usual_rate()
        return run.received_bytes / elapsed

    def _seconds_left(self, run: Run, now_seconds: float) -> float:
        grid = self.jobs[run.job].grid
        whole = Span(grid.span(run.next).start, grid.span(run.end - 1).end).length if run.next < run.end else 0
        begun = run.received_bytes % grid.piece_length
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
