"""A download that others are given from while it runs, and after it is complete."""

from __future__ import annotations

import libtorrent as lt

from mistral_fetch.bittorrent.alerts import DiskFailed
from mistral_fetch.bittorrent.client import Download, disk_error
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
