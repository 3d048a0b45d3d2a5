"""Hostile tars: each refused with its error, after a bounded number of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_fetch.errors import MalformedManifest, ManifestError, UnsafePath, UnsupportedFormat
from mistral_fetch.manifest import MAX_FILES
from mistral_fetch.sources.tar_walk import MAX_EXTENSION_BYTES, MAX_HEADERS, MAX_TRAILER_BYTES, walk_tar

END = bytes(1024)


def seal(block: bytes) -> bytes:
    """Return a header block with the checksum it should have."""
    empty = block[:148] + b" " * 8 + block[156:]
    return empty[:148] + b"%06o\0 " % sum(empty) + empty[156:]


def header(name: bytes | str = "f", size: int = 0, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    """Return the header of an entry; ``size_field`` is written as it is."""
    name = name.encode() if isinstance(name, str) else name
    field = b"%011o\0" % size if size_field is None else size_field
    block = name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"%011o\0" % 0 + bytes(8) + kind + bytes(100)
    return seal((block + b"ustar\x0000").ljust(512, b"\0"))


def entry(name: bytes | str = "f", data: bytes = b"x", kind: bytes = b"0") -> bytes:
    """Return an entry with its data."""
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax(*records: tuple[str, bytes], kind: bytes = b"x") -> bytes:
    """Return an extended header."""
    data = b""
    for key, value in records:
        body = b" " + key.encode() + b"=" + value + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length = len(str(length)) + len(body)
        data += str(length).encode() + body
    return entry("PaxHeaders/f", data, kind)


def base256(value: int) -> bytes:
    """Return a size as GNU tar writes large ones; negative ones begin with 0xff."""
    return (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)


def link(kind: bytes) -> bytes:
    """Return a link that leads out of the archive."""
    block = bytearray(header("l", kind=kind))
    block[157:168] = b"/etc/passwd"
    return seal(bytes(block))


GOOD = entry("a/good", b"good" * 200)
HOSTILE: Mapping[str, tuple[bytes, type[ManifestError]]] = {
    # No tar at all.
    "random bytes": (random.Random(1).randbytes(5000), UnsupportedFormat),
    "a web page": (b"<!doctype html><html>".ljust(2000), UnsupportedFormat),
    "gzip": (gzip.compress(GOOD + END).ljust(1024, b"\0"), UnsupportedFormat),
    "xz": (lzma.compress(GOOD + END).ljust(1024, b"\0"), UnsupportedFormat),
    "bzip2": (bz2.compress(GOOD + END).ljust(1024, b"\0"), UnsupportedFormat),
    "zstd": (b"\x28\xb5\x2f\xfd".ljust(1024, b"\0"), UnsupportedFormat),
    "a wrong checksum at the start": (b"X" + GOOD[1:] + END, UnsupportedFormat),
    # Damaged or cut short.
    "nothing": (b"", MalformedManifest),
    "less than a block": (GOOD[:300], MalformedManifest),
    "only the end mark": (END, MalformedManifest),
    "no end mark": (GOOD, MalformedManifest),
    "cut inside a header": (GOOD + GOOD[:200], MalformedManifest),
    "cut inside the data": (header("a", 5000) + bytes(4000), MalformedManifest),
    "cut inside the padding": (header("a", 5000) + bytes(5000), MalformedManifest),
    "a wrong checksum later": (GOOD + b"X" + entry("b")[1:] + END, MalformedManifest),
    "data where a header should be": (header("a", 10) + b"y" * 1024 + END, MalformedManifest),
    "one flipped bit in a size": (
        GOOD + bytes(c ^ (at == 130) for at, c in enumerate(entry("b"))) + END,
        MalformedManifest,
    ),
    # Sizes.
    "a negative size": (header("a", size_field=base256(-512)) + END, MalformedManifest),
    "a negative size that would walk in circles": (
        GOOD + header("a", size_field=base256(-len(GOOD) - 512)) + END,
        MalformedManifest,
    ),
    "a negative octal size": (header("a", size_field=b"-0000001000\0") + END, MalformedManifest),
    "a size of 2 to the 80": (header("a", size_field=base256(1 << 80)) + END, MalformedManifest),
    "a size beyond the archive": (header("a", 1 << 30) + END, MalformedManifest),
    "a size of letters": (GOOD + header("a", size_field=b"many bytes\0\0") + END, MalformedManifest),
    "a pax size beyond the archive": (pax(("size", b"9" * 17)) + entry() + END, MalformedManifest),
    "a pax size of letters": (pax(("size", b"-1")) + entry() + END, MalformedManifest),
    "a pax size of 5000 digits": (pax(("size", b"9" * 5000)) + entry() + END, MalformedManifest),
    "a directory with data": (header("d/", 512, b"5") + bytes(512) + END, MalformedManifest),
    # What is no plain file.
    "a symbolic link": (GOOD + link(b"2") + END, UnsupportedFormat),
    "a hard link": (GOOD + link(b"1") + END, UnsupportedFormat),
    "a character device": (header("d", kind=b"3") + END, UnsupportedFormat),
    "a block device": (header("d", kind=b"4") + END, UnsupportedFormat),
    "a named pipe": (header("p", kind=b"6") + END, UnsupportedFormat),
    "a contiguous file": (entry("c", kind=b"7") + END, UnsupportedFormat),
    "a GNU sparse file": (header("s", kind=b"S") + END, UnsupportedFormat),
    "a pax sparse file": (
        pax(("GNU.sparse.major", b"1"), ("GNU.sparse.name", b"s"), ("GNU.sparse.realsize", b"99999")) + entry() + END,
        UnsupportedFormat,
    ),
    "a volume that goes on": (header("v", kind=b"M") + END, UnsupportedFormat),
    "a type nobody knows": (header("v", kind=b"\xff") + END, UnsupportedFormat),
    "a long link name": (entry("././@LongLink", b"/etc/passwd\0", b"K") + link(b"2") + END, UnsupportedFormat),
    "a name for all files": (pax(("path", b"same"), kind=b"g") + entry() + END, UnsupportedFormat),
    "a size for all files": (pax(("size", b"0"), kind=b"g") + entry() + END, UnsupportedFormat),
    # Names.
    "absolute": (entry("/etc/passwd") + END, UnsafePath),
    "dot dot": (entry("../x") + END, UnsafePath),
    "dot dot inside": (entry("a/../../x") + END, UnsafePath),
    "dot dot after a dot": (entry("./../x") + END, UnsafePath),
    "dot dot in a pax name": (pax(("path", b"../../x")) + entry() + END, UnsafePath),
    "dot dot in a GNU long name": (entry("././@LongLink", b"../x\0", b"L") + entry() + END, UnsafePath),
    "a null byte in a pax name": (pax(("path", b"a\0b")) + entry() + END, UnsafePath),
    "a line break in a pax name": (pax(("path", b"a\nb")) + entry() + END, UnsafePath),
    "a name that is no UTF-8": (entry(b"\xff\xfe") + END, UnsafePath),
    "terminal escapes": (entry("a\x1b[2J") + END, UnsafePath),
    "text that runs backwards": (entry("a\u202egpj.exe") + END, UnsafePath),
    "a file that is called a directory": (entry("a/") + END, UnsafePath),
    "no name": (entry("") + END, UnsafePath),
    "the same name twice": (entry("a") + entry("a") + END, UnsafePath),
    "the same name with a dot": (entry("a") + entry("./a") + END, UnsafePath),
    "the same but for case": (entry("A") + entry("a") + END, UnsafePath),
    "a file and a folder": (entry("a") + entry("a/b") + END, UnsafePath),
    "a pax name beyond all": (pax(("path", b"a/" * 2000 + b"a")) + entry() + END, UnsafePath),
    # Extended headers.
    "an extended header of a gigabyte": (header("x", 1 << 30, b"x") + END, MalformedManifest),
    "an extended header just too large": (
        pax(("comment", b"x" * MAX_EXTENSION_BYTES)) + entry() + END,
        MalformedManifest,
    ),
    "an extended header of negative size": (header("x", kind=b"x", size_field=base256(-512)) + END, MalformedManifest),
    "a long name of a gigabyte": (header("x", 1 << 30, b"L") + END, MalformedManifest),
    "a record of no length": (entry("x", b"0 path=a\n", b"x") + entry() + END, MalformedManifest),
    "a record that is longer than all": (entry("x", b"999 path=a\n", b"x") + entry() + END, MalformedManifest),
    "a record without an end": (entry("x", b"9 path=ab", b"x") + entry() + END, MalformedManifest),
    "a record without a key": (entry("x", b"5 =a\n", b"x") + entry() + END, MalformedManifest),
    "a record that is none": (entry("x", b"\xff" * 100, b"x") + entry() + END, MalformedManifest),
    "two long names": (pax(("path", b"a")) + pax(("path", b"b")) + entry() + END, MalformedManifest),
    "a long name of each kind": (
        pax(("path", b"a")) + entry("././@LongLink", b"b\0", b"L") + entry() + END,
        MalformedManifest,
    ),
    "an empty long name": (entry("././@LongLink", b"\0", b"L") + entry() + END, MalformedManifest),
    "an extended header of nothing": (GOOD + pax(("path", b"a")) + END, MalformedManifest),
    "extended headers and no file": (pax(("comment", b"x")) * (MAX_HEADERS + 1), MalformedManifest),
    # Too much.
    "too many files": (b"".join(header(f"{n}") for n in range(MAX_FILES + 1)) + END, MalformedManifest),
    "too many directories": (header("d/", kind=b"5") * (MAX_HEADERS + 1) + END, MalformedManifest),
}


class Served:
    """A tar that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.read_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of it; asks for what it does not have are defects of the walk."""
        assert offset >= 0
        assert 0 < length <= len(self._data) - offset
        self.read_bytes += length
        return self._data[offset : offset + length]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused(name: str) -> None:
    data, kind = HOSTILE[name]
    served = Served(data)
    with pytest.raises(ManifestError) as caught:
        walk_tar(served.read, len(data))
    assert type(caught.value) is kind, caught.value.lines()
    assert caught.value.exit_code == 20
    assert all(0 < len(line) < 600 and line.isprintable() for line in caught.value.lines())
    assert served.read_bytes <= 2 * len(data)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(1 << 63)])
def test_a_negative_size_is_refused_at_its_header(size: int) -> None:
    data = GOOD + header("a", size_field=base256(size)) + END
    with pytest.raises(MalformedManifest) as caught:
        walk_tar(Served(data).read, len(data))
    assert caught.value.detail.endswith(f"bytes of 'a', got {size}")


def test_a_gigabyte_behind_the_end_is_refused_without_reading_it() -> None:
    data = GOOD + END
    served = Served(data)
    with pytest.raises(MalformedManifest, match="damaged or dishonest"):
        walk_tar(lambda at, length: served.read(at, min(length, len(data) - at)).ljust(length, b"\0"), 1 << 30)
    assert served.read_bytes <= 2 * len(data)
    assert walk_tar(served.read, len(data))
    padded = data + bytes(MAX_TRAILER_BYTES - 512)
    assert walk_tar(Served(padded).read, len(padded))


def test_a_thousand_large_extended_headers_are_refused_in_time() -> None:
    data = (pax(("comment", b"x" * 60_000)) + header("a", kind=b"5")) * 1500
    served = Served(data)
    with pytest.raises(MalformedManifest) as caught:
        walk_tar(served.read, len(data))
    assert "bytes of headers" in caught.value.detail


@given(st.binary(max_size=2000))
def test_any_bytes_are_a_tar_or_a_manifest_error(data: bytes) -> None:
    try:
        walk_tar(Served(data).read, len(data))
    except ManifestError:
        return


FIELDS = [(0, 100), (124, 136), (148, 157), (257, 265), (345, 500)]


@given(st.data())
@settings(deadline=None)
def test_a_header_with_any_fields_is_walked_or_a_manifest_error(data: st.DataObject) -> None:
    blocks = [pax(("path", b"long")), entry("a", b"1"), entry("././@LongLink", b"name\0", b"L"), entry("b", b"2")]
    for number, block in enumerate(blocks):
        start, end = data.draw(st.sampled_from(FIELDS))
        changed = bytearray(block[:512])
        changed[start:end] = data.draw(st.binary(min_size=end - start, max_size=end - start))
        blocks[number] = seal(bytes(changed)) + block[512:]
    whole = b"".join(blocks) + END
    try:
        members = walk_tar(Served(whole).read, len(whole))
    except ManifestError:
        return
    spans = [(member.offset, member.end) for member in members]
    assert spans == sorted(spans)
    assert all(0 < start <= end <= len(whole) for start, end in spans)


def test_the_builders_of_these_tests_write_what_the_standard_library_reads() -> None:
    """A hostile tar that is refused for a slip in this file would prove nothing."""
    data = pax(("path", b"long/name"), ("size", b"4")) + entry("x", b"data") + entry("b", b"22") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(info.name, info.size) for info in archive] == [("long/name", 4), ("b", 2)]
    assert [(m.path, m.size) for m in walk_tar(Served(data).read, len(data))] == [("long/name", 4), ("b", 2)]
    assert struct.unpack(">q", base256(-512)[4:]) == (-512,)
