"""A publication is read back as strangers will read it: whatever contradicts the rest is refused."""

from __future__ import annotations

import re

import pytest

from mistral_fetch.errors import ExitCode, PublishError
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.publish import build
from mistral_fetch.publish.build import publish
from mistral_fetch.publish.readback import parse_checksums, read_back


def edit(world, name, old, new):
    path = world.directory.parent / name
    data = path.read_bytes()
    assert re.search(old, data)
    path.write_bytes(re.sub(old, new, data, count=1))


def test_what_was_published_reads_back(world):
    found = read_back(world.directory.parent, "tiny")
    assert found.manifest.content_digest() == world.published.manifest.content_digest()
    assert (found.hybrid.info_hash_v2, found.plain.info_hash_v1) == (
        world.published.info_hash_v2,
        world.published.plain_info_hash,
    )


SPOILT = {
    "a digest in the checksums": lambda w: edit(w, "SHA256SUMS", rb"^[0-9a-f]{8}", b"00000000"),
    "a line of the checksums": lambda w: edit(w, "SHA256SUMS", rb"  ", b" "),
    "a file in the checksums": lambda w: edit(w, "SHA256SUMS", rb"[^\n]*\n$", b""),
    "a digest in the manifest": lambda w: edit(w, "tiny.meta4", rb'sha-256">[0-9a-f]{8}', b'sha-256">00000000'),
    "a piece in the manifest": lambda w: edit(w, "tiny.meta4", rb"  <hash>[0-9a-f]{8}", b"  <hash>00000000"),
    "a size in the manifest": lambda w: edit(w, "tiny.meta4", rb"<size>600", b"<size>601"),
    "the manifest's form": lambda w: edit(w, "tiny.meta4", rb"</metalink>", b""),
    "a piece of the hybrid": lambda w: edit(w, "tiny.torrent", rb"(?s)(6:pieces\d+:.{20}).{4}", rb"\1\0\0\0\0"),
    "a piece of the plain one": lambda w: edit(w, "tiny.v1.torrent", rb"(?s)(6:pieces\d+:).{4}", rb"\1\0\0\0\0"),
    "a v2 root": lambda w: edit(w, "tiny.torrent", rb"(?s)11:pieces root32:.{4}", rb"11:pieces root32:\0\0\0\0"),
    "the hybrid": lambda w: (w.directory.parent / "tiny.torrent").unlink(),
    "the kinds": lambda w: w.published.plain_torrent_path.write_bytes(w.published.torrent_path.read_bytes()),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_contradiction_is_found(world, spoil):
    spoil(world)
    with pytest.raises(PublishError) as caught:
        read_back(world.directory.parent, "tiny")
    assert caught.value.exit_code == ExitCode.USAGE


def test_what_strangers_could_not_read_is_not_left_lying_about(world, tmp_path):
    with pytest.raises(PublishError, match="cannot be used"):
        publish(world.directory, tmp_path / "out", info=ModelInfo(name="tiny", credit="two\nlines"))
    assert not (tmp_path / "out" / "tiny.meta4").exists()


def test_a_disk_that_wrote_something_else_is_noticed(world, tmp_path, monkeypatch):
    write = build.write_durably

    def write_wrongly(path, data):
        write(path, data.replace(b"  params.json", b"  params.jsom") if path.name == "SHA256SUMS" else data)

    monkeypatch.setattr(build, "write_durably", write_wrongly)
    with pytest.raises(PublishError, match="cannot be used"):
        publish(world.directory, tmp_path / "out")
    assert not (tmp_path / "out" / "tiny.meta4").exists()


def test_lines_of_sha256sum():
    assert parse_checksums(f"{'a' * 64}  x y\n{'b' * 64}  z/w\n") == {"x y": "a" * 64, "z/w": "b" * 64}
    with pytest.raises(ValueError, match="not a line"):
        parse_checksums("hello\n")
