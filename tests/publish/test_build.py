"""Publishing: exact, reproducible, readable by others, and refused where it cannot be right."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess

import pytest

from mistral_fetch.bittorrent.bencode import decode
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.errors import ExitCode, PublishError
from mistral_fetch.events import BytesVerified
from mistral_fetch.manifest import ModelInfo, TorrentLink
from mistral_fetch.metalink import parse_metalink
from mistral_fetch.publish import hashing
from mistral_fetch.publish.build import plan_publication, publish
from mistral_fetch.publish.hashing import torrent_piece_length

MIB = 1024 * 1024
FILES = {
    "consolidated.00.pth": 9 * MIB + 12345,
    "params.json": 600,
    "tokenizer.model": 493_443,
    "nested/deep/x": 3,
    "empty": 0,
}


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "mistral-tiny"
    for path, size in FILES.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(hashlib.shake_128(path.encode()).digest(size))
    return directory


def test_manifest_says_what_the_files_are(model, tmp_path):
    info = ModelInfo(name="Tiny", licence="Apache-2.0")
    published = publish(model, tmp_path / "out", mirrors=["https://m.example/x"], info=info)
    manifest = parse_metalink(published.manifest_path.read_bytes())
    assert manifest == published.manifest
    assert {entry.path: entry.size for entry in manifest.files} == FILES
    assert (manifest.info.name, manifest.info.licence) == ("Tiny", "Apache-2.0")
    for entry in manifest.files:
        data = (model / entry.path).read_bytes()
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert entry.digest("md5").value == hashlib.md5(data).hexdigest()
        pieces = tuple(hashlib.sha256(data[at : at + 4 * MIB]).hexdigest() for at in range(0, len(data), 4 * MIB))
        assert (entry.pieces.sha256 if entry.pieces else ()) == pieces


def test_torrents_name_the_same_files(model, tmp_path):
    published = publish(model, tmp_path / "out")
    hybrid = parse_metainfo(published.torrent_path.read_bytes())
    plain = parse_metainfo(published.plain_torrent_path.read_bytes())
    assert {file.path: file.size for file in hybrid.files} == {file.path: file.size for file in plain.files} == FILES
    assert (hybrid.name, plain.name) == ("mistral-tiny", "mistral-tiny")
    assert (hybrid.info_hash_v1, hybrid.info_hash_v2) == (published.info_hash_v1, published.info_hash_v2)
    assert (plain.info_hash_v1, plain.info_hash_v2) == (published.plain_info_hash, None)
    assert hybrid.piece_length == plain.piece_length == published.piece_length
    assert not {b"creation date", b"comment"} & decode(hybrid.data).keys()


def test_manifest_leads_to_files_and_torrent_from_its_own_address(model, tmp_path):
    published = publish(model, tmp_path / "out")
    manifest = parse_metalink(published.manifest_path.read_bytes(), "https://m.example/models/mistral-tiny.meta4")
    entry = manifest.entry("nested/deep/x")
    assert [mirror.url for mirror in entry.mirrors] == ["https://m.example/models/mistral-tiny/nested/deep/x"]
    assert entry.torrents == (
        TorrentLink("https://m.example/models/mistral-tiny.v1.torrent", "mistral-tiny/nested/deep/x"),
        TorrentLink("https://m.example/models/mistral-tiny.torrent", "mistral-tiny/nested/deep/x", needs_v2=True),
    )


def test_other_metalink_readers_see_only_the_plain_torrent(model, tmp_path):
    text = publish(model, tmp_path / "out").manifest_path.read_text()
    links = re.findall(r"<metaurl[^>]*>([^<]*)</metaurl>", text)
    assert set(links) == {"mistral-tiny.v1.torrent"}


def test_mirrors_become_addresses_and_web_seeds(model, tmp_path):
    mirrors = ["https://a.example/models/mistral-tiny/", "https://b.example/other"]
    published = publish(model, tmp_path / "out", mirrors=mirrors, trackers=["udp://t.example:1/announce"])
    entry = parse_metalink(published.manifest_path.read_bytes()).entry("params.json")
    assert [(mirror.url, mirror.priority) for mirror in entry.mirrors] == [
        ("https://a.example/models/mistral-tiny/params.json", 1),
        ("https://b.example/other/params.json", 2),
    ]
    assert entry.torrents[0].url == "https://a.example/models/mistral-tiny.v1.torrent"
    for path in (published.torrent_path, published.plain_torrent_path):
        metainfo = parse_metainfo(path.read_bytes())
        assert metainfo.web_seeds == ("https://a.example/models/",)
        assert metainfo.trackers == ("udp://t.example:1/announce",)


def test_checksums_are_what_sha256sum_checks(model, tmp_path):
    published = publish(model, tmp_path / "out")
    lines = published.checksums_path.read_text().splitlines()
    assert [re.fullmatch(r"[0-9a-f]{64}  (.+)", line)[1] for line in lines] == sorted(FILES)
    command = ["sha256sum", "--check", "--strict", str(published.checksums_path)]
    if shutil.which("sha256sum"):
        assert subprocess.run(command, cwd=model, capture_output=True, check=False).returncode == 0
        (model / "params.json").write_bytes(b"changed")
        assert subprocess.run(command, cwd=model, capture_output=True, check=False).returncode == 1


def test_the_same_files_give_the_same_bytes(model, tmp_path):
    first = publish(model, tmp_path / "first")
    copy = tmp_path / "elsewhere" / "mistral-tiny"
    shutil.copytree(model, copy)
    os.utime(copy / "params.json", (1, 1))
    second = publish(copy, tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["SHA256SUMS", "mistral-tiny.meta4", "mistral-tiny.torrent", "mistral-tiny.v1.torrent"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert first.manifest == second.manifest


def test_each_byte_is_read_once(model, tmp_path, monkeypatch):
    read = []
    fully = hashing._read_fully

    def counted(readinto, window):
        read.append(len(window))
        return fully(readinto, window)

    monkeypatch.setattr(hashing, "_read_fully", counted)
    publish(model, tmp_path / "out")
    assert sum(read) == sum(FILES.values())
    assert max(read) <= hashing.WINDOW_LENGTH


def test_progress_is_told_to_the_last_byte(model, tmp_path):
    events = []
    publish(model, tmp_path / "out", report=events.append)
    last = {event.path: event.verified_bytes for event in events if isinstance(event, BytesVerified)}
    assert last == {path: size for path, size in FILES.items() if size}


@pytest.mark.parametrize(
    ("total", "length"),
    [(1, 32768), (4 * MIB, 32768), (100 * MIB, 64 * 1024), (1024 * MIB, 1 * MIB), (14 * 10**9, 4 * MIB)],
)
def test_small_models_get_small_torrent_pieces(total, length):
    assert torrent_piece_length(total) == length


def outputs(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []


def hostile_directories():
    def escaping_link(model):
        (model / "secret").symlink_to("/etc/passwd")

    def link_to_folder(model):
        (model / "again").symlink_to(model / "nested")

    def dangling_link(model):
        (model / "gone").symlink_to(model / "nowhere")

    def endless_link(model):
        (model / "loop").symlink_to(model / "loop")

    def pipe(model):
        os.mkfifo(model / "pipe")

    def unix_socket(model):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(model / "socket"))

    def newline(model):
        (model / "a\nb").write_bytes(b"x")

    def backslash(model):
        (model / "a\\b").write_bytes(b"x")

    def bytes_that_are_not_text(model):
        (model / os.fsdecode(b"\xff\xfe")).write_bytes(b"x")

    def clash(model):
        (model / "PARAMS.json").write_bytes(b"x")

    def reserved(model):
        (model / "PROVENANCE.json").write_bytes(b"x")

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("spoil", hostile_directories(), ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_published_is_refused(model, tmp_path, spoil):
    spoil(model)
    with pytest.raises(PublishError) as caught:
        publish(model, tmp_path / "out")
    assert caught.value.exit_code == ExitCode.USAGE
    assert outputs(tmp_path) == []


def test_link_inside_the_directory_is_published_as_a_file(model):
    (model / "alias").symlink_to(model / "params.json")
    assert {file.path: file.size for file in plan_publication(model)}["alias"] == FILES["params.json"]


@pytest.mark.parametrize("path", ["nowhere", "mistral-tiny/params.json", "bare"])
def test_only_directories_with_files_are_published(model, tmp_path, path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(PublishError):
        publish(tmp_path / path, tmp_path / "out")


def test_empty_files_alone_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "empty").touch()
    with pytest.raises(PublishError, match="empty"):
        publish(tmp_path / "model", tmp_path / "out")


def test_outputs_are_not_written_into_the_model(model):
    with pytest.raises(PublishError, match="outputs"):
        publish(model, model / "out")


@pytest.mark.parametrize("name", ["..", "a/b", "a\nb", "a:b", "x" * 300])
def test_hostile_name_is_refused(model, tmp_path, name):
    with pytest.raises(PublishError):
        publish(model, tmp_path / "out", name=name)


@pytest.mark.parametrize("change", ["grown", "shrunk", "touched", "replaced"])
def test_file_that_changes_while_it_is_read_is_refused(model, tmp_path, change):
    target = model / "consolidated.00.pth"

    def grow():
        with target.open("ab") as stream:
            stream.write(b"x")

    def replace():
        shutil.copy2(target, model / "new")
        (model / "new").replace(target)

    changes = {
        "grown": grow,
        "shrunk": lambda: os.truncate(target, 10),
        "touched": lambda: os.utime(target, ns=(1, 1)),
        "replaced": replace,
    }
    fully = hashing._read_fully

    def change_before_the_read(readinto, window):
        if len(window) == FILES[target.name]:
            changes[change]()
        return fully(readinto, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "_read_fully", change_before_the_read)
        with pytest.raises(PublishError, match="changed"):
            publish(model, tmp_path / "out")
    assert outputs(tmp_path) == []
