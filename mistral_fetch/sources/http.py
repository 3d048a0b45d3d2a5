"""A source over http and https mirrors: many connections to many mirrors, or one in order where it must be so.

Owns which way a file is fetched, and what is remembered of mirrors from file to file. The parallel way is
:mod:`.http_engine`'s business, one file from one mirror in order :mod:`.http_transfer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import AccessError, IntegrityError, MirrorError, MistralFetchError, PieceMismatch
from mistral_fetch.events import Progress, Report, SourceFailed
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import known_size, mirrors_of, report_lie
from mistral_fetch.sources.file_job import FileJob, may_be_split
from mistral_fetch.sources.http_client import HttpClient, breaking_off
from mistral_fetch.sources.http_engine import ParallelFetch
from mistral_fetch.sources.http_transfer import MirrorTransfer
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.mirror_state import Growth, MirrorState
from mistral_fetch.sources.pieces import PieceGiver
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.scores import ScoreBook
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import HTTP_SCHEMES, host_of, origin_of

MOST_CONNECTIONS = 16
# Where a mirror's worth of connections begins; doubled from there as long as that brings more.
FIRST_CONNECTIONS = 2


@dataclass(frozen=True)
class Politeness:
    """How much may be asked of the network at once."""

    connections: int = MOST_CONNECTIONS
    """The most connections at a time, all mirrors together."""
    limit: RateLimit = RateLimit(None)  # noqa: RUF009 - without a cap it has no state


class HttpSource:
    """Fills partials from the mirrors that the manifest names.

    Args:
        client: The door to the web, with its credentials.
        retry: How patient to be with one mirror.
        label: The name to go by.
        politeness: How much may be asked of the network at once.
        archives: Where files lie inside archives, as far as that was found out.
        scores: What earlier transfers learnt about mirrors; added to.
        givers: Who may bring pieces beside the mirrors, such as a swarm; only for files with piece hashes.
    """

    assurance = Assurance.SIZE

    def __init__(
        self,
        client: HttpClient,
        retry: RetryPolicy | None = None,
        label: str = "http",
        politeness: Politeness | None = None,
        archives: TarIndex | None = None,
        scores: ScoreBook | None = None,
        givers: Sequence[PieceGiver] = (),
    ) -> None:
        self._givers = givers
        self._scores = scores or ScoreBook()
        self.label = label
        self._archives = archives or TarIndex(client)
        self._client = client
        self._retry = retry or RetryPolicy()
        self._politeness = politeness or Politeness()
        self._mirrors: dict[tuple[str, int], MirrorState] = {}
        self._liars: dict[str, MistralFetchError] = {}

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial; the first file that no mirror delivers ends it.

        Raises:
            AllSourcesFailed: Every mirror of a file failed, each for a reason of its own.
            MirrorError, IntegrityError, AccessError: The only mirror failed.
            OfflineRefused: The client may not use the network.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        with breaking_off(self._client, stop):
            try:
                while incomplete := self._incomplete(targets, report):
                    stop.check()
                    self._fetch_missing(incomplete, report, stop)
            finally:
                self._keep_scores()
                for target in targets:
                    target.partial.flush()  # whatever happened, what was verified is kept

    def _incomplete(self, targets: Sequence[Target], report: Report) -> list[Target]:
        """Return the targets with something missing; flushing finds out whether another process discarded them."""
        incomplete = []
        for target in targets:
            known_size(target.entry)
            # Before it is asked what is missing: bytes that another process may be writing turn out not to count.
            target.partial.prepare()
            target.partial.flush()
            if target.partial.missing_pieces():
                incomplete.append(target)
            else:
                report(Progress(target.entry.path, target.partial.present_bytes))
        return incomplete

    def _fetch_missing(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        jobs = [self._job(target) for target in targets]
        parallel = [job for job in jobs if may_be_split(job) and (job.addresses or self._givers)]
        if parallel:
            settings = self._politeness
            ParallelFetch(
                self._client,
                self._archives,
                parallel,
                self._liars,
                settings.connections,
                settings.limit,
                report,
                stop,
                self._givers,
            ).run()
        for job in jobs:
            if not job.target.partial.missing_pieces():
                continue
            if job not in parallel:
                self._fetch_in_order(job, [m for m, at in job.addresses.items() if not at.member], report, stop)
            elif job.whole_only:
                self._fetch_in_order(job, job.whole_only, report, stop)
            # Else another process discarded the file meanwhile, or writes it: what was lost is fetched again.

    def _job(self, target: Target) -> FileJob:
        job = FileJob(target)
        seen: dict[str, int] = {}
        for address in mirrors_of(target.entry, HTTP_SCHEMES):
            try:
                origin = origin_of(address.url)
            except MirrorError as error:  # no usable address
                job.unusable.append(error)
                continue
            seen[origin] = seen.get(origin, -1) + 1
            mirror = self._mirror(origin, seen[origin], address)
            if origin in self._liars:
                job.causes[mirror] = self._liars[origin]
                continue
            job.addresses[mirror] = address
            if self._scores.is_distrusted(origin):
                job.reserve.append(mirror)
        if len(job.reserve) == len(job.addresses):
            job.reserve = []  # they are all there is
        return job

    def _keep_scores(self) -> None:
        for mirror in self._mirrors.values():
            if mirror.received_bytes or mirror.failure_count:
                lied = mirror.origin in self._liars
                self._scores.learn(mirror.origin, mirror.measured_rate, mirror.failure_count, lied=lied)
            mirror.received_bytes = mirror.failure_count = 0

    def _mirror(self, origin: str, number: int, address: MirrorUrl) -> MirrorState:
        """Return what is known of a mirror; several addresses of one file on one host count as several mirrors."""
        key = (origin, number)
        if key not in self._mirrors:
            growth = Growth(FIRST_CONNECTIONS, self._politeness.connections)
            mirror = MirrorState(origin, host_of(address.url), growth, Backoff(self._retry))
            mirror.rate_bytes_per_second = self._scores.rate(origin)
            self._mirrors[key] = mirror
        return self._mirrors[key]

    def _fetch_in_order(self, job: FileJob, mirrors: Sequence[MirrorState], report: Report, stop: StopSignal) -> None:
        for mirror in mirrors:
            error = self._try_mirror(job.addresses[mirror].url, mirror, job.target, report, stop)
            if error is None:
                return
            job.causes[mirror] = error
        raise job.give_up()

    def _try_mirror(
        self, url: str, mirror: MirrorState, target: Target, report: Report, stop: StopSignal
    ) -> MistralFetchError | None:
        if mirror.origin in self._liars:
            return self._liars[mirror.origin]
        transfer = MirrorTransfer(self._client, url, target, report, stop, self._politeness.limit)
        try:
            transfer.run(Backoff(self._retry))
        except PieceMismatch as error:
            # Integrity rule 5: named, dropped for good, and the transfer goes on from the others.
            self._liars[mirror.origin] = error
            report_lie(target, transfer.assembler.index, transfer.assembler.buffered, transfer.host, report)
            return error
        except (AccessError, IntegrityError) as error:
            report(SourceFailed(transfer.host, f"{error.what}: {error.detail}", will_retry=False))
            return error
        except MirrorError as error:  # reported already, attempt by attempt
            return error
        return None
