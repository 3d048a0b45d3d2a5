"""From validated metainfo to libtorrent's parameters, and a check that both mean the same files."""

from __future__ import annotations

from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.metainfo import BLOCK_LENGTH, MAX_PIECE_COUNT, MAX_TORRENT_BYTES, Metainfo, unsafe
from mistral_fetch.errors import UnsafeTorrent

# Any: the stubs leave out that the limits are read from the same dictionary.
_LIMITS: Any = {
    "max_buffer_size": MAX_TORRENT_BYTES,
    "max_pieces": MAX_PIECE_COUNT,
    "max_decode_depth": 100,
    "max_decode_tokens": 3_000_000,
}


def load_parameters(metainfo: Metainfo) -> lt.add_torrent_params:
    """Return libtorrent's view of a torrent, after checking that it is also ours.

    Two readers of the same bytes that disagree are how a hostile torrent would get a file past validation.

    Raises:
        UnsafeTorrent: libtorrent refuses it, sees other files, sizes or info-hashes, or has a fault that lets a peer
            of this torrent write outside its memory.
    """
    _keep_from_hash_picker_fault(metainfo)
    try:
        parameters = lt.load_torrent_buffer(metainfo.data, _LIMITS)
    except RuntimeError as error:
        raise unsafe("a torrent that libtorrent accepts", str(error)) from error
    torrent = parameters.ti
    if torrent is None:
        raise unsafe("a torrent with metadata", "none")
    ours = (metainfo.piece_length, metainfo.piece_count, metainfo.info_hash_v1, metainfo.info_hash_v2)
    hashes = torrent.info_hashes()
    theirs = (
        torrent.piece_length(),
        torrent.num_pieces(),
        str(hashes.v1) if hashes.has_v1() else None,
        str(hashes.v2) if hashes.has_v2() else None,
    )
    if ours != theirs:
        raise unsafe("one reading of the torrent", f"{ours} here and {theirs} in libtorrent")
    _compare_files(metainfo, torrent.layout())
    return parameters


def _keep_from_hash_picker_fault(metainfo: Metainfo) -> None:
    """Refuse the one shape of torrent in which libtorrent 2.1.1 takes a rejected hash request for another.

    After a failed piece it asks for the hashes of the piece's blocks, and a peer's "hash reject" (BEP 52) is then
    looked up among the requests for hashes of pieces. Where pieces are blocks it cannot tell the two apart, and files
    of one piece have no such requests: it writes past the end of an empty list. See its pull requests 8630 and 8863.
    """
    if metainfo.info_hash_v2 is None or metainfo.piece_length != BLOCK_LENGTH:
        return
    for file in metainfo.files:
        if 0 < file.size <= BLOCK_LENGTH:
            raise UnsafeTorrent(
                f"refused to join the swarm of {metainfo.name}: a peer could crash libtorrent with it",
                detail=f"expected pieces of 32 KiB or more beside v2 hashes, got 16 KiB and {file.path} in one of them",
                hint="fetch with --via http, or ask the publisher for a torrent with larger pieces",
            )


def _compare_files(metainfo: Metainfo, layout: lt.file_storage) -> None:
    ours = {file.index: (file.size, file.offset) for file in metainfo.files}
    theirs = {
        index: (layout.file_size(index), layout.file_offset(index))
        for index in range(layout.num_files())
        if not layout.file_flags(index) & lt.file_flags_t.flag_pad_file
    }
    if ours != theirs:
        differing = next(index for index in sorted({*ours, *theirs}) if ours.get(index) != theirs.get(index))
        raise unsafe(
            f"file {differing} as (size, offset) {ours.get(differing)}", f"{theirs.get(differing)} in libtorrent"
        )
