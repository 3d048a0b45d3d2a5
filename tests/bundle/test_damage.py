"""A bundle that was changed on the way: named, refused, and nothing wrong of it becomes visible."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bundle.check import verify_bundle
from mistral_fetch.bundle.contents import begin, describe_contents, parse_contents
from mistral_fetch.bundle.reader import BundleReader
from mistral_fetch.bundle.tar import BLOCK, END, file_header, member
from mistral_fetch.bundle.volumes import open_input
from mistral_fetch.errors import (
    ExitCode,
    IntegrityError,
    MalformedBundle,
    ManifestError,
    MistralFetchError,
    PieceMismatch,
    SizeMismatch,
)
from mistral_fetch.events import ignore_events
from tests.bundle.conftest import FILES, PIECE, REF, Once, Receiver, bundle_of, keep

WEIGHTS = FILES["weights/w.bin"]
PIPED = pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])


def cuts(data: bytes) -> list[int]:
    """Return every place of interest, and its neighbours: where headers begin, pieces end, and the end begins."""
    borders = {at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"}
    content = data.index(WEIGHTS)
    borders |= {content + PIECE, content + len(WEIGHTS), len(data) - len(END), len(data) - BLOCK}
    return sorted({at + by for at in borders for by in (-1, 0, 1) if 0 <= at + by < len(data)} | {len(data) - 1})


@PIPED
def test_a_bundle_cut_short_anywhere_publishes_nothing(bundle: bytes, receive: Receiver, piped: bool) -> None:
    for length in cuts(bundle)[:: 5 if piped else 1]:
        with pytest.raises(MistralFetchError) as refused:
            receive(bundle[:length], piped=piped)
        assert isinstance(refused.value, SizeMismatch), (length, refused.value)
        assert refused.value.exit_code is ExitCode.INTEGRITY
    receive.assert_nothing_published()
    receive.assert_exact(receive(bundle, piped=piped))


@PIPED
def test_a_flipped_bit_anywhere_is_refused(bundle: bytes, receive: Receiver, piped: bool) -> None:
    chance = random.Random(7)
    places = {chance.randrange(len(bundle)) for _ in range(16)}
    places |= {
        at + chance.randrange(BLOCK) for at in range(0, len(bundle), BLOCK) if bundle[at + 257 :][:5] == b"ustar"
    }
    for at in sorted(places)[:: 4 if piped else 2]:
        wrong = bytearray(bundle)
        wrong[at] ^= 1 << chance.randrange(8)
        with pytest.raises((ManifestError, IntegrityError)) as refused:
            receive(bytes(wrong), piped=piped)
        assert refused.value.exit_code in {ExitCode.BAD_MANIFEST, ExitCode.INTEGRITY}, at
        receive.assert_nothing_published()
        shutil.rmtree(receive.home, ignore_errors=True)  # what one import verified, the next one does not read


def test_a_wrong_piece_is_named_with_what_it_should_be(bundle: bytes, receive: Receiver) -> None:
    wrong = bytearray(bundle)
    wrong[bundle.index(WEIGHTS) + PIECE + 9] ^= 64
    piece = bytes(wrong[bundle.index(WEIGHTS) + PIECE :][:PIECE])
    with pytest.raises(PieceMismatch) as refused:
        receive(bytes(wrong))
    assert "weights/w.bin" in refused.value.what
    assert f"piece 1 at bytes [{PIECE}, {2 * PIECE})" in refused.value.what
    assert hashlib.sha256(WEIGHTS[PIECE : 2 * PIECE]).hexdigest() in refused.value.detail
    assert hashlib.sha256(piece).hexdigest() in refused.value.detail


@PIPED
def test_verify_names_every_wrong_piece_and_goes_on(bundle: bytes, receive: Receiver, piped: bool) -> None:
    wrong = bytearray(bundle)
    for at in (5, 3 * PIECE + 1):
        wrong[bundle.index(WEIGHTS) + at] ^= 1
    wrong[bundle.index(b"named at length")] ^= 1
    path = receive.folder / "in.tar"
    path.write_bytes(wrong)
    with open_input([str(path)]) as source:
        found = verify_bundle(BundleReader(Once(source) if piped else source), ignore_events, lambda: None)
    assert [(piece.path.partition("/")[0], piece.index) for piece in found] == [
        ("Größe", 0),
        ("weights", 0),
        ("weights", 3),
    ]
    path.write_bytes(bundle)
    with open_input([str(path)]) as source:
        assert verify_bundle(BundleReader(source), ignore_events, lambda: None) == []


def extra_at_end(data: bytes) -> bytes:
    return data[: -len(END)] + member("extra.txt", b"more") + END


def extra_in_the_middle(data: bytes) -> bytes:
    at = data.index(file_header("tiny-v1/weights/w.bin", len(WEIGHTS)))
    return data[:at] + member("tiny-v1/extra.txt", b"more") + data[at:]


def without_a_member(data: bytes) -> bytes:
    header = file_header("tiny-v1/empty.txt", 0)
    return data.replace(header, b"", 1)


def a_member_twice(data: bytes) -> bytes:
    header = file_header("tiny-v1/empty.txt", 0)
    return data.replace(header, header * 2, 1)


def in_another_order(data: bytes) -> bytes:
    first, second = file_header("tiny-v1/empty.txt", 0), member("tiny-v1/again.json", b"{}\n")
    assert second + b"" in data
    return data.replace(second, b"\1", 1).replace(first, second, 1).replace(b"\1", first, 1)


def header_changed(start: int, value: bytes) -> Callable[[bytes], bytes]:
    """Return what changes a field of one member's header and makes its checksum fit again."""

    def change(data: bytes) -> bytes:
        header = bytearray(file_header("tiny-v1/empty.txt", 0))
        at = data.index(header)
        header[start : start + len(value)] = value
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + BLOCK :]

    return change


