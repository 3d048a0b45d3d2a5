"""Who sent a file that turned out wrong as a whole, where no piece hash could say so earlier.

Bytes of several mirrors in one file prove nothing against any of them. So after a mismatch each mirror is asked alone,
in the manifest's order, and keeps what it had sent before; the first that delivers the right file clears itself, and
shows by its pieces who had sent others. Pure: events and values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mistral_fetch.errors import MirrorError
from mistral_fetch.events import SourceLied
from mistral_fetch.manifest import FileEntry
from mistral_fetch.sources.failover import mirrors_of
from mistral_fetch.sources.urls import HTTP_SCHEMES, host_of
from mistral_fetch.spans import PieceGrid
from mistral_fetch.store.journal import UNHASHED
from mistral_fetch.store.partial_notes import CommittedBlob

SentPieces = Mapping[int, tuple[str, str]]
"""By piece: the host that sent it, and the sha256 of what it sent."""


@dataclass(eq=False)
class Suspects:
    """The mirrors of one file that are still believed, and what the doubtful ones sent."""

    entry: FileEntry
    dropped: list[str] = field(default_factory=list)
    alone: str = ""
    """The one host that is asked, once there was a mismatch."""
    doubtful: dict[int, list[tuple[str, str]]] = field(default_factory=dict)

    def asked(self) -> FileEntry:
        """Return the entry with the mirrors that are to be asked now."""
        if not self.alone:
            return self.entry
        return replace(self.entry, mirrors=tuple(m for m in self.entry.mirrors if _host(m.url) == self.alone))

    def drop(self, host: str) -> None:
        """Ask this host no more: it lied alone, or does not deliver."""
        self.dropped.append(host)

    @property
    def last_dropped(self) -> str:
        """Return the host that was dropped last, or ''."""
        return self.dropped[-1] if self.dropped else ""

    def doubt(self, sent: SentPieces) -> None:
        """Remember a mixture that was wrong."""
        for index, (host, sha256) in sent.items():
            self.doubtful.setdefault(index, []).append((host, sha256))

    def ask_next_alone(self) -> bool:
        """Turn to the next host that was not dropped; return whether there is one."""
        hosts = dict.fromkeys(_host(mirror.url) for mirror in mirrors_of(self.entry, HTTP_SCHEMES))
        left = [host for host in hosts if host and host not in self.dropped]
        if left:
            self.alone = left[0]
        return bool(left)

    def liars(self, blob: CommittedBlob, grid: PieceGrid) -> Iterator[SourceLied]:
        """Yield who had sent other bytes than the right ones, each once, with the first wrong piece."""
        named: set[str] = set()
        if blob.pieces.length != grid.piece_length:
            return
        for index, sendings in sorted(self.doubtful.items()):
            right = blob.pieces.sha256[index]
            for host, sha256 in sendings:
                if sha256 not in {right, UNHASHED} and host not in named and host not in self.dropped:
                    named.add(host)
                    where = f"piece {index} at bytes {grid.span(index)}"
                    yield SourceLied(host, self.entry.path, where, f"sha256:{right}", f"sha256:{sha256}")


def sent_pieces(sources: Mapping[int, tuple[str, str]]) -> SentPieces:
    """Return who sent each piece, by host: what a partial remembers is addresses."""
    return {index: (_host(address) or address, sha256) for index, (address, sha256) in sources.items()}


def _host(url: str) -> str:
    try:
        return host_of(url)
    except MirrorError:
        return ""  # not an address that anything can come from
