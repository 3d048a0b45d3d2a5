"""A source over http and https mirrors: each file from the first mirror that delivers.

Owns the order of mirrors and who is out of the game. A single request is :mod:`.http_client`'s business,
one file from one mirror :mod:`.http_transfer`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import AccessError, IntegrityError, MirrorError, MistralFetchError, PieceMismatch
from mistral_fetch.events import Progress, Report, SourceFailed
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import give_up, known_size, mirror_urls, report_lie
from mistral_fetch.sources.http_client import HttpClient, breaking_off
from mistral_fetch.sources.http_transfer import MirrorTransfer
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.urls import HTTP_SCHEMES, origin_of


class HttpSource:
    """Fills partials from the mirrors that the manifest names.

    Args:
        client: The door to the web, with its credentials.
        retry: How patient to be with one mirror.
        label: The name to go by.
    """

    assurance = Assurance.SIZE

    def __init__(self, client: HttpClient, retry: RetryPolicy | None = None, label: str = "http") -> None:
        self.label = label
        self._client = client
        self._retry = retry or RetryPolicy()
        self._liars: dict[str, PieceMismatch] = {}

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial; the first file that no mirror delivers ends it.

        Raises:
            AllSourcesFailed: Every mirror of a file failed, each for a reason of its own.
            MirrorError, IntegrityError, AccessError: The only mirror failed.
            OfflineRefused: The client may not use the network.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        with breaking_off(self._client, stop):
            for target in targets:
                stop.check()
                try:
                    self._fetch_file(target, report, stop)
                finally:
                    target.partial.flush()  # whatever happened, what was verified is kept

    def _fetch_file(self, target: Target, report: Report, stop: StopSignal) -> None:
        if known_size(target.entry) == 0:
            target.partial.prepare()
        if not target.partial.missing_pieces():
            report(Progress(target.entry.path, target.partial.present_bytes))
            return
        causes: list[MistralFetchError] = []
        for url in mirror_urls(target.entry, HTTP_SCHEMES):
            error = self._try_mirror(url, target, report, stop)
            if error is None:
                return
            causes.append(error)
        raise give_up(target.entry, causes, "mirror")

    def _try_mirror(self, url: str, target: Target, report: Report, stop: StopSignal) -> MistralFetchError | None:
        try:
            origin = origin_of(url)
            if origin in self._liars:
                return self._liars[origin]
            transfer = MirrorTransfer(self._client, url, target, report, stop)
        except MirrorError as error:  # no usable address
            return error
        try:
            transfer.run(Backoff(self._retry))
        except PieceMismatch as error:
            # Integrity rule 5: named, dropped for good, and the transfer goes on from the others.
            self._liars[origin] = error
            report_lie(target, transfer.assembler.index, transfer.assembler.buffered, transfer.host, report)
            return error
        except (AccessError, IntegrityError) as error:
            report(SourceFailed(transfer.host, f"{error.what}: {error.detail}", will_retry=False))
            return error
        except MirrorError as error:  # reported already, attempt by attempt
            return error
        return None
