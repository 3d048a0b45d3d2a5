"""Fetch a torrent's metadata from its peers (BEP 9): from a magnet link to validated metainfo.

Nothing is written where the model goes, and no file is asked for, before the metadata passed validation.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import libtorrent as lt

from mistral_fetch.bittorrent.client import open_session
from mistral_fetch.bittorrent.magnet import Magnet
from mistral_fetch.bittorrent.metainfo import Metainfo, parse_metainfo, unsafe, wrap_info
from mistral_fetch.bittorrent.peers import Endpoint
from mistral_fetch.bittorrent.settings import SwarmSettings, find_peers_hint
from mistral_fetch.errors import MetadataTimeout

POLL_SECONDS = 0.1


def ask_for_metadata(
    magnet: Magnet,
    settings: SwarmSettings,
    peers: list[Endpoint],
    on_peers: Callable[[int], None],
    check_stop: Callable[[], None],
) -> Metainfo:
    """Return the metadata of the torrent that ``magnet`` names.

    Args:
        magnet: Which torrent, and where to ask.
        settings: What to ask of the swarm, and how long to wait.
        peers: Peers to connect to at once.
        on_peers: Called with the number of connected peers when it changes.
        check_stop: Called often; raises to end the wait.

    Raises:
        MetadataTimeout: Nobody sent it in time.
        UnsafeTorrent: What was sent is malformed or hostile.
        UnsafePath: It names files that would leave their directory.
    """
    session = open_session(settings, magnet.trackers)
    with tempfile.TemporaryDirectory(prefix="mistral-fetch-metadata-") as scratch:
        handle = _add(session, _parameters(magnet, settings, peers, scratch))
        try:
            info = _wait(handle, magnet, settings, peers, on_peers, check_stop)
        finally:
            session.remove_torrent(handle)
            del handle, session  # before the scratch folder goes
    metainfo = parse_metainfo(wrap_info(info))
    check_is_named_by(metainfo, magnet)
    return replace(metainfo, trackers=magnet.trackers, web_seeds=magnet.web_seeds)


def check_is_named_by(metainfo: Metainfo, magnet: Magnet) -> None:
    """Check that a torrent is the one a magnet link names.

    Raises:
        UnsafeTorrent: It is another one.
    """
    for expected, actual in (
        (magnet.info_hash_v1, metainfo.info_hash_v1),
        (magnet.info_hash_v2, metainfo.info_hash_v2),
    ):
        if expected is not None and expected != actual:
            raise unsafe(f"the torrent with info-hash {expected}", str(actual))


def _add(session: lt.session, parameters: lt.add_torrent_params) -> lt.torrent_handle:
    try:
        return session.add_torrent(parameters)
    except RuntimeError as error:
        raise unsafe("an info-hash that libtorrent accepts", str(error)) from error


def _parameters(magnet: Magnet, settings: SwarmSettings, peers: list[Endpoint], scratch: str) -> lt.add_torrent_params:
    parameters = lt.add_torrent_params()
    v1 = lt.sha1_hash(bytes.fromhex(magnet.info_hash_v1)) if magnet.info_hash_v1 else None
    v2 = lt.sha256_hash(bytes.fromhex(magnet.info_hash_v2)) if magnet.info_hash_v2 else None
    parameters.info_hashes = lt.info_hash_t(*(part for part in (v1, v2) if part is not None))
    parameters.save_path = scratch
    parameters.flags = lt.torrent_flags.update_subscribe | lt.torrent_flags.default_dont_download
    if not settings.pex:
        parameters.flags |= lt.torrent_flags.disable_pex
    parameters.trackers = settings.usable_trackers(magnet.trackers)
    parameters.peers = list(peers)
    return parameters


def _wait(
    handle: lt.torrent_handle,
    magnet: Magnet,
    settings: SwarmSettings,
    peers: list[Endpoint],
    on_peers: Callable[[int], None],
    check_stop: Callable[[], None],
) -> bytes:
    started = last_answer = last_asked = time.monotonic()
    count = 0
    while not handle.status(0).has_metadata:
        check_stop()
        now = time.monotonic()
        connected = handle.status(0).num_peers
        if connected != count:
            count = connected
            on_peers(count)
        if connected:
            last_answer = now
        elif now - last_asked > 1:
            last_asked = now
            for peer in peers:
                handle.connect_peer(peer)
        if now - last_answer > settings.no_peers_timeout_seconds or now - started > settings.metadata_timeout_seconds:
            raise _timeout(magnet, settings, count, now - started)
        time.sleep(POLL_SECONDS)
    torrent = handle.torrent_file()
    assert torrent is not None, "has_metadata says so"
    return bytes(torrent.info_section())


def _timeout(magnet: Magnet, settings: SwarmSettings, peers: int, seconds: float) -> MetadataTimeout:
    answer = f"{peers} peers that do not have it" if peers else "no peer that answers"
    return MetadataTimeout(
        f"no peer sent the metadata of torrent {magnet.info_hash[:8]}… {magnet.name[:80]}".rstrip(),
        detail=f"expected it within {seconds:.0f} s, got {answer}",
        hint=find_peers_hint(settings),
    )
