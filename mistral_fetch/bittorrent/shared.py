"""A download that others are given from while it runs, and after it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import libtorrent as lt

from mistral_fetch.bittorrent.alerts import DiskFailed, TorrentRemoved
from mistral_fetch.bittorrent.client import REMOVE_TIMEOUT_SECONDS, Download, disk_error
from mistral_fetch.bittorrent.resume import sync_files


class SharedDownload(Download):
    """A download whose pieces may also come from elsewhere, and that goes on giving when it is complete."""

    def missing(self) -> set[int]:
        """Return which pieces are not there yet, those of unwanted files included."""
        have = self._running_handle.status(lt.status_flags_t.query_pieces).pieces
        return {piece for piece, is_there in enumerate(have) if not is_there}

    def add(self, piece: int, data: bytes) -> None:
        """Take a piece that was fetched elsewhere; it is checked like any other."""
        self._running_handle.add_piece(piece, data, 0)

    def give_from(self, paths: Mapping[int, Path]) -> None:
        """Give from where the finished files lie now, and write no more; peers are met anew.

        Nothing is checked again, so what lies there must be what was verified.
        """
        have = self._running_handle.status(lt.status_flags_t.query_pieces).pieces
        self._running_session.remove_torrent(self._running_handle)
        self._wait_for(TorrentRemoved, REMOVE_TIMEOUT_SECONDS)
        parameters = self._parameters()
        parameters.renamed_files |= {index: str(path) for index, path in paths.items()}
        parameters.have_pieces = list(map(bool, have))
        parameters.flags |= lt.torrent_flags.upload_mode
        parameters.url_seeds = []
        self._handle = self._running_session.add_torrent(parameters)

    def settle(self) -> None:
        """Make everything received durable without leaving the swarm.

        Raises:
            StoreError: The disk refused.
        """
        self.flush()
        for alert in self._waiting:
            if isinstance(alert, DiskFailed):
                raise disk_error(alert)
        sync_files(self._data_paths)

    @property
    def port(self) -> int:
        """Return where peers connect to us; 0 if they cannot."""
        return int(self._running_session.listen_port())
