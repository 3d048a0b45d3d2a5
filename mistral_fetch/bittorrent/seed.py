"""Seed one directory of files that lie under their own names, on given addresses."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
        places = {file.path: directory / file.path for file in metainfo.files}
        parameters = seeding_parameters(metainfo, places, settings)
        if skips_checks:
            parameters.flags |= lt.torrent_flags.seed_mode
        if rate_bytes_per_second is not None:
            parameters.upload_limit = rate_bytes_per_second
        self._metainfo = metainfo
        pack: Any = {**seeding_settings(settings), "alert_mask": 0, "disable_hash_checks": skips_checks}
        self._session = lt.session(pack)
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


def seeding_parameters(
    metainfo: Metainfo, places: Mapping[str, Path], settings: SwarmSettings
) -> lt.add_torrent_params:
    """Return what libtorrent is told of a torrent that is only ever given away.

    Args:
        metainfo: The torrent.
        places: Where each of its files lies, by path; never written to.
        settings: Whom to tell.

    Raises:
        UnsafeTorrent: libtorrent reads the torrent differently.
    """
    parameters = load_parameters(metainfo)
    parameters.save_path = str(places[metainfo.files[0].path].parent.absolute())
    parameters.renamed_files = {file.index: str(places[file.path].absolute()) for file in metainfo.files}
    # upload_mode: never ask anyone for anything, so that nothing here is ever overwritten.
    parameters.flags = lt.torrent_flags.update_subscribe | lt.torrent_flags.upload_mode
    parameters.trackers = list(metainfo.trackers) if settings.use_trackers else []
    parameters.url_seeds = []
    return parameters


def seeding_settings(settings: SwarmSettings) -> dict[str, Any]:
    """Return libtorrent's settings for a session that only seeds: as many peers as come, deep send buffers."""
    return {
        **session_settings(settings, incoming=True),
        "unchoke_slots_limit": -1,
        "allowed_fast_set_size": 5,
        "connections_limit": 1000,
        "max_queued_disk_bytes": 64 * 1024 * 1024,
        "send_buffer_watermark": 8 * 1024 * 1024,
    }