def with_pax(record: bytes) -> Callable[[bytes], bytes]:
    """Return what puts an extended header before one member."""

    def change(data: bytes) -> bytes:
        header = file_header("tiny-v1/empty.txt", 0)
        text = b"%d %s\n" % (len(record) + 4, record)
        extended = bytearray(file_header("pax-header", len(text)))
        extended[156:157] = b"x"
        extended[148:156] = b" " * 8
        extended[148:156] = b"%06o\0 " % sum(extended)
        return data.replace(header, bytes(extended) + text.ljust(BLOCK, b"\0") + header, 1)

    return change


TAMPERED = {
    "an extra member at the end": extra_at_end,
    "an extra member in the middle": extra_in_the_middle,
    "a missing member": without_a_member,
    "a member twice": a_member_twice,
    "another order": in_another_order,
    "trailing zeros": lambda data: data + bytes(9 * BLOCK),
    "trailing bytes": lambda data: data + b"x",
    "a second bundle": lambda data: data + data,
    "a symbolic link": header_changed(156, b"2/etc/passwd"),
    "a hard link": header_changed(156, b"1/etc/passwd"),
    "a device": header_changed(156, b"3"),
    "a directory": header_changed(156, b"5"),
    "a pipe": header_changed(156, b"6"),
    "an absolute path": header_changed(0, b"/tiny-v1/empty"),
    "a path that leaves": header_changed(0, b"../tiny-v1/empty.txt"),
    "another mode": header_changed(100, b"0004755\0"),
    "another owner": header_changed(108, b"0001750\0"),
    "another time": header_changed(136, b"00000000001\0"),
    "a bomb of a size": header_changed(124, b"77777777777\0"),
    "a size in base 256": header_changed(124, b"\x80" + bytes(10) + b"\1"),
    "a prefix": header_changed(345, b"/etc"),
    "a pax path": with_pax(b"path=../../x"),
    "a pax size": with_pax(b"size=99999999"),
    "a pax comment": with_pax(b"comment=hello"),
}


@PIPED
@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_a_sequence_that_is_not_the_only_right_one_is_refused(
    change: Callable[[bytes], bytes], bundle: bytes, receive: Receiver, piped: bool
) -> None:
    tampered = change(bundle)
    assert tampered != bundle
    with pytest.raises((MalformedBundle, SizeMismatch)) as refused:
        receive(tampered, piped=piped)
    receive.assert_nothing_published()
    assert len(refused.value.lines()) == 3
    if not piped:
        assert not receive.home.exists(), "of a file all is known before a byte is written"


def contents_of(bundle: bytes) -> bytes:
    """Return the table of contents."""
    at = bundle.index(b'{\n "models"')
    return bundle[at : bundle.index(b"\0", at)]


def with_contents(bundle: bytes, new: bytes) -> bytes:
    """Return the bundle with another table of contents, which its header and its end vouch for."""
    old = contents_of(bundle)
    rest = bundle[len(begin(old)) :]
    return begin(new) + rest.replace(*(hashlib.sha256(text).hexdigest().encode() for text in (old, new)))


