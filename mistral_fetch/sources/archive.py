"""A source over one remote tar whose whole is all that a digest is known of.

The files are fetched as ranges of the archive, each into its partial, by the source for mirrors. Then the archive's
own digest is proved: its bytes are hashed in order, headers and padding from the server, the files from this disk.
So there is neither a second copy nor an untar, and still not one unverified byte.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from mistral_fetch.digest import Assurance, Digest, new_hash
from mistral_fetch.errors import DigestMismatch, NotAModelFile, SizeMismatch, StoreError
from mistral_fetch.events import BytesVerified, Notice, Progress, Report, SourceLied
from mistral_fetch.sources.base import Source, StopSignal, Target
from mistral_fetch.sources.tar_index import Member, TarIndex
from mistral_fetch.sources.urls import host_of, redact
from mistral_fetch.spans import Span
from mistral_fetch.store.durable import disk_errors, fsync_directory, write_durably
from mistral_fetch.units import MIB

_READ_BYTES = 8 * MIB
# Between files there are a few hundred bytes; more than this of it never lies in memory at once.
_ASK_BYTES = 4 * MIB
# How often the archive is hashed anew because bytes on this disk had changed.
_MAX_ROUNDS = 2
# Beside a partial's data: the digest of the archive that was proved with it, so that a kill between the commits
# of two files does not cost the one whose bytes are no longer here.
_PROVED_NAME = "proved"


class ArchiveSource:
    """Fills partials from one archive, and proves the archive where a digest of it is known.

    Args:
        inner: The source for mirrors, which fetches ranges of archives (``MirrorUrl.member``).
        index: Knows where files lie in the archive.
        url: The archive's address, as the targets' mirrors spell it.
        expected: The digest of the whole archive, or None if nobody published one.
    """

    def __init__(self, inner: Source, index: TarIndex, url: str, expected: Digest | None) -> None:
        self.label = host_of(url)
        self.assurance = (expected.assurance if expected else None) or Assurance.SIZE
        self._inner = inner
        self._index = index
        self._url = url
        self._expected = expected
        self._name = posixpath.basename(redact(url)) or self.label

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial; files of the archive that are no targets are asked for while it is proved.

        Raises:
            DigestMismatch: The archive is another one; all bytes of it are discarded.
            NotAModelFile, SizeMismatch: A target is no file of this archive.
            TransferError, AccessError, IntegrityError: The inner source, or the archive's server, failed.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
        if self._expected is None:
            self._inner.fetch(targets, report, stop)
        elif not all(self._is_proved(target) for target in targets):
            self._fetch_and_prove(self._expected, targets, report, stop)

    def _fetch_and_prove(self, expected: Digest, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        for _ in range(_MAX_ROUNDS):
            for target in targets:
                _forget_proof(target)
            self._inner.fetch(targets, report, stop)
            actual = self._hash_archive(expected.algorithm, targets, report, stop)
            if actual == expected:
                for target in targets:
                    _note_proof(target, expected)
                return
            if not self._have_changed(targets, report):
                break
        self._discard(targets, expected, actual, report)

    def _is_proved(self, target: Target) -> bool:
        """Return whether an earlier fetch proved the archive with the bytes that are here."""
        try:
            noted = (target.partial.directory / _PROVED_NAME).read_text("utf-8", "replace")
        except OSError:
            return False
        return noted == str(self._expected) and not target.partial.missing_pieces()

    def _hash_archive(self, algorithm: str, targets: Sequence[Target], report: Report, stop: StopSignal) -> Digest:
        whole = self._index.whole_size(self._url)
        hasher, done = new_hash(algorithm, whole), 0
        for chunk in self._chunks(targets, whole):
            stop.check()
            hasher.update(chunk)
            done += len(chunk)
            report(BytesVerified(self._name, done, whole))
        return Digest(algorithm, hasher.hexdigest())

    def _chunks(self, targets: Sequence[Target], whole: int) -> Iterator[bytes | memoryview]:
        """Yield the archive in order; what no target holds comes from the server."""
        position = 0
        for member, target in sorted(self._located(targets).items(), key=lambda pair: pair[0].offset):
            yield from self._ask(Span(position, member.offset))
            yield from _read_whole(target.partial.data_path, member.size)
            position = member.end
        yield from self._ask(Span(position, whole))

    def _ask(self, span: Span) -> Iterator[bytes]:
        window = self._index.window(self._url)
        for offset in range(span.start, span.end, _ASK_BYTES):
            yield window.read(offset, min(_ASK_BYTES, span.end - offset))

    def _located(self, targets: Sequence[Target]) -> dict[Member, Target]:
        located = {}
        for target in targets:
            member = self._locate(target)
            if member.size != target.partial.grid.size:
                raise SizeMismatch(
                    f"{self._name} from {self.label} has another {target.entry.path}",
                    detail=f"expected {target.partial.grid.size} bytes, got {member.size}",
                    hint="run the same command again: the archive is read anew",
                )
            located[member] = target
        return located

    def _locate(self, target: Target) -> Member:
        for mirror in target.entry.mirrors:
            if mirror.url == self._url and mirror.member:
                return self._index.locate(self._url, mirror.member)
        raise NotAModelFile(
            f"{target.entry.path} is no file of {redact(self._url)}",
            detail="expected the archive among its mirrors, got others",
            hint="use another channel (mistral-fetch show NAME lists them)",
        )

    def _have_changed(self, targets: Sequence[Target], report: Report) -> bool:
        """Tell a disk that changed under us from a server that lied; what changed counts as missing from then on."""
        changed = [target.entry.path for target in targets if target.partial.recheck()]
        if changed:
            report(Notice(f"{', '.join(changed[:3])}: bytes on disk changed after they were written"))
        return bool(changed)

    def _discard(self, targets: Sequence[Target], expected: Digest, actual: Digest, report: Report) -> None:
        report(SourceLied(self.label, self._name, "the whole archive", str(expected), str(actual)))
        for target in targets:
            target.partial.reset()
            report(Progress(target.entry.path, 0))
        raise DigestMismatch(
            f"{self.label} sent another {self._name} than was promised",
            detail=f"expected {expected}, got {actual}",
            hint="another channel may help (mistral-fetch show NAME lists them); "
            "the publisher may have replaced the archive",
        )


def _read_whole(path: Path, size: int) -> Iterator[memoryview]:
    if not size:
        return
    buffer = memoryview(bytearray(min(size, _READ_BYTES)))
    with disk_errors("verifying a download", path), path.open("rb", buffering=0) as file:
        left = size
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise StoreError(
                    f"{path} became shorter while it was verified",
                    detail=f"expected {size} bytes, got {size - left}",
                    hint="run the same command again: another process may have discarded it",
                )
            left -= count
            yield buffer[:count]


def _note_proof(target: Target, digest: Digest) -> None:
    directory = target.partial.directory
    with disk_errors("recording what was verified", directory):
        write_durably(directory / _PROVED_NAME, str(digest).encode())


def _forget_proof(target: Target) -> None:
    """Withdraw the note before a byte of the partial changes: it must never outlive what it speaks of."""
    directory = target.partial.directory
    note = directory / _PROVED_NAME
    with disk_errors("starting a download", directory):
        if note.exists():
            note.unlink()
            fsync_directory(directory)
