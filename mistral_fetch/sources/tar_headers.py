"""The headers of a tar as values: POSIX ustar and pax, and GNU's long names. Bytes in, values or errors out; no I/O.

Only what a model's archive needs is understood; anything else is refused by name. One block is decoded by
:mod:`tarfile`, which knows the number formats. Extended headers are read here: tarfile would read them whatever
their size.
"""

from __future__ import annotations

import tarfile

from mistral_fetch.errors import MalformedManifest, UnsupportedFormat

BLOCK_BYTES = 512

DIRECTORY = tarfile.DIRTYPE
REGULAR = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE})
PAX = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
PAX_GLOBAL = tarfile.XGLTYPE
LONG_NAME = tarfile.GNUTYPE_LONGNAME

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    b"M": "the rest of a file that begins in another volume",
}
_HINT = "use another channel (mistral-fetch show NAME lists them), and tell the publisher"


def decode_header(block: bytes, offset: int) -> tarfile.TarInfo:
    """Return the fields of one header block, its checksum verified; ``offset`` is its place in the archive.

    Raises:
        UnsupportedFormat: The archive begins with something else.
        MalformedManifest: There is no header here, in the middle of the archive.
    """
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if offset == 0:
            raise _no_tar(block) from error
        raise damaged(f"expected the header of an entry at {offset}, got: {error}") from error


def padded(size: int) -> int:
    """Return how many bytes data of ``size`` takes up, filled to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def pax_records(data: bytes) -> dict[str, bytes]:
    """Return the records ``LENGTH KEY=VALUE\\n`` of a pax header (POSIX.1-2001, pax, "Extended Header").

    Raises:
        MalformedManifest: They are none.
    """
    records: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 8)
        length = decimal(data[position:space]) if space > position else 0
        record = data[position : position + length]
        key, equals, value = record[space + 1 - position : -1].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not (key and equals):
            raise damaged(f"expected a record of an extended header, got {data[position : position + 40]!r}")
        records[key.decode("utf-8", "replace")] = value
        position += length
    return records


def decimal(text: bytes) -> int:
    """Return a number of a pax header.

    Raises:
        MalformedManifest: It is none.
    """
    if not (text.isdigit() and len(text) <= 18):
        raise damaged(f"expected a decimal number, got {text[:40]!r}")
    return int(text)


def damaged(detail: str) -> MalformedManifest:
    """Return the error for: what stands in the archive cannot be."""
    return MalformedManifest("the tar archive is damaged or dishonest", detail=detail, hint=_HINT)


def refused_kind(kind: bytes, path: str) -> UnsupportedFormat:
    """Return the error for: an entry that is no plain file."""
    return refused(_REFUSED.get(kind, f"an entry of type {kind!r}"), path)


def refused(what: str, path: str) -> UnsupportedFormat:
    """Return the error for: an honest archive may hold this, a model's has no need to."""
    detail = f"expected plain files and directories, got {what}: {path[:120]!r}"
    return UnsupportedFormat("the tar archive holds more than plain files", detail=detail, hint=_HINT)


def _no_tar(block: bytes) -> UnsupportedFormat:
    method = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)
    if method is None:
        detail = f"expected the header of a tar, got {block[:16]!r}"
        return UnsupportedFormat("this is no tar archive", detail=detail, hint=_HINT)
    return UnsupportedFormat(
        f"the archive is compressed ({method}), so a file inside it is no range of it",
        detail=f"expected an uncompressed tar, got {method}",
        hint="fetch and unpack it yourself, or use another channel (mistral-fetch show NAME lists them)",
    )
