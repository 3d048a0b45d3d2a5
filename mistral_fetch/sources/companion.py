"""A piece giver's part in a parallel fetch: what is asked of it, and what becomes of what it brings.

Owns how many pieces it works on at a time. Which ones is the schedule's business: it counts there as a mirror whose
every piece is a run of its own, so that connections take over what it is slow at, and it what they are slow at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from mistral_fetch.errors import MistralFetchError, NoPeers, PieceMismatch, StoreError, TorrentMismatch
from mistral_fetch.events import BytesReceived, Event, Progress, SourceFailed
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.file_job import FileJob
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.pieces import PieceGiver, PieceKey
from mistral_fetch.sources.schedule import Run, Schedule
from mistral_fetch.units import MIB, smoothed

# What mirrors do in less time than this needs no help; a swarm takes longer to find its first peer.
HEAD_START_SECONDS = 0.3
# A giver works on what it brings in so many seconds, or its peers would run out of pieces to send.
AHEAD_SECONDS = 3.0
LEAST_AHEAD = 4
MOST_AHEAD_BYTES = 64 * MIB
# For so long nobody else may have brought anything before a giver's silence begins to count.
OTHERS_SILENT_SECONDS = 2.0
# What a giver may take to end after nothing is wanted of it any more.
LEAVE_SECONDS = 5.0
_SMOOTHING = 0.3
_RATE_SECONDS = 0.5


class Engine(Protocol):
    """What a companion needs of the fetch it is part of; ``state`` guards all that changes."""

    jobs: Sequence[FileJob]
    schedule: Schedule
    state: threading.Condition
    limit: RateLimit
    stop: StopSignal
    fatal: BaseException | None
    is_over: bool

    def report(self, event: Event) -> None:
        """Pass an event on."""

    def has_mirrors(self, number: int) -> bool:
        """Return whether a mirror is left that can be asked for parts of a file."""

    def done(self, run: Run, index: int) -> None:
        """Note that a piece is there; the caller holds ``state``."""

    def count(self, length: int, now: float) -> None:
        """Count received bytes; the caller holds ``state``."""

    def exclude(self, number: int, asked: Hashable, error: MistralFetchError) -> None:
        """Ask this one no more for a file; the caller holds ``state``."""


class Companion:
    """Asks one giver for pieces, in a thread of its own; implements :class:`~.pieces.PieceAsker`.

    Args:
        giver: Who brings them.
        engine: The fetch it is part of.
    """

    def __init__(self, giver: PieceGiver, engine: Engine) -> None:
        self._giver, self._engine = giver, engine
        self._runs: dict[PieceKey, Run] = {}
        self._came: dict[PieceKey, int] = {}
        self._rate: float | None = None
        self._rate_began, self._rate_bytes = time.monotonic(), 0
        self.has_delivered = False
        self._thread = threading.Thread(target=self._work, name=giver.label, daemon=True)

    @property
    def rate_bytes_per_second(self) -> float | None:
        """Return what one of its pieces comes at, as far as it is known: they share what all of it brings."""
        return self._rate / max(len(self._runs), 1) if self._rate else None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until it has ended; it is told by ``is_over``."""
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)

    @property
    def is_over(self) -> bool:
        """Return whether nothing is wanted any more."""
        engine = self._engine
        with engine.state:
            return engine.is_over or engine.fatal is not None or engine.stop.is_set() or engine.schedule.is_complete

    @property
    def is_alone(self) -> bool:
        """Return whether nobody else brings anything at present."""
        engine, now = self._engine, time.monotonic()
        with engine.state:
            others = [run for run in engine.schedule.runs if run.mirror is not self]
            if any(now - run.heard_seconds < OTHERS_SILENT_SECONDS and run.received_bytes for run in others):
                return False
            mine = (number for number, job in enumerate(engine.schedule.jobs) if not job.is_complete)
            return bool(others) or not all(map(engine.has_mirrors, mine))

    def choose(self, has: Callable[[int, int], bool]) -> set[PieceKey]:
        """Return which pieces to bring now."""
        with self._engine.state:
            self._drop_abandoned()
            while len(self._runs) < self._ahead():
                run = self._engine.schedule.take_last(self, has, time.monotonic())
                if run is None:
                    break
                self._runs[run.job, run.next] = run
            return set(self._runs)

    def advanced(self, received_bytes: Mapping[PieceKey, int]) -> None:
        """Note how much has come of pieces that are not whole yet."""
        now = time.monotonic()
        with self._engine.state:
            for key, total in received_bytes.items():
                more = total - self._came.get(key, 0)
                if key in self._runs and more > 0:
                    self._came[key] = total
                    self._receive(self._runs[key], more, now)
            self._observe(now)

    def bring(self, key: PieceKey, data: bytes | bytearray | memoryview) -> None:
        """Verify and keep a whole piece. See :class:`~.pieces.PieceAsker`.

        Raises:
            TorrentMismatch: It is right for the giver and wrong for the manifest.
            StoreError: The disk refused.
        """
        number, index = key
        engine, target = self._engine, self._engine.jobs[number].target
        engine.report(BytesReceived(self._giver.label, target.entry.path, len(data)))
        try:
            target.partial.put(index, data, self._giver.label)
        except PieceMismatch as error:
            raise TorrentMismatch(
                f"{self._giver.label} has another {target.entry.path} than the manifest",
                detail=error.detail,
                hint="this torrent belongs to another release; get the manifest and the torrent from one place",
            ) from error
        self.has_delivered = True
        with engine.state:
            run, come = self._runs.pop(key, None), self._came.pop(key, 0)
            if run is not None:
                self._receive(run, len(data) - come, time.monotonic())
                engine.done(run, index)
        engine.report(Progress(target.entry.path, target.partial.present_bytes))
        if not self.is_over:  # the bytes of a race that is over hold up nothing
            engine.limit.take(len(data), engine.stop.check)

    def flying_bytes(self) -> dict[int, int]:
        """Return, by file, how much has come of pieces that are not whole yet; the caller holds ``state``."""
        flying: dict[int, int] = {}
        for (number, index), length in self._came.items():
            if not self._engine.jobs[number].target.partial.has_piece(index):
                flying[number] = flying.get(number, 0) + length
        return flying

    def _ahead(self) -> int:
        longest = max(job.target.partial.grid.piece_length for job in self._engine.jobs)
        most = max(LEAST_AHEAD, MOST_AHEAD_BYTES // longest)
        return min(most, max(LEAST_AHEAD, int((self._rate or 0.0) * AHEAD_SECONDS / longest)))

    def _receive(self, run: Run, length: int, now: float) -> None:
        run.received(length, now)
        for other in self._runs.values():  # a piece that it has not come to is in line, not silent
            other.heard_seconds = now
        self._engine.count(length, now)
        self._rate_bytes += length

    def _observe(self, now: float) -> None:
        elapsed = now - self._rate_began
        if elapsed >= _RATE_SECONDS:
            self._rate = smoothed(self._rate, self._rate_bytes / elapsed, _SMOOTHING)
            self._rate_began, self._rate_bytes = now, 0

    def _drop_abandoned(self) -> None:
        for key in [key for key, run in self._runs.items() if run.is_abandoned]:
            del self._runs[key]
            self._came.pop(key, None)

    def _work(self) -> None:
        with self._engine.state:
            self._engine.state.wait_for(lambda: self._engine.is_over, HEAD_START_SECONDS)
        if self.is_over:
            return
        targets = [job.target for job in self._engine.jobs]
        try:
            self._giver.give(targets, self, self._engine.report, self._engine.stop)
        except StoreError as error:
            self._end(error)
        except MistralFetchError as error:
            if not self.is_over:
                self._fail(error)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._end(error)

    def _fail(self, error: MistralFetchError) -> None:
        if not isinstance(error, NoPeers) or self.is_alone:  # else nobody was asked, and nobody misses it
            self._engine.report(SourceFailed(self._giver.label, f"{error.what}: {error.detail}", will_retry=False))
        with self._engine.state:
            for run in self._runs.values():
                self._engine.schedule.release(run)
            self._runs.clear()
            self._came.clear()
            for number, job in enumerate(self._engine.schedule.jobs):
                if self in job.mirrors:
                    self._engine.exclude(number, self, error)
            self._engine.state.notify_all()

    def _end(self, error: BaseException) -> None:
        with self._engine.state:
            self._engine.fatal = self._engine.fatal or error
            self._engine.state.notify_all()