def with_model(bundle: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the bundle with its model described otherwise."""
    fields = json.loads(contents_of(bundle))
    change(fields["models"][0])
    return with_contents(bundle, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())


@pytest.mark.parametrize(
    "field, value",
    [
        ("folder", "../up"),
        ("folder", "/etc"),
        ("folder", ".hidden"),
        ("folder", "a/b"),
        ("folder", "bundle.end"),
        ("ref", "a\nb"),
        ("ref", "a\x1b[2J"),
        ("ref", ""),
        ("ref", "\ud800"),
        ("channel", "bundle"),
        ("channel", "hub"),
        ("ref", "tiny"),
        ("ref", "mistral-7b@v0.1"),
        ("ref", "hf:org/model@main"),
        ("ref", "tiny.torrent#0123456789abcdef"),
        ("ref", "https://site.example/model.torrent"),
        ("ref", "/srv/tiny.meta4"),
        ("ref", "./tiny"),
        ("content_digest", "0" * 64),
        ("signed_as", "manifest"),
        ("documents", []),
        ("documents", [{"path": "../x", "size": 1, "sha256": "0" * 64}]),
        ("documents", [{"path": "manifest.meta4", "size": 1 << 40, "sha256": "0" * 64}]),
        ("surprise", 1),
    ],
)
def test_a_hostile_table_of_contents_is_refused(field: str, value: object, bundle: bytes, receive: Receiver) -> None:
    data = with_model(bundle, lambda model: model.update({field: "X-SURROGATE" if value == "\ud800" else value}))
    if value == "\ud800":  # as JSON can write it, and Python's own would not
        data = with_contents(data, contents_of(data).replace(b"X-SURROGATE", rb"\ud800"))
    with pytest.raises(MalformedBundle):
        receive(data)
    assert not receive.home.exists()


def with_manifest(bundle: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return the bundle with another manifest, which everything in it vouches for."""
    at = bundle.index(b"<?xml")
    old = bundle[at : bundle.index(b"\0", at)]
    new = change(old)
    assert new != old
    path = "tiny-v1/manifest.meta4"
    described = {"path": "manifest.meta4", "size": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    data = bundle.replace(member(path, old), member(path, new))
    return with_model(data, lambda model: model["documents"].__setitem__(0, described))


def test_the_helper_makes_bundles_that_are_refused_for_their_manifest_alone(bundle: bytes, receive: Receiver) -> None:
    receive.assert_exact(receive(with_manifest(bundle, lambda text: text.replace(b"mistral-fetch<", b"somebody<"))))


WITHOUT_PIECES = re.compile(rb"    <pieces.*?</pieces>\n", re.DOTALL)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: WITHOUT_PIECES.sub(b"", text),
        lambda text: text.replace(b'length="65536"', b'length="1"'),
        lambda text: text.replace(b"<size>3</size>", b"", 1),
        lambda text: re.sub(rb"    <hash type=.*?\n", b"", text, count=1),
        lambda text: text.replace(b'name="again.json"', b'name="other.json"'),
        lambda text: text.replace(b'name="again.json"', b'name="../again.json"'),
        lambda text: text.replace(b'name="again.json"', b'name="/again.json"'),
        lambda text: text.replace(b'name="again.json"', b'name="PARAMS.json"'),
        lambda text: text.replace(b"<size>3</size>", b"<size>99999999999999999</size>", 1),
        lambda text: b"<!DOCTYPE x>" + text,
        lambda text: b"",
    ],
    ids=[
        "no pieces",
        "tiny pieces",
        "no size",
        "no digest",
        "another name",
        "up",
        "root",
        "case",
        "bomb",
        "dtd",
        "none",
    ],
)
@PIPED
def test_a_hostile_manifest_is_refused(
    change: Callable[[bytes], bytes], bundle: bytes, receive: Receiver, piped: bool
) -> None:
    with pytest.raises(ManifestError) as refused:
        receive(with_manifest(bundle, change), piped=piped)
    assert refused.value.exit_code is ExitCode.BAD_MANIFEST
    assert not receive.home.exists()


def test_a_model_has_one_licence(tmp_path: Path, receive: Receiver) -> None:
    data = bundle_of(keep(tmp_path / "from", {"a": b"a"}, REF))
    second = bundle_of(keep(tmp_path / "second", {"a": b"a", "license": b"mine"}, REF))
    assert data.count(b"/LICENSE\0") == 1
    assert second.count(b"/LICENSE\0") == 0
    receive.assert_exact(receive(second), {"license": b"mine"})


def test_a_table_of_contents_survives_being_read(bundle: bytes) -> None:
    text = contents_of(bundle)
    assert describe_contents(parse_contents(text)) == text


@pytest.mark.parametrize("data", [b"", b"x", bytes(BLOCK), bytes(4 * BLOCK), b"\x1f\x8b" * BLOCK, b"<html>" * 999])
def test_what_is_no_bundle_is_said_to_be_none(data: bytes, receive: Receiver) -> None:
    with pytest.raises((MalformedBundle, SizeMismatch)):
        receive(data)


@pytest.mark.parametrize(
    "name, size", [("bundle.json", 1 << 33), ("bundle.json", 5000), ("other.json", 100), ("bundle.json", 0)]
)
def test_the_first_member_is_bounded(name: str, size: int, receive: Receiver) -> None:
    with pytest.raises((MalformedBundle, SizeMismatch)):
        receive(file_header(name, size) + bytes(8 * BLOCK))
