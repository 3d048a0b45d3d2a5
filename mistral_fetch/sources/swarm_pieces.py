"""A torrent's swarm as a giver of pieces: between the torrent's pieces and those of the files' own grids.

Both grids differ where a torrent has smaller pieces, or lets them run on from one file into the next. A piece of a
file is handed over once all of the torrent's that cover it have come.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_fetch.bittorrent.hand_over import HandOver, PieceDownload
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.settings import SwarmSettings, find_peers_hint
from mistral_fetch.errors import NoPeers
from mistral_fetch.events import Report
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.pieces import PieceAsker, PieceKey
from mistral_fetch.sources.swarm import match_targets, stage
from mistral_fetch.spans import Span


class SwarmPieces:
    """Brings pieces from a torrent's peers; implements :class:`~mistral_fetch.sources.pieces.PieceGiver`.

    Args:
        open_torrent: Returns the torrent; may need the network, and is called in the giver's own thread.
        label: The name to go by before the torrent is known.
        settings: What to ask of the swarm.
        state_directory: Given an info-hash, where the torrent's state lies; pieces are staged there for a moment.
    """

    def __init__(
        self,
        open_torrent: Callable[[], Metainfo],
        label: str,
        settings: SwarmSettings,
        state_directory: Callable[[Metainfo], Path],
    ) -> None:
        self._open_torrent = open_torrent
        self.label = label
        # Web seeds are mirrors: the manifest names them too, and its own connections to them are the better ones.
        self._settings = replace(settings, use_web_seeds=False, uploads=False)
        self._state_directory = state_directory

    def give(self, targets: Sequence[Target], asker: PieceAsker, report: Report, stop: StopSignal) -> None:
        """Bring what is asked for. See :class:`~mistral_fetch.sources.pieces.PieceGiver`.

        Raises:
            TorrentMismatch: The torrent describes other files, or has other bytes for them.
            NoPeers, Stalled, PieceMismatch: See :class:`~mistral_fetch.sources.swarm.SwarmSource`.
            TransferError, ManifestError: The torrent cannot be had.
        """
        metainfo = self._open_torrent()
        self.label = f"torrent {metainfo.info_hash[:8]}…"
        by_index = match_targets(metainfo, targets, self.label)
        numbers = {target.entry.path: number for number, target in enumerate(targets)}
        staging = self._state_directory(metainfo) / "staged"
        sizes = {index: target.partial.grid.size for index, target in by_index.items()}
        download = PieceDownload(metainfo, stage(staging, sizes), staging, self._settings)
        files = {numbers[target.entry.path]: (index, target) for index, target in by_index.items()}
        translator = PieceTranslator(metainfo, files, asker)
        paths = {index: target.entry.path for index, target in by_index.items()}
        if not self._settings.peers and not download.has_places_to_ask:
            raise nowhere_to_ask(self.label, self._settings)
        try:
            HandOver(download, metainfo, paths, self._settings, self.label, report, stop.check, taker=translator).run()
        finally:
            download.close()
            shutil.rmtree(staging, ignore_errors=True)  # what is left goes with the torrent's state


def nowhere_to_ask(label: str, settings: SwarmSettings) -> NoPeers:
    """Return the error for a torrent that names no tracker, while no peer is named and none is looked for."""
    return NoPeers(
        f"there is nowhere to ask for {label}",
        detail="expected a tracker, a named peer or a way to look for peers, got none",
        hint=find_peers_hint(settings),
    )


@dataclass
class _Assembly:
    """A piece of a file that several of the torrent's pieces cover."""

    buffer: bytearray
    missing: set[int]


