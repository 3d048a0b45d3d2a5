"""Several files from several mirrors over several connections at once: threads around the pure schedule.

Owns the threads, what a failure means for a mirror and for a file, and when to give up. One request is
:mod:`.http_range`'s business, which piece comes next :mod:`.schedule`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mistral_fetch.errors import (
    AccessError,
    IntegrityError,
    Interrupted,
    MirrorError,
    MistralFetchError,
    PieceMismatch,
    RangeRefused,
)
from mistral_fetch.events import Progress, Report, SourceFailed
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import give_up, report_lie
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.http_range import RangeRequest
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.meter import Arrival
from mistral_fetch.sources.mirror_state import MirrorState
from mistral_fetch.sources.schedule import Run, Schedule
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import redact
from mistral_fetch.store.partials import BATCH_BYTES, Partial
from mistral_fetch.units import MIB

# Pieces in flight, all connections together: what bounds the memory of a transfer.
BUFFER_BYTES = 96 * MIB
# How far a transfer may run ahead of the hash of its whole file: enough that the latter never waits.
MOST_LAG_BYTES = 256 * MIB
_TICK_SECONDS = 0.1
_FLUSH_SECONDS = 10.0
# How long the end waits for connections that are only being made.
_LEAVE_SECONDS = 0.5


@dataclass(eq=False)
class FileJob:
    """One file, the mirrors that may have it, and why those that do not were left out."""

    target: Target
    addresses: dict[MirrorState, MirrorUrl] = field(default_factory=dict)
    """Where to ask, in the manifest's order of preference."""
    unusable: list[MistralFetchError] = field(default_factory=list)
    causes: dict[MirrorState, MistralFetchError] = field(default_factory=dict)
    reserve: list[MirrorState] = field(default_factory=list)
    """Mirrors among the addresses that are asked only when no other is left."""
    whole_only: list[MirrorState] = field(default_factory=list)
    """Mirrors that answer every range with the whole file."""

    def give_up(self) -> MistralFetchError:
        """Return the one error that stands for all mirrors of the file."""
        return give_up(self.target.entry, [*self.unusable, *self.causes.values()], "mirror")


