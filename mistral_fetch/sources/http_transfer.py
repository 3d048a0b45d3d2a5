"""One file from one mirror over one connection, in order: for files that nothing vouches for, and for mirrors
that cannot serve ranges. Asks for what is missing, checks the answer, assembles pieces, tries again from the gap.

Owns resuming and retrying against a single mirror. Which mirror comes next is :mod:`.http`'s business;
whether the file is right as a whole is the store's.
"""

from __future__ import annotations

from collections.abc import Mapping

from mistral_fetch.errors import ContentChanged, MirrorError, MirrorUnreachable, RangeRefused, SizeMismatch
from mistral_fetch.events import BytesDropped, Notice, Progress, Report, SourceConnected, SourceFailed
from mistral_fetch.sources.assembly import PieceAssembler
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import known_size
from mistral_fetch.sources.http_answer import Wanted, body_span, strong_validator, wrong_size
from mistral_fetch.sources.http_client import Answer, HttpClient, status_error
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.meter import PROGRESS_BYTES, ReceivedMeter
from mistral_fetch.sources.retry import Backoff
from mistral_fetch.sources.urls import host_of, redact
from mistral_fetch.spans import Span
from mistral_fetch.store.partials import Partial


class MirrorTransfer:
    """Fills one partial from one address."""

    def __init__(
        self, client: HttpClient, url: str, target: Target, report: Report, stop: StopSignal, limit: RateLimit
    ) -> None:
        self._limit = limit
        self._client = client
        self._url = url
        self._shown = redact(url)
        self._entry = target.entry
        self._size = known_size(target.entry)
        self._partial = target.partial
        self._report = report
        self._stop = stop
        self.host = host_of(url)
        self.assembler = PieceAssembler(target.partial, self._shown)
        self._meter = ReceivedMeter(self.host, target.entry.path, report)
        self._most_bytes = 0
        self._is_connected = False

    def run(self, backoff: Backoff) -> None:
        """Ask until the partial is complete.

        Raises:
            MirrorError: The mirror failed permanently, or too often without progress.
            SizeMismatch, PieceMismatch: It has another file.
            AccessError: It wants credentials.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        if not self._is_pinned and self._partial.present and not remembered_validator(self._partial, self._url):
            self._start_over("they came from another mirror and no digest could tell a mixture")
        self._has_advanced()
        while (span := self._next_span()) is not None:
            self._stop.check()
            try:
                self._ask(span)
            except MirrorError as error:
                self._stop.check()  # a stop breaks connections: that is no failure of the mirror
                if self._has_advanced():
                    backoff.progressed()
                delay = backoff.delay_after(error)
                self._report(SourceFailed(self.host, f"{error.what}: {error.detail}", will_retry=delay is not None))
                if delay is None:
                    raise
                self._stop.wait(delay)

    def _next_span(self) -> Span | None:
        if self.assembler.is_complete:
            # Another process may have discarded the file meanwhile; flushing finds out.
            self._partial.flush()
            self.assembler.refresh()
        return self.assembler.next_span()

    def _has_advanced(self) -> bool:
        """Return whether more is here than ever before; what is fetched again after a reset does not count."""
        now = self._partial.present_bytes + len(self.assembler.buffered)
        has_advanced = now >= self._most_bytes + PROGRESS_BYTES
        self._most_bytes = max(self._most_bytes, now)
        return has_advanced

    @property
    def _is_pinned(self) -> bool:
        return bool(self._entry.digests) or self._entry.pieces is not None

    def _ask(self, span: Span) -> None:
        wanted = Wanted(self._entry.path, self._size, span, self._is_pinned)
        try:
            with self._client.stream(self._url, self._range_headers(wanted)) as answer:
                if answer.status not in {200, 206, 416} or (answer.status != 200 and wanted.is_whole):
                    raise status_error(answer)
                body = body_span(wanted, answer.status, answer.headers, answer.content_length, self._shown)
                self._check_version(wanted, answer)
                self._connected()
                if body.start < wanted.span.start:
                    self._report(Notice(f"{self.host} cannot resume: it sends the file from its beginning again"))
                self._receive(wanted, answer, body)
        except SizeMismatch:
            if not self._is_pinned:
                self._start_over("the mirror has a file of another size")
            raise
        finally:
            self._meter.flush()

    def _range_headers(self, wanted: Wanted) -> Mapping[str, str]:
        if wanted.is_whole:
            return {}
        validator = remembered_validator(self._partial, self._url)
        headers = {"Range": wanted.range_header()}
        if validator:
            headers["If-Range"] = validator
        return headers

    def _check_version(self, wanted: Wanted, answer: Answer) -> None:
        """Never splice two versions of a file that no digest describes (pinned content needs no such care)."""
        before = remembered_validator(self._partial, self._url)
        now = strong_validator(answer.headers, is_pinned=self._is_pinned)
        has_bytes = bool(self._partial.present) or wanted.span.start > 0
        # A 206 to If-Range says by itself that the version is the same one; a 200 does not.
        is_same = now == before if now or answer.status == 200 else True
        if has_bytes and not self._is_pinned and not (is_same and before):
            self._start_over("the file changed at the mirror")
            raise ContentChanged(
                f"{wanted.path} changed at {self._shown}",
                detail=f"expected version {before or 'unknown'}, got {now or 'unknown'}; all of it is fetched again",
                hint="if it happens again, wait until the publisher has finished",
            )
        if now and now != before:
            remember_validator(self._partial, self._url, now)

    def _receive(self, wanted: Wanted, answer: Answer, body: Span) -> None:
        offset = body.start
        for chunk in answer.chunks():
            self._stop.check()
            if offset + len(chunk) > body.end:
                self._refuse_surplus(wanted, body)
            has_new_piece = self.assembler.feed(offset, chunk)
            offset += len(chunk)
            self._meter.count(len(chunk))
            self._limit.take(len(chunk), self._stop.check)
            if has_new_piece:
                self._report(Progress(self._entry.path, self._partial.present_bytes))
            if self.assembler.is_complete and offset < body.end:
                return  # a mirror that ignores ranges goes on with what is here already
        if offset < max(body.end, wanted.span.end):
            raise MirrorUnreachable(
                f"{self._shown} ended its answer early",
                detail=f"expected bytes up to {wanted.span.end}, got them up to {offset}",
                hint="run the same command again to go on",
            )

    def _refuse_surplus(self, wanted: Wanted, body: Span) -> None:
        if body.end == self._size:
            raise wrong_size(wanted, "more", self._shown)
        raise RangeRefused(
            f"{self._shown} sends more than it announced",
            detail=f"expected bytes up to {body.end}, got more",
            hint="use another mirror",
        )

    def _connected(self) -> None:
        if not self._is_connected:
            self._is_connected = True
            self._report(SourceConnected(self.host))

    def _start_over(self, reason: str) -> None:
        lost = self._partial.present_bytes + self.assembler.forget()
        self._partial.reset()
        self.assembler.refresh()
        if lost:
            self._report(BytesDropped(self.host, self._entry.path, lost, reason))
        self._report(Progress(self._entry.path, 0))


def remembered_validator(partial: Partial, url: str) -> str:
    """Return what this mirror called the version whose bytes the partial holds, or ''."""
    return _validators(partial).get(redact(url), "")


def remember_validator(partial: Partial, url: str, validator: str) -> None:
    """Keep the version's name beside the bytes; each mirror has names of its own."""
    known = {**_validators(partial), redact(url): validator}
    partial.set_validator("".join(f"{mirror} {value}\n" for mirror, value in known.items()))


def _validators(partial: Partial) -> dict[str, str]:
    pairs = (line.partition(" ") for line in partial.validator.splitlines())
    return {mirror: value for mirror, _, value in pairs if value}
