"""From validated metainfo to libtorrent's parameters, and a check that both mean the same files."""

from __future__ import annotations

from typing import Any

import libtorrent as lt

from mistral_fetch.bittorrent.metainfo import MAX_PIECE_COUNT, MAX_TORRENT_BYTES, Metainfo, unsafe

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
        UnsafeTorrent: libtorrent refuses it, or sees other files, sizes or info-hashes.
    """
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