class ParallelFetch:
    """Fills several partials; used once.

    Args:
        client: The door to the web.
        archives: Where files lie inside archives.
        jobs: The files.
        liars: Who lied so far, by origin, and how; added to.
        connections: The most connections at a time.
        limit: The cap on the rate.
        report: Told what happens; called from several threads, one at a time.
        stop: Ends it.
    """

    def __init__(
        self,
        client: HttpClient,
        archives: TarIndex,
        jobs: Sequence[FileJob],
        liars: dict[str, MistralFetchError],
        connections: int,
        limit: RateLimit,
        report: Report,
        stop: StopSignal,
    ) -> None:
        self._client, self._jobs, self._limit, self._stop = client, jobs, limit, stop
        self._archives, self._liars = archives, liars
        self._report_lock = threading.Lock()
        self._raw_report = report
        grids = [job.target.partial.grid for job in jobs]
        self._piece_bytes = max(min(grid.piece_length, grid.size) for grid in grids)
        bounded = max(1, min(connections, BUFFER_BYTES // max(self._piece_bytes, 1)))
        self._connections = limit.worthwhile_connections(bounded)
        self._schedule = Schedule(
            [
                (job.target.partial.grid, job.target.partial.missing_pieces(), job.addresses.keys() - set(job.reserve))
                for job in jobs
            ],
            lambda mirror: mirror.rate_bytes_per_second if isinstance(mirror, MirrorState) else None,
            lambda mirror: mirror.request_seconds if isinstance(mirror, MirrorState) else None,
        )
        self._mirrors = list(dict.fromkeys(mirror for job in jobs for mirror in job.addresses))
        self._state = threading.Condition()
        self._fatal: BaseException | None = None
        self._is_over = False
        self._open: dict[Run, RangeRequest] = {}
        self._workers: list[threading.Thread] = []
        self._arrival = Arrival(time.monotonic())
        self._last_flush = time.monotonic()

    def run(self) -> None:
        """Fetch until every file is complete, or only mirrors that cannot serve ranges are left for it.

        Raises:
            AllSourcesFailed, MirrorError, IntegrityError, AccessError: No mirror is left for a file.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        try:
            while not self._is_finished():
                self._tick()
        finally:
            self._end()
        if self._fatal is not None:
            self._stop.check()  # what broke because of a stop is no failure
            raise self._fatal
        self._stop.check()

    def report(self, event: object) -> None:
        """Pass an event on, one at a time."""
        with self._report_lock:
            self._raw_report(event)  # type: ignore[arg-type]

    def _is_finished(self) -> bool:
        with self._state:
            if self._fatal is not None or self._stop.is_set():
                return True
            open_jobs = [n for n, job in enumerate(self._schedule.jobs) if not job.is_complete]
            return all(not self._schedule.jobs[number].mirrors for number in open_jobs)

    def _tick(self) -> None:
        """Look after everything that no connection looks after."""
        now = time.monotonic()
        with self._state:
            self._arrival.observe(now)
            for mirror in self._mirrors:
                mirror.growth.observe(now)
            wanted = min(self._connections, sum(mirror.growth.limit for mirror in self._mirrors))
            for _ in range(wanted - len(self._workers)):
                worker = threading.Thread(target=self._work, name="connection", daemon=True)
                self._workers.append(worker)
                worker.start()
        self._flush(now)
        self._report_progress()
        with self._state:
            if self._fatal is None and not self._schedule.is_complete:
                self._state.wait(_TICK_SECONDS)

    def _flush(self, now: float) -> None:
        """Record what is there before a batch is full, so that no connection has to wait for the disk."""
        is_due = now - self._last_flush >= _FLUSH_SECONDS
        for job in self._jobs:
            partial = job.target.partial
            if partial.unflushed_bytes >= BATCH_BYTES // 2 or (is_due and partial.unflushed_bytes):
                partial.flush()
        if is_due:
            self._last_flush = now

    def _report_progress(self) -> None:
        with self._state:
            # What is present first: a piece that becomes whole meanwhile must not be counted twice.
            present = {run.job: self._jobs[run.job].target.partial.present_bytes for run in self._open}
            flying = dict.fromkeys(present, 0)
            for run, request in self._open.items():
                if not run.is_race:
                    flying[run.job] += request.filled
        for number, length in flying.items():
            self.report(Progress(self._jobs[number].target.entry.path, present[number], length))

    def _end(self) -> None:
        with self._state:
            self._is_over = True
            for request in self._open.values():
                request.abort()
            self._state.notify_all()
        has_broken, began = False, time.monotonic()
        while alive := [worker for worker in self._workers if worker.is_alive()]:
            alive[0].join(_TICK_SECONDS / 2)
            with self._state:
                asking = sum(not request.has_answer for request in self._open.values())
            if asking < len(alive):
                continue  # what was received is still being kept
            if not has_broken:
                self._client.break_connections()
                has_broken = True
            elif time.monotonic() - began > _LEAVE_SECONDS:
                return  # a connection that is still being made cannot be broken; who makes it will not be wanted

    def _work(self) -> None:
        buffer: memoryview | None = None
        try:
            while (run := self._next_run()) is not None:
                if buffer is None:
                    buffer = memoryview(bytearray(self._piece_bytes))
                self._fetch(run, buffer)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            with self._state:
                self._fatal = self._fatal or error
                self._state.notify_all()

    def _next_run(self) -> Run | None:
        with self._state:
            while not (self._is_over or self._fatal or self._stop.is_set() or self._schedule.is_complete):
                run = self._choose(time.monotonic())
                if run is not None:
                    return run
                self._state.wait(_TICK_SECONDS)
            return None

    def _choose(self, now: float) -> Run | None:
        """Give the free connection to the mirror that has the fewest of what it may have."""
        fastest = max((mirror.rate_bytes_per_second or 0.0 for mirror in self._mirrors), default=0.0)
        # Of a mirror that is slow beside others one connection is enough: each holds a piece that others wait for.
        free = [m for m in self._mirrors if m.is_free(now) and not (m.active and m.is_slow_beside(fastest))]
        for mirror in sorted(free, key=lambda m: (m.active / m.growth.limit, -(m.rate_bytes_per_second or 0.0))):
            run = self._schedule.take(mirror, now)
            if run is not None:
                mirror.active += 1
                return run
        return None

    def _fetch(self, run: Run, buffer: memoryview) -> None:
        """Fetch one run, asking again as long as that makes sense."""
        mirror, job = _mirror_of(run), self._jobs[run.job]
        request = RangeRequest(self._client, self._archives, job.target, job.addresses[mirror], mirror, run, buffer)
        with self._state:
            self._open[run] = request
        try:
            while self.is_wanted(run):
                asked = time.monotonic()
                try:
                    request.ask(self)
                except MistralFetchError as error:
                    delay = self._judge(run, request, error, asked)
                    if delay is None:
                        return
                    self._pause(run, delay)
        finally:
            with self._state:
                del self._open[run]
                mirror.active -= 1
                self._schedule.release(run)
                self._state.notify_all()

    def is_wanted(self, run: Run) -> bool:
        """Return whether the run is still wanted."""
        with self._state:
            return not (run.is_abandoned or run.next >= run.end or self._is_over or self._stop.is_set())

    def _pause(self, run: Run, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._state:
            while (left := deadline - time.monotonic()) > 0 and self.is_wanted(run):
                self._state.wait(min(left, _TICK_SECONDS))

    def received(self, run: Run, length: int) -> bool:
        """Count bytes and pay for them; return whether the run is still wanted."""
        mirror = _mirror_of(run)
        self._limit.take(length, lambda: self._check_wanted(run))
        with self._state:
            self._arrival.count(length)
            run.received(length, time.monotonic())
            mirror.received(length)
            return self.is_wanted(run)

    def _check_wanted(self, run: Run) -> None:
        self._stop.check()
        if not self.is_wanted(run):  # to pay for the bytes of a lost race would hold up the end
            raise Interrupted("a download was broken off", detail="it is not needed any more", hint="nothing to do")

    @property
    def chunk_bytes(self) -> int | None:
        """Return how much to read at once, or None for as much as there is."""
        return self._limit.chunk_bytes

    def piece_is_whole(self, run: Run, index: int, data: memoryview, fresh_bytes: int, seconds: float) -> None:
        """Verify and keep a piece, and tell everybody.

        Raises:
            PieceMismatch: It is wrong.
            StoreError: The disk refused.
        """
        job, mirror = self._jobs[run.job], _mirror_of(run)
        partial = job.target.partial
        partial.put(index, data, redact(job.addresses[mirror].url))
        with self._state:
            mirror.delivered(fresh_bytes, seconds)
            for loser in self._schedule.piece_done(run, index):
                if loser in self._open:
                    self._open[loser].abort()
            self._state.notify_all()
        self.report(Progress(job.target.entry.path, partial.present_bytes))
        self._wait_for_follower(run, partial)

    def _wait_for_follower(self, run: Run, partial: Partial) -> None:
        """Let whoever hashes the whole file keep up: the transfer is not over before that, and needs its processor.

        A line that is much slower than hashing is not waited on: what lies behind is made up for in no time.
        """
        while (
            partial.lag_bytes() >= MOST_LAG_BYTES
            and self._arrival.bytes_per_second > partial.followed_bytes_per_second / 2
            and self.is_wanted(run)
        ):
            with partial.changed:
                partial.changed.wait(_TICK_SECONDS)

    def _judge(self, run: Run, request: RangeRequest, error: MistralFetchError, asked: float) -> float | None:
        """Return how long to wait before asking again, or None when this run is over for this mirror.

        Raises:
            MistralFetchError: The disk, or no mirror is left for the file.
        """
        mirror, job = _mirror_of(run), self._jobs[run.job]
        if not self.is_wanted(run):
            return None  # broken off by ourselves
        if not isinstance(error, (MirrorError, IntegrityError, AccessError)):
            raise error
        now = time.monotonic()
        with self._state:
            is_echo = isinstance(error, MirrorError) and mirror.is_echo(error, asked)
            delay = self._delay(mirror, request, error, asked, now)
        if isinstance(error, PieceMismatch):
            report_lie(job.target, run.next, request.handed_on, mirror.host, self.report)
        elif not is_echo:  # sixteen connections that break together are one line
            reason = f"{error.what}: {error.detail}"
            self.report(SourceFailed(mirror.host, reason, will_retry=delay is not None or not request.is_useless))
        if delay is None and request.is_useless:
            self._leave_out(run, error)
        return delay

    def _delay(
        self, mirror: MirrorState, request: RangeRequest, error: MistralFetchError, asked: float, now: float
    ) -> float | None:
        if not isinstance(error, MirrorError):
            request.is_useless = True
            return None
        if request.has_advanced():
            mirror.backoff.progressed()
        delivering = sum(run.mirror is mirror and other.has_answer for run, other in self._open.items())
        if mirror.is_refusing(error, delivering):
            mirror.refused(error, now)
            return None  # the others go on; this connection was one too many
        delay = mirror.delay_after(error, asked, now)
        request.is_useless = delay is None
        return delay

    def _leave_out(self, run: Run, error: MistralFetchError) -> None:
        """Ask this mirror no more: for this file, or for any if it lied."""
        mirror = _mirror_of(run)
        with self._state:
            if isinstance(error, PieceMismatch):
                # Integrity rule 5: named, dropped for good, and the transfer goes on from the others.
                self._liars[mirror.origin] = error
                self._break_off(mirror.origin)
                for number in range(len(self._jobs)):
                    for other in [other for other in self._mirrors if other.origin == mirror.origin]:
                        self._exclude(number, other, error)
            else:
                self._exclude(run.job, mirror, error)
            self._state.notify_all()

    def _exclude(self, number: int, mirror: MirrorState, error: MistralFetchError) -> None:
        job, planned = self._jobs[number], self._schedule.jobs[number]
        if mirror not in planned.mirrors:
            return
        self._schedule.exclude(number, mirror)
        job.causes[mirror] = error
        if isinstance(error, RangeRefused) and error.sends_all and not job.addresses[mirror].member:
            job.whole_only.append(mirror)
        if not planned.mirrors:
            planned.mirrors.update(job.reserve)
            job.reserve = []
        if not planned.mirrors and not job.whole_only and not planned.is_complete:
            self._fatal = self._fatal or job.give_up()

    def _break_off(self, origin: str) -> None:
        """End every other connection to a liar; what it sends would be verified, but there is no reason to wait."""
        for run, request in self._open.items():
            if _mirror_of(run).origin == origin:
                run.is_abandoned = True
                request.abort()


def _mirror_of(run: Run) -> MirrorState:
    assert isinstance(run.mirror, MirrorState)
    return run.mirror
