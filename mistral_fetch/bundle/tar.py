"""The bytes of a tar archive around its files' content, one possible form for each member. Pure arithmetic.

POSIX ustar with pax records (IEEE Std 1003.1, "pax", "ustar Interchange Format"). Nothing here reads a header: whoever
reads a bundle knows what has to stand in it, makes the same bytes, and compares. So a member that is a link, a device,
outside its folder, or written in another way is a difference, and needs no rule of its own.
"""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_USTAR_SIZE = 0o77777777777
MAX_USTAR_NAME = 100
_REGULAR, _HARD_LINK, _PAX = b"0", b"1", b"x"
_PAX_NAME = b"pax-header"


def file_header(path: str, size: int) -> bytes:
    """Return what stands before a regular file's content."""
    return _header(path, size, _REGULAR, "")


def link_header(path: str, target: str) -> bytes:
    """Return a member that is another name of a file that came earlier; it has no content."""
    return _header(path, 0, _HARD_LINK, target)


def padding(size: int) -> bytes:
    """Return the zeros after content of ``size`` bytes."""
    return bytes(-size % BLOCK)


def member(path: str, content: bytes) -> bytes:
    """Return a small file whole: header, content, zeros."""
    return file_header(path, len(content)) + content + padding(len(content))


def read_size(header: bytes) -> int:
    """Return the size in a plain header; the header itself is the caller's to compare.

    Raises:
        ValueError: There is none.
    """
    field = header[124:136]
    if len(field) < 12 or field[-1:] != b"\0" or not all(48 <= digit <= 55 for digit in field[:-1]):
        raise ValueError("expected a tar header")
    return int(field[:-1], 8)


def _header(path: str, size: int, kind: bytes, target: str) -> bytes:
    records = {}
    if _needs_record(path):
        records["path"] = path
    if _needs_record(target):
        records["linkpath"] = target
    if size > MAX_USTAR_SIZE:
        records["size"] = str(size)
    extended = b"".join(_record(key, value) for key, value in sorted(records.items()))
    before = b""
    if extended:
        before = _block(_PAX_NAME, len(extended), _PAX, b"") + extended + padding(len(extended))
    return before + _block(_short(path), 0 if "size" in records else size, kind, _short(target))


def _needs_record(name: str) -> bool:
    return not name.isascii() or len(name) > MAX_USTAR_NAME


def _short(name: str) -> bytes:
    # For programs that do not know pax records; all others take the record.
    return name.encode("ascii", "replace")[:MAX_USTAR_NAME]


def _record(key: str, value: str) -> bytes:
    """Return ``length key=value`` and a newline; the length counts its own digits."""
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _block(name: bytes, size: int, kind: bytes, target: bytes) -> bytes:
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"0" * 11 + b"\0"
    tail = kind + target.ljust(100, b"\0") + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" * 2
    checksum = sum(head) + sum(b" " * 8) + sum(tail)
    return (head + b"%06o\0 " % checksum + tail).ljust(BLOCK, b"\0")
