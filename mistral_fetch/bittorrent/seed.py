"""Seed one directory of files that lie under their own names, on given addresses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.settings import SwarmSettings, session_settings
from mistral_fetch.errors import SizeMismatch

POLL_SECONDS = 0.02


class Seeder:
    """Offers a torrent whose files lie below ``directory`` (``directory/path``, without the torrent's own name).

    Args:
        metainfo: The torrent.
        directory: Where its files are; never written to.
        settings: Addresses to listen on, and whom to tell.
        rate_bytes_per_second: The most to send; unlimited when None.
        skips_checks: Claim to have everything and never hash it. For tests: a liar when the files are wrong.
    """

    def __init__(
        self,
        metainfo: Metainfo,
        directory: Path,
        settings: SwarmSettings,
        *,
        rate_bytes_per_second: int | None = None,
        skips_checks: bool = False,
    ) -> None:
        parameters = load_parameters(metainfo)
        parameters.save_path = str(directory)
        parameters.renamed_files = {file.index: str(directory / file.path) for file in metainfo.files}
        # upload_mode: never ask anyone for anything, so that nothing here is ever overwritten.
        parameters.flags = lt.torrent_flags.update_subscribe | lt.torrent_flags.upload_mode
        parameters.trackers = list(metainfo.trackers) if settings.use_trackers else []
        parameters.url_seeds = []
        if skips_checks:
            parameters.flags |= lt.torrent_flags.seed_mode
        if rate_bytes_per_second is not None:
            parameters.upload_limit = rate_bytes_per_second
        self._metainfo = metainfo
        self._session = lt.session(_seeding_settings(settings, skips_checks))
        self._handle = self._session.add_torrent(parameters)

    def wait_until_seeding(self, timeout_seconds: float = 600) -> None:
        """Return when every piece was checked.

        Raises:
            SizeMismatch: A piece is missing or wrong; this directory cannot seed the torrent.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._handle.status().is_seeding:
            status = self._handle.status()
            checked = status.state in {lt.torrent_status.states.downloading, lt.torrent_status.states.finished}
            if status.errc.value() or checked or time.monotonic() > deadline:
                raise SizeMismatch(
                    f"these files are not the ones {self._metainfo.name} describes",
                    detail=f"expected all {self._metainfo.piece_count} pieces, got {status.num_pieces} right ones",
                    hint="verify the directory, then publish it again",
                )
            time.sleep(POLL_SECONDS)

    @property
    def port(self) -> int:
        """Return the TCP port peers connect to."""
        return int(self._session.listen_port())

    @property
    def uploaded_bytes(self) -> int:
        """Return how many payload bytes were sent."""
        return int(self._handle.status().total_payload_upload)

    def close(self) -> None:
        """Stop seeding."""
        self._session.remove_torrent(self._handle)


def _seeding_settings(settings: SwarmSettings, skips_checks: bool) -> Any:
    return {
        **session_settings(settings, incoming=True),
        "alert_mask": 0,
        "unchoke_slots_limit": -1,
        "allowed_fast_set_size": 5,
        "connections_limit": 1000,
        "max_queued_disk_bytes": 64 * 1024 * 1024,
        "send_buffer_watermark": 8 * 1024 * 1024,
        "disable_hash_checks": skips_checks,
    }
