"""Reading a bundle to the end, and naming every piece that is not what the manifest says. Nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mistral_fetch.bundle.contents import Content
from mistral_fetch.bundle.reader import BundleReader
from mistral_fetch.events import BytesVerified, Report
from mistral_fetch.manifest import PieceHashes


@dataclass(frozen=True)
class WrongPiece:
    """A piece of a file that was changed; ``index`` is -1 where all pieces are right and their whole is not."""

    ref: str
    path: str
    index: int
    start: int
    end: int
    expected: str
    actual: str

    def __str__(self) -> str:
        place = f"piece {self.index} at bytes [{self.start}, {self.end})" if self.index >= 0 else "the whole file"
        return f"{self.ref}: {self.path}: {place}: expected sha256:{self.expected}, got sha256:{self.actual}"


def verify_bundle(reader: BundleReader, report: Report, check_stop: Callable[[], None]) -> list[WrongPiece]:
    """Hash every content of a bundle and return what is wrong.

    Raises:
        MalformedBundle, SizeMismatch: Something between the contents is wrong, or missing.
        IntegrityError: It cannot be read.
        Interrupted: ``check_stop`` raised it.
    """
    wrong: list[WrongPiece] = []
    with ThreadPoolExecutor(2) as pool:
        for content in reader.plan.contents:
            reader.go_to(content)
            wrong += _verify_content(reader, content, pool, report, check_stop)
    reader.finish()
    return wrong


def _verify_content(
    reader: BundleReader,
    content: Content,
    pool: ThreadPoolExecutor,
    report: Report,
    check_stop: Callable[[], None],
) -> list[WrongPiece]:
    """Hash one file and its pieces side by side, while the next piece is read."""
    entry, ref = content.entry, reader.models[content.model].record.ref
    size, grid = entry.size or 0, entry.pieces or PieceHashes(1, ())
    whole, wrong = hashlib.sha256(), list[WrongPiece]()
    buffers = [bytearray(min(grid.length, size)) for _ in range(2)]
    hashing, done = pool.submit(int), 0
    checking = pool.submit(_check_piece, memoryview(b""), None)

    def settle() -> None:
        hashing.result()
        if (found := checking.result()) is not None:
            wrong.append(found)

    for index, digest in enumerate(grid.sha256):
        check_stop()
        piece = memoryview(buffers[index % 2])[: min(grid.length, size - done)]
        reader.source.read_into(content.offset + done, piece)
        settle()
        at = WrongPiece(ref, entry.path, index, done, done + len(piece), digest, "")
        hashing, checking = pool.submit(_feed, whole, piece), pool.submit(_check_piece, piece, at)
        done += len(piece)
        report(BytesVerified(f"{ref}: {entry.path}", done, size))
    settle()
    if not wrong and whole.hexdigest() != entry.sha256:
        wrong.append(WrongPiece(ref, entry.path, -1, 0, size, entry.sha256 or "", whole.hexdigest()))
    return wrong


def _feed(hasher: Any, piece: memoryview) -> int:
    hasher.update(piece)
    return len(piece)


def _check_piece(piece: memoryview, expected: WrongPiece | None) -> WrongPiece | None:
    """Return the piece with what it was found to be, unless it is right."""
    actual = hashlib.sha256(piece).hexdigest()
    return None if expected is None or actual == expected.expected else replace(expected, actual=actual)
