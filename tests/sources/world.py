"""A world for the schedule, in which time is a number: mirrors of known rates, some of which die, stall or trickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mistral_fetch.sources.mirror_state import Growth, MirrorState
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.schedule import Run, Schedule
from mistral_fetch.spans import PieceGrid

STEP_SECONDS = 0.02
LATENCY_SECONDS = 0.1
READ_TIMEOUT_SECONDS = 30.0

Rate = Callable[[float], "float | None"]
"""Bytes per second of one connection at a time; None for a mirror that is dead."""


def constant(rate: float) -> Rate:
    return lambda _: rate


def dying(rate: float, at_seconds: float) -> Rate:
    return lambda now: rate if now < at_seconds else None


def turning(rate: float, at_seconds: float, later: float) -> Rate:
    """Stall or trickle from some moment on: connected, but with another rate."""
    return lambda now: rate if now < at_seconds else later


@dataclass(eq=False)
class Connection:
    """One connection: waiting, or fetching a run."""

    mirror: MirrorState
    rate: Rate
    run: Run | None = None
    answers_at: float = 0.0
    filled: float = 0.0
    piece_began: float = 0.0
    heard_at: float = 0.0


@dataclass
class World:
    """Plays the engine's part without threads: gives free connections work and moves their bytes."""

    jobs: Sequence[tuple[PieceGrid, Sequence[int], Sequence[int]]]
    """Grid, missing pieces, and the numbers of the mirrors that have the file."""
    rates: Sequence[Rate]
    connections_each: int = 1
    now: float = 100.0
    delivered: Counter[tuple[int, int]] = field(default_factory=Counter)
    requests: list[Run] = field(default_factory=list)
    wasted_bytes: float = 0.0

    def __post_init__(self) -> None:
        policy = RetryPolicy(attempts=3)
        self.began = self.now
        self.mirrors = [
            MirrorState(f"http://m{n}", f"m{n}", Growth(2, 16), Backoff(policy)) for n in range(len(self.rates))
        ]
        self.connections = [
            Connection(mirror, rate)
            for mirror, rate in zip(self.mirrors, self.rates, strict=True)
            for _ in range(self.connections_each)
        ]
        self.schedule = Schedule(
            [(grid, missing, [self.mirrors[n] for n in having]) for grid, missing, having in self.jobs],
            lambda mirror: mirror.rate_bytes_per_second,  # type: ignore[attr-defined]
        )

    @property
    def elapsed(self) -> float:
        return self.now - self.began

    def play(self, most_seconds: float = 500.0) -> float:
        """Run until everything is there, and return how long it took."""
        while not self.schedule.is_complete:
            assert self.elapsed < most_seconds, "it does not end"
            for connection in self.connections:
                self._move(connection)
            self.now += STEP_SECONDS
        return self.elapsed

    def _move(self, connection: Connection) -> None:
        rate = connection.rate(self.elapsed)
        if rate is None:
            self._fail(connection)
            for job in range(len(self.schedule.jobs)):
                self.schedule.exclude(job, connection.mirror)
            return
        if connection.run is None:
            self._take(connection)
        elif connection.run.is_abandoned:
            self.wasted_bytes += connection.filled
            connection.run = None
            self._take(connection)
        elif self.now >= connection.answers_at:
            self._receive(connection, connection.run, rate * STEP_SECONDS)

    def _take(self, connection: Connection) -> None:
        run = self.schedule.take(connection.mirror, self.now)
        if run is not None:
            self.requests.append(run)
            connection.run, connection.filled = run, 0.0
            connection.answers_at = connection.piece_began = connection.heard_at = self.now + LATENCY_SECONDS

    def _receive(self, connection: Connection, run: Run, length: float) -> None:
        if length:
            connection.heard_at = self.now
        elif self.now - connection.heard_at > READ_TIMEOUT_SECONDS:
            self._fail(connection)
            return
        connection.filled += length
        if length:
            self.received(run, length)
        grid = self.schedule.jobs[run.job].grid
        while connection.run is run and connection.filled >= grid.span(run.next).length:
            piece = grid.span(run.next).length
            connection.filled -= piece
            connection.mirror.delivered(piece, self.now - connection.piece_began)
            connection.piece_began = self.now
            self.delivered[run.job, run.next] += 1
            self.schedule.piece_done(run, run.next)
            if run.next >= run.end:
                connection.run = None

    def received(self, run: Run, length: float) -> None:
        run.received(int(length), self.now)

    def _fail(self, connection: Connection) -> None:
        if connection.run is not None:
            self.schedule.release(connection.run)
            connection.run = None
