"""Find out whether a mirror can be trusted, from a handful of its bytes: fine, without ranges, stale, lying or away.

For each file its size and validator are asked, then random pieces are fetched by range and compared with the
manifest. A wrong piece is asked for again, and so are further pieces of that file: a mirror that serves another
version is wrong everywhere and answers alike twice; a lying one is wrong here and there, or never the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from mistral_fetch.errors import (
    AccessError,
    ExitCode,
    MirrorTimeout,
    MirrorUnreachable,
    MistralFetchError,
    RangeRefused,
    SizeMismatch,
    TransferError,
)
from mistral_fetch.manifest import FileEntry, Manifest, PieceHashes
from mistral_fetch.publish.check_address import FileAddress
from mistral_fetch.sources.http_answer import Wanted, body_span
from mistral_fetch.sources.http_client import Answer, HttpClient, status_error
from mistral_fetch.sources.retry import retrying
from mistral_fetch.sources.urls import redact
from mistral_fetch.spans import PieceGrid, Span
from mistral_fetch.units import MIB

# A file without piece hashes is proved as a whole, if it is small enough to be fetched for a check.
MAX_WHOLE_BYTES = 64 * MIB
FURTHER_PIECES = 3


class Verdict(str, Enum):
    """What a mirror, or one of its files, turned out to be; the worst last."""

    FINE = "fine"
    NO_RANGES = "no-ranges"
    UNREACHABLE = "unreachable"
    STALE = "stale"
    LYING = "lying"

    @property
    def rank(self) -> int:
        """Return how bad it is."""
        return list(Verdict).index(self)

    @property
    def exit_code(self) -> ExitCode:
        """Return what scripts see."""
        if self is Verdict.FINE:
            return ExitCode.OK
        return ExitCode.INTEGRITY if self in {Verdict.STALE, Verdict.LYING} else ExitCode.NO_SOURCE


@dataclass(frozen=True)
class Proof:
    """One piece that was fetched: which bytes, and whether they were right."""

    span: Span
    is_right: bool
    expected: str
    actual: str
    is_repeatable: bool = True
    """The same bytes came when it was asked for again; only wrong ones are."""


@dataclass(frozen=True)
class FileFinding:
    """What was found out about one file."""

    path: str
    url: str
    verdict: Verdict
    reason: str
    size: int | None = None
    validator: str = ""
    modified: str = ""
    proofs: tuple[Proof, ...] = ()


@dataclass(frozen=True)
class MirrorFinding:
    """What was found out about the mirror as a whole."""

    verdict: Verdict
    reason: str
    files: tuple[FileFinding, ...]

    @property
    def piece_count(self) -> int:
        """Return how many pieces were compared."""
        return sum(len(file.proofs) for file in self.files)


@dataclass
class MirrorCheck:
    """One look at one mirror.

    Args:
        http: Makes the requests.
        seed: The same seed asks for the same pieces.
        pieces: How many random pieces to compare, over all files.
        claims: Asks what the mirror itself says its files' sha256 are, by path; called only where that matters.
        check_stop: Called often; raises to end the check.
    """

    http: HttpClient
    seed: int
    pieces: int
    claims: Callable[[], Mapping[str, str]] = dict
    check_stop: Callable[[], None] = lambda: None
    _random: random.Random = field(init=False)
    _is_away: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, manifest: Manifest, addresses: Sequence[FileAddress]) -> MirrorFinding:
        """Return what the mirror is, file by file.

        Raises:
            Interrupted: A stop was asked for.
        """
        chosen = self._choose(manifest, addresses)
        files = []
        for address in addresses:
            self.check_stop()
            files.append(self._check_file(manifest.entry(address.path), address.url, chosen.get(address.path, [])))
            if self._is_away:
                break  # ten thousand files would only wait for ten thousand timeouts
        worst = max(files, key=lambda file: file.verdict.rank)
        if worst.verdict is Verdict.FINE and (unlike := self._unlike_claims(manifest, addresses)):
            reason = f"the files are right, but the mirror's own checksums say otherwise, first of {unlike[0]}"
            return MirrorFinding(Verdict.STALE, reason, tuple(files))
        return MirrorFinding(worst.verdict, worst.reason, tuple(files))

    def _unlike_claims(self, manifest: Manifest, addresses: Sequence[FileAddress]) -> list[str]:
        claims = self.claims()
        paths = [address.path for address in addresses]
        return [path for path in paths if path in claims and claims[path] != manifest.entry(path).sha256]

    def _choose(self, manifest: Manifest, addresses: Sequence[FileAddress]) -> dict[str, list[int]]:
        """Return random pieces by file; every piece of every file is as likely."""
        every = [
            (address.path, index)
            for address in addresses
            for index in range(_grid(manifest.entry(address.path)).count)
            if _pieces(manifest.entry(address.path)) is not None
        ]
        chosen: dict[str, list[int]] = {}
        for path, index in self._random.sample(every, min(self.pieces, len(every))):
            chosen.setdefault(path, []).append(index)
        return chosen

    def _check_file(self, entry: FileEntry, url: str, indices: list[int]) -> FileFinding:
        finding = FileFinding(entry.path, redact(url), Verdict.FINE, "")
        try:
            finding = self._look(finding, url)
            if entry.size is not None and finding.size not in {None, entry.size}:
                return _stale(finding, f"has {finding.size} bytes instead of {entry.size}")
            return self._prove(finding, entry, url, indices)
        except SizeMismatch as error:
            return _stale(finding, error.detail)
        except (TransferError, AccessError) as error:
            self._is_away = isinstance(error, MirrorUnreachable | MirrorTimeout)
            return replace(finding, verdict=Verdict.UNREACHABLE, reason=describe_error(error))

    def _look(self, finding: FileFinding, url: str) -> FileFinding:
        """Ask for size and validator."""
        answer = self.http.head(url)
        if answer.status in {405, 501}:
            return finding  # a server without HEAD still answers ranges with the size
        if answer.status != 200:
            raise status_error(answer)
        etag, modified = answer.headers.get("etag", ""), answer.headers.get("last-modified", "")
        return replace(finding, size=answer.content_length, validator=etag, modified=modified)

    def _prove(self, finding: FileFinding, entry: FileEntry, url: str, indices: list[int]) -> FileFinding:
        try:
            proofs = [self._prove_piece(entry, url, index) for index in indices]
        except RangeRefused as error:
            return self._without_ranges(finding, entry, url, error)
        if not all(proof.is_right for proof in proofs):
            others = [index for index in range(_grid(entry).count) if index not in indices]
            further = self._random.sample(others, min(FURTHER_PIECES, len(others)))
            proofs += [self._prove_piece(entry, url, index) for index in further]
        return self._judge(replace(finding, proofs=tuple(proofs)), entry)

    def _judge(self, finding: FileFinding, entry: FileEntry) -> FileFinding:
        wrong = [proof for proof in finding.proofs if not proof.is_right]
        if not wrong:
            return finding
        first = wrong[0]
        words = f"expected sha256:{first.expected} for bytes {first.span}, got sha256:{first.actual}"
        if not all(proof.is_repeatable for proof in wrong):
            changing = f"answers change from one request to the next: {words}"
            return replace(finding, verdict=Verdict.LYING, reason=changing)
        if len(wrong) < len(finding.proofs):
            count = f"{len(wrong)} of {len(finding.proofs)} pieces are wrong"
            return replace(finding, verdict=Verdict.LYING, reason=f"{count}: {words}")
        if entry.sha256 and self.claims().get(entry.path) == entry.sha256:
            claim = "every piece asked for is wrong, though its own checksums promise this version"
            return replace(finding, verdict=Verdict.LYING, reason=f"{claim}: {words}")
        since = f", last modified {finding.modified}" if finding.modified else ""
        return _stale(finding, f"every piece asked for is of another version{since}: {words}")

    def _prove_piece(self, entry: FileEntry, url: str, index: int) -> Proof:
        self.check_stop()
        pieces, span = _pieces(entry), _grid(entry).span(index)
        assert pieces is not None, "files without are not chosen from"
        expected = pieces.sha256[index]
        actual = self._ask(entry, url, span)
        if actual == expected:
            return Proof(span, True, expected, actual)
        return Proof(span, False, expected, actual, is_repeatable=self._ask(entry, url, span) == actual)

    def _ask(self, entry: FileEntry, url: str, span: Span) -> str:
        return retrying(lambda: self._digest_of(entry, url, span), self.http.settings.retry)

    def _digest_of(self, entry: FileEntry, url: str, span: Span) -> str:
        """Fetch a piece by range and return its sha256.

        Raises:
            RangeRefused: The mirror does not do ranges.
            SizeMismatch: Its file has another size.
            TransferError, AccessError: It cannot be had.
        """
        wanted = Wanted(entry.path, entry.size or 0, span, is_pinned=True)
        # Asked for as a range even where it is the whole file: that is what is being found out.
        with self.http.stream(url, {"Range": wanted.range_header()}) as answer:
            if answer.status not in {200, 206, 416}:
                raise status_error(answer)
            covered = body_span(wanted, answer.status, answer.headers, answer.content_length, redact(url))
            if answer.status == 200:
                raise _ignores_ranges(url, span)
            if covered.end < span.end:
                raise RangeRefused(
                    f"{redact(url)} sends less than it is asked for",
                    detail=f"expected bytes {span}, got {covered}",
                    hint="use another mirror",
                )
            return _digest_of_body(answer, span.length)

    def _without_ranges(self, finding: FileFinding, entry: FileEntry, url: str, error: RangeRefused) -> FileFinding:
        """Prove the first piece from the whole file's beginning: without ranges a mirror may still lie."""
        finding = replace(finding, verdict=Verdict.NO_RANGES, reason=f"{error.what}: {error.detail}")
        pieces = _pieces(entry)
        if pieces is None:
            return finding
        span = _grid(entry).span(0)
        with self.http.stream(url) as answer:
            if answer.status != 200:
                raise status_error(answer)
            actual = _digest_of_body(answer, span.length)
        proof = Proof(span, actual == pieces.sha256[0], pieces.sha256[0], actual)
        if proof.is_right:
            return replace(finding, proofs=(proof,))
        return self._judge(replace(finding, proofs=(proof,)), entry)