class PieceTranslator:
    """Stands between torrent and files; implements :class:`~mistral_fetch.bittorrent.hand_over.Taker`.

    Args:
        metainfo: The torrent.
        files: By number among the targets, the file's index in the torrent, and the target.
        asker: Who wants pieces of the files.
    """

    def __init__(self, metainfo: Metainfo, files: Mapping[int, tuple[int, Target]], asker: PieceAsker) -> None:
        self._piece_length, self._asker = metainfo.piece_length, asker
        offsets = {file.index: file.offset for file in metainfo.files}
        self._offsets = {number: offsets[index] for number, (index, _) in files.items()}
        self._grids = {number: target.partial.grid for number, (_, target) in files.items()}
        self._assemblies: dict[PieceKey, _Assembly] = {}
        self._covered: dict[int, list[PieceKey]] = {}

    @property
    def is_over(self) -> bool:
        """Return whether no piece is wanted any more."""
        return self._asker.is_over

    @property
    def is_alone(self) -> bool:
        """Return whether silence has to end some time."""
        return self._asker.is_alone

    def choose(self, availability: Sequence[int]) -> Collection[int]:
        """Return which of the torrent's pieces to fetch now."""

        def has(number: int, index: int) -> bool:
            return number in self._grids and all(availability[piece] > 0 for piece in self._pieces((number, index)))

        keys = self._asker.choose(has if availability else lambda _number, _index: False)
        self._assemblies = {
            key: self._assemblies.get(key) or _Assembly(bytearray(), set(self._pieces(key))) for key in keys
        }
        self._covered = {}
        for key, assembly in self._assemblies.items():
            for piece in assembly.missing:
                self._covered.setdefault(piece, []).append(key)
        return self._covered.keys()

    def advanced(self, received_bytes: Mapping[int, int]) -> None:
        """Note how much has come of pieces that are not whole yet."""
        came: dict[PieceKey, int] = {}
        for key, assembly in self._assemblies.items():
            length = self._grids[key[0]].span(key[1]).length
            whole = len(set(self._pieces(key)) - assembly.missing) * self._piece_length
            part = sum(received_bytes.get(piece, 0) for piece in assembly.missing)
            came[key] = min(whole + part, length)
        self._asker.advanced(came)

    def take(self, piece: int, data: bytes) -> Collection[int]:
        """Take one of the torrent's pieces; return which ones nobody will want again.

        Those are the ones of whole pieces that were handed over: what came before it was wanted, or for somebody who
        then was faster, may be wanted again.
        """
        needless: list[int] = []
        for key in self._covered.pop(piece, []):
            assembly = self._assemblies[key]
            assembly.missing.discard(piece)
            if self._copy(key, piece, data, assembly):
                del self._assemblies[key]
                needless += (part for part in self._pieces(key) if self._files_in(part) == [key])
        return needless

    def _copy(self, key: PieceKey, piece: int, data: bytes, assembly: _Assembly) -> bool:
        """Put the part that belongs to a file's piece in its place; return whether that is whole and handed over."""
        span = self._in_torrent(key)
        start = piece * self._piece_length
        part = memoryview(data)[max(span.start - start, 0) : min(span.end - start, self._piece_length)]
        if len(part) == span.length:
            self._asker.bring(key, part)
            return True
        if not assembly.buffer:
            assembly.buffer = bytearray(span.length)
        place = max(start - span.start, 0)
        assembly.buffer[place : place + len(part)] = part
        if not assembly.missing:
            self._asker.bring(key, assembly.buffer)
        return not assembly.missing

    def _in_torrent(self, key: PieceKey) -> Span:
        number, index = key
        span = self._grids[number].span(index)
        return Span(span.start + self._offsets[number], span.end + self._offsets[number])

    def _pieces(self, key: PieceKey) -> range:
        span = self._in_torrent(key)
        return range(span.start // self._piece_length, -(-span.end // self._piece_length))

    def _files_in(self, piece: int) -> list[PieceKey]:
        """Return the pieces of files that one of the torrent's pieces has a part in."""
        start, found = piece * self._piece_length, []
        for number, grid in self._grids.items():
            first = max(start - self._offsets[number], 0)
            end = min(start + self._piece_length - self._offsets[number], grid.size)
            if first < end:
                found += [
                    (number, index) for index in range(first // grid.piece_length, (end - 1) // grid.piece_length + 1)
                ]
        return found
