"""Several files from several mirrors over several connections at once: threads around the pure schedule.

Owns the threads, what a failure means for a mirror and for a file, and when to give up. One request is
:mod:`.http_range`'s business, which piece comes next :mod:`.schedule`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator, Sequence

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
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.companion import Companion
from mistral_fetch.sources.failover import report_lie
from mistral_fetch.sources.file_job import FileJob
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.http_range import RangeRequest
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.meter import Arrival
from mistral_fetch.sources.mirror_state import MirrorState
from mistral_fetch.sources.pieces import PieceGiver
from mistral_fetch.sources.retry import is_too_silent
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
        givers: Who may bring pieces beside the mirrors; only for files with piece hashes.
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
        givers: Sequence[PieceGiver] = (),
    ) -> None:
        self._client, self.jobs, self.limit, self.stop = client, jobs, limit, stop
        self._archives, self._liars = archives, liars
        self._report_lock = threading.Lock()
        self._raw_report = report
        grids = [job.target.partial.grid for job in jobs]
        self._companions = [Companion(giver, self) for giver in givers]
        self._piece_bytes = max(min(grid.piece_length, grid.size) for grid in grids)
        bounded = max(1, min(connections, BUFFER_BYTES // max(self._piece_bytes, 1)))
        self._connections = limit.worthwhile_connections(bounded)
        self.schedule = Schedule(
            [(job.target.partial.grid, job.target.partial.missing_pieces(), [*self._first_asked(job)]) for job in jobs],
            lambda asked: asked.rate_bytes_per_second if isinstance(asked, MirrorState | Companion) else None,
            lambda mirror: mirror.request_seconds if isinstance(mirror, MirrorState) else None,
        )
        self._mirrors = list(dict.fromkeys(mirror for job in jobs for mirror in job.addresses))
        self.state = threading.Condition()
        self.fatal: BaseException | None = None
        self.is_over = False
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
            for companion in self._companions:
                companion.start()
            while not self._is_finished():
                self._tick()
        finally:
            self._end()
        if self.fatal is not None:
            self.stop.check()  # what broke because of a stop is no failure
            raise self.fatal
        self.stop.check()

    def report(self, event: object) -> None:
        """Pass an event on, one at a time."""
        with self._report_lock:
            self._raw_report(event)  # type: ignore[arg-type]

    def _is_finished(self) -> bool:
        with self.state:
            if self.fatal is not None or self.stop.is_set():
                return True
            return all(job.is_complete or not self._has_hope(number) for number, job in enumerate(self.schedule.jobs))

    def _has_hope(self, number: int) -> bool:
        """Return whether to go on with a file: a mirror that sends only all of it need not wait for silent helpers."""
        asked = self.schedule.jobs[number].mirrors
        if self.jobs[number].whole_only and not self.has_mirrors(number):
            return any(isinstance(other, Companion) and other.has_delivered for other in asked)
        return bool(asked)

    def has_mirrors(self, number: int) -> bool:
        """Return whether a mirror is left that can be asked for parts of a file."""
        return any(isinstance(asked, MirrorState) for asked in self.schedule.jobs[number].mirrors)

    def _first_asked(self, job: FileJob) -> Iterator[MirrorState | Companion]:
        yield from (mirror for mirror in job.addresses if mirror not in job.reserve)
        if job.target.partial.known_pieces is not None:
            yield from self._companions

    def _tick(self) -> None:
        """Look after everything that no connection looks after."""
        now = time.monotonic()
        with self.state:
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
        with self.state:
            if self.fatal is None and not self.schedule.is_complete:
                self.state.wait(_TICK_SECONDS)

    def _flush(self, now: float) -> None:
        """Record what is there before a batch is full, so that no connection has to wait for the disk."""
        is_due = now - self._last_flush >= _FLUSH_SECONDS
        for job in self.jobs:
            partial = job.target.partial
            if partial.unflushed_bytes >= BATCH_BYTES // 2 or (is_due and partial.unflushed_bytes):
                partial.flush()
        if is_due:
            self._last_flush = now

    def _report_progress(self) -> None:
        with self.state:
            # What is present first: a piece that becomes whole meanwhile must not be counted twice.
            present = {run.job: self.jobs[run.job].target.partial.present_bytes for run in self._open}
            flying = dict.fromkeys(present, 0)
            for run, request in self._open.items():
                if not run.is_race:
                    flying[run.job] += request.filled
            for companion in self._companions:
                for number, length in companion.flying_bytes().items():
                    flying[number] = flying.get(number, 0) + length
                    present.setdefault(number, self.jobs[number].target.partial.present_bytes)
        for number, length in flying.items():
            self.report(Progress(self.jobs[number].target.entry.path, present[number], length))

    def _end(self) -> None:
        with self.state:
            self.is_over = True
            for request in self._open.values():
                request.abort()
            self.state.notify_all()
        for companion in self._companions:
            companion.join()
        has_broken, began = False, time.monotonic()
        while alive := [worker for worker in self._workers if worker.is_alive()]:
            alive[0].join(_TICK_SECONDS / 2)
            with self.state:
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
            with self.state:
                self.fatal = self.fatal or error
                self.state.notify_all()

    def _next_run(self) -> Run | None:
        with self.state:
            while not (self.is_over or self.fatal or self.stop.is_set() or self.schedule.is_complete):
                run = self._choose(time.monotonic())
                if run is not None:
                    return run
                self.state.wait(_TICK_SECONDS)
            return None

    def _choose(self, now: float) -> Run | None:
        """Give the free connection to the mirror that has the fewest of what it may have."""
        fastest = max((mirror.rate_bytes_per_second or 0.0 for mirror in self._mirrors), default=0.0)
        # Of a mirror that is slow beside others one connection is enough: each holds a piece that others wait for.
        free = [m for m in self._mirrors if m.is_free(now) and not (m.active and m.is_slow_beside(fastest))]
        for mirror in sorted(free, key=lambda m: (m.active / m.growth.limit, -(m.rate_bytes_per_second or 0.0))):
            run = self.schedule.take(mirror, now)
            if run is not None:
                mirror.active += 1
                return run
        return None

    def _fetch(self, run: Run, buffer: memoryview) -> None:
        """Fetch one run, asking again as long as that makes sense."""
        mirror, job = _mirror_of(run), self.jobs[run.job]
        request = RangeRequest(self._client, self._archives, job.target, job.addresses[mirror], mirror, run, buffer)
        with self.state:
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
            with self.state:
                del self._open[run]
                mirror.active -= 1
                self.schedule.release(run)
                self.state.notify_all()

    def is_wanted(self, run: Run) -> bool:
        """Return whether the run is still wanted."""
        with self.state:
            return not (run.is_abandoned or run.next >= run.end or self.is_over or self.stop.is_set())

    def _pause(self, run: Run, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self.state:
            while (left := deadline - time.monotonic()) > 0 and self.is_wanted(run):
                self.state.wait(min(left, _TICK_SECONDS))

    def received(self, run: Run, length: int) -> bool:
        """Count bytes and pay for them; return whether the run is still wanted."""
        mirror = _mirror_of(run)
        self.limit.take(length, lambda: self._check_wanted(run))
        with self.state:
            now = time.monotonic()
            self._arrival.count(length, now)
            run.received(length, now)
            mirror.received(length)
            return self.is_wanted(run)

    def _check_wanted(self, run: Run) -> None:
        self.stop.check()
        if not self.is_wanted(run):  # to pay for the bytes of a lost race would hold up the end
            raise Interrupted("a download was broken off", detail="it is not needed any more", hint="nothing to do")

    @property
    def chunk_bytes(self) -> int | None:
        """Return how much to read at once, or None for as much as there is."""
        return self.limit.chunk_bytes

    def piece_is_whole(self, run: Run, index: int, data: memoryview, fresh_bytes: int, seconds: float) -> None:
        """Verify and keep a piece, and tell everybody.

        Raises:
            PieceMismatch: It is wrong.
            StoreError: The disk refused.
        """
        job, mirror = self.jobs[run.job], _mirror_of(run)
        partial = job.target.partial
        partial.put(index, data, redact(job.addresses[mirror].url))
        with self.state:
            mirror.delivered(fresh_bytes, seconds)
            self.done(run, index)
        self.report(Progress(job.target.entry.path, partial.present_bytes))
        self._wait_for_follower(run, partial)

    def done(self, run: Run, index: int) -> None:
        """Note that a piece is there, and break off whoever is still fetching it; the caller holds ``state``."""
        for loser in self.schedule.piece_done(run, index):
            if loser in self._open:
                self._open[loser].abort()
        self.state.notify_all()

    def count(self, length: int, now: float) -> None:
        """Count received bytes; the caller holds ``state``."""
        self._arrival.count(length, now)

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
        mirror, job = _mirror_of(run), self.jobs[run.job]
        if not self.is_wanted(run):
            return None  # broken off by ourselves
        if not isinstance(error, (MirrorError, IntegrityError, AccessError)):
            raise error
        now = time.monotonic()
        with self.state:
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
        if is_too_silent(error, now - self._arrival.heard_seconds, self._client.settings.read_timeout_seconds):
            delay = None
        request.is_useless = delay is None
        return delay

    def _leave_out(self, run: Run, error: MistralFetchError) -> None:
        """Ask this mirror no more: for this file, or for any if it lied."""
        mirror = _mirror_of(run)
        with self.state:
            if isinstance(error, PieceMismatch):
                # Integrity rule 5: named, dropped for good, and the transfer goes on from the others.
                self._liars[mirror.origin] = error
                self._break_off(mirror.origin)
                for number in range(len(self.jobs)):
                    for other in [other for other in self._mirrors if other.origin == mirror.origin]:
                        self._exclude(number, other, error)
            else:
                self._exclude(run.job, mirror, error)
            self.state.notify_all()

    def _exclude(self, number: int, mirror: MirrorState, error: MistralFetchError) -> None:
        job = self.jobs[number]
        if mirror not in self.schedule.jobs[number].mirrors:
            return
        if isinstance(error, RangeRefused) and error.sends_all and not job.addresses[mirror].member:
            job.whole_only.append(mirror)
        self.exclude(number, mirror, error)

    def exclude(self, number: int, asked: Hashable, error: MistralFetchError) -> None:
        """Ask this one no more for a file; the caller holds ``state``."""
        job, planned = self.jobs[number], self.schedule.jobs[number]
        self.schedule.exclude(number, asked)
        job.causes[asked] = error
        if not self.has_mirrors(number):
            planned.mirrors.update(job.reserve)
            job.reserve = []
        if not planned.mirrors and not job.whole_only and not planned.is_complete:
            self.fatal = self.fatal or job.give_up()

    def _break_off(self, origin: str) -> None:
        """End every other connection to a liar; what it sends would be verified, but there is no reason to wait."""
        for run, request in self._open.items():
            if _mirror_of(run).origin == origin:
                run.is_abandoned = True
                request.abort()


def _mirror_of(run: Run) -> MirrorState:
    assert isinstance(run.mirror, MirrorState)
    return run.mirror