def _digest_of_body(answer: Answer, length: int) -> str:
    """Return the sha256 of the first bytes of a body, hashed as they come."""
    hasher = hashlib.sha256()
    for chunk in answer.chunks():
        hasher.update(chunk[:length])
        length -= len(chunk)
        if length <= 0:
            break
    return hasher.hexdigest()


def _pieces(entry: FileEntry) -> PieceHashes | None:
    """Return a file's piece hashes; a small file without any is one piece."""
    if not entry.size:
        return None
    if entry.pieces is not None and min(entry.pieces.length, entry.size) <= MAX_WHOLE_BYTES:
        return entry.pieces
    if entry.sha256 and entry.size <= MAX_WHOLE_BYTES:
        return PieceHashes(entry.size, (entry.sha256,))
    return None


def _grid(entry: FileEntry) -> PieceGrid:
    pieces = _pieces(entry)
    return PieceGrid(entry.size or 0, pieces.length if pieces else max(entry.size or 0, 1))


def _ignores_ranges(url: str, span: Span) -> RangeRefused:
    return RangeRefused(
        f"{redact(url)} does not do ranges",
        detail=f"expected bytes {span} alone, got the whole file",
        hint="a download from it can neither be resumed nor shared among mirrors",
        sends_all=True,
    )


def _stale(finding: FileFinding, reason: str) -> FileFinding:
    return replace(finding, verdict=Verdict.STALE, reason=reason)


def describe_error(error: MistralFetchError) -> str:
    """Return an error as one line."""
    return f"{error.what}: {error.detail}"
