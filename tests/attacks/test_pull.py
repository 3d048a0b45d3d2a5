"""Hostile input through the command line: each a plain three-line error with its exit code, nothing published,
and nothing left behind that the next pull of the same address trips over.

The runtime's tests hold the hostile weights (pickles, safetensors headers).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mistral_fetch.bittorrent.bencode import encode
from mistral_fetch.cli.app import app
from mistral_fetch.metalink import METALINK_NAMESPACE, serialise_metalink
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.retry import Backoff
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import list_refs

MODEL = PublisherSimulator({"weights.bin": random.Random(21).randbytes(300_000), "config.json": b"{}"})
TRUTH = serialise_metalink(MODEL.manifest())
SHA256 = "a" * 64


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "delay_after", lambda *_: None)
    for name, value in {"CONNECT_TIMEOUT": "1", "READ_TIMEOUT": "1", "PEER_TIMEOUT": "0.5"}.items():
        monkeypatch.setenv(f"MISTRAL_FETCH_{name}", value)


@dataclass
class CommandLine:
    """The program in this process, and the questions asked after each attack."""

    home: Path

    def pull(self, *arguments: str) -> tuple[int, str, str]:
        """Run ``pull`` and return its exit code, standard output and standard error."""
        result = CliRunner().invoke(app, ["pull", "--quiet", *arguments])
        return result.exit_code, result.stdout, result.stderr

    def assert_refused(self, ref: str, exit_code: int, kind: str, *needles: str) -> None:
        """Check the three lines, the exit code, the stable name, and that nothing has come into being."""
        code, out, err = self.pull(ref)
        assert (code, out) == (exit_code, ""), err
        lines = err.splitlines()
        assert len(lines) == 3, err
        assert lines[0].startswith("error: ")
        assert all(line.startswith("  ") and line.strip() for line in lines[1:])
        assert all(len(line) < 1500 and line.isprintable() for line in lines)
        assert not [needle for needle in needles if needle not in err], err
        _, as_json, _ = self.pull("--json", ref)
        error = json.loads(as_json)["error"]
        assert (error["kind"], error["exit_code"]) == (kind, exit_code)
        self.assert_nothing_published()

    def assert_nothing_published(self) -> None:
        """Check that no name leads to anything, and that what is a blob is right."""
        assert list_refs(Layout(self.home)) == []
        assert list(self.home.glob("snapshots/*")) == []
        for blob in self.home.glob("blobs/sha256/*/*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        outside = [path.name for path in self.home.parent.iterdir() if path.name not in {self.home.name, "given"}]
        assert outside == []

    def assert_pulls(self, ref: str) -> None:
        """Check that an honest answer at the same place is pulled exactly, and leaves nothing unfinished."""
        code, out, err = self.pull(ref)
        assert code == 0, err
        directory = Path(out.strip())
        assert {path: (directory / path).read_bytes() for path in MODEL.files} == MODEL.files
        assert list(self.home.glob("partial/*")) == []


@pytest.fixture
def program(own_home: Path) -> CommandLine:
    return CommandLine(own_home)


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MODEL.serve() as running:
        yield running


def metalink(inner: str, head: str = "") -> bytes:
    return f'{head}<metalink xmlns="{METALINK_NAMESPACE}">{inner}</metalink>'.encode()


def named(*names: str) -> bytes:
    return metalink("".join(f'<file name="{name}"><size>1</size></file>' for name in names))


ENTITIES = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10 if n else 'x' * 10}'>" for n in range(10))

MANIFESTS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed-manifest"),
    "a web page": (b"<!doctype html><html><p>Please log in</p></html>", "malformed-manifest"),
    "bytes": (random.Random(1).randbytes(1000), "malformed-manifest"),
    "cut short": (TRUTH[:-20], "malformed-manifest"),
    "an entity bomb": (
        metalink("<file name='f'><size>&e9;</size></file>", f"<!DOCTYPE m [{ENTITIES}]>"),
        "malformed-manifest",
    ),
    "a file read by an entity": (
        metalink("<file name='&x;'/>", "<!DOCTYPE m [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"),
        "malformed-manifest",
    ),
    "a million open elements": (metalink("<a>" * 1_000_000), "malformed-manifest"),
    "a hundred thousand files": (
        metalink("".join(f"<file name='{n}'/>" for n in range(100_000))),
        "malformed-manifest",
    ),
    "a size of 5000 digits": (metalink(f"<file name='f'><size>{'9' * 5000}</size></file>"), "malformed-manifest"),
    "a file of 2 EB": (metalink(f"<file name='f'><size>{1 << 61}</size></file>"), "malformed-manifest"),
    "pieces that do not fit": (
        metalink(
            f"<file name='f'><size>9</size><pieces length='1' type='sha-256'><hash>{SHA256}</hash></pieces></file>"
        ),
        "malformed-manifest",
    ),
    "dot dot": (named("../../.bashrc"), "unsafe-path"),
    "dot dot inside": (named("a/../../b"), "unsafe-path"),
    "absolute": (named("/etc/cron.d/x"), "unsafe-path"),
    "a drive": (named("C:\\x"), "unsafe-path"),
    "the same name twice": (named("a", "b", "a"), "unsafe-path"),
    "the same but for case": (named("Model.bin", "model.BIN"), "unsafe-path"),
    "a file and a folder": (named("a", "a/b"), "unsafe-path"),
    "terminal escapes": (named("a&#27;[2Jb"), "malformed-manifest"),
    "text that runs backwards": (named("a&#x202e;gpj.exe"), "unsafe-path"),
    "our own file": (named("PROVENANCE.json"), "unsafe-path"),
    "our own mark": (named(".complete"), "unsafe-path"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(program: CommandLine, mirror: MirrorSimulator, name: str) -> None:
    data, kind = MANIFESTS[name]
    mirror.files["model.meta4"] = data  # type: ignore[index]
    program.assert_refused(mirror.url("model.meta4"), 20, kind)
    mirror.files["model.meta4"] = TRUTH  # type: ignore[index]
    program.assert_pulls(mirror.url("model.meta4"))


def test_a_manifest_from_the_web_cannot_read_local_files(program: CommandLine, mirror: MirrorSimulator) -> None:
    size = Path("/etc/passwd").stat().st_size
    inner = (
        f"<file name='f'><size>{size}</size><hash type='sha-256'>{SHA256}</hash><url>file:///etc/passwd</url></file>"
    )
    mirror.files["model.meta4"] = metalink(inner)  # type: ignore[index]
    program.assert_refused(mirror.url("model.meta4"), 2, "usage-error")


def test_a_manifest_that_never_ends_is_cut_off(
    program: CommandLine, mirror: MirrorSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_fetch.transfer.resolve.MAX_METALINK_BYTES", 100_000)
    mirror.always("model.meta4", Fault(size=20_000_000, no_length=True))
    program.assert_refused(mirror.url("model.meta4"), 6, "not-a-model-file", "too large")
    assert mirror.bytes_sent("model.meta4") < 39_000_000
    mirror.always("model.meta4", Fault())
    program.assert_pulls(mirror.url("model.meta4"))


MIRRORS: Mapping[str, tuple[Fault, int, str]] = {
    "a flipped byte": (Fault(wrong_bytes_at=(150_000,)), 32, "piece-mismatch"),
    "a short file": (Fault(size=299_999), 32, "size-mismatch"),
    "a longer file": (Fault(size=300_001), 32, "size-mismatch"),
    "a longer file that does not say so": (Fault(size=300_001, no_length=True), 32, "size-mismatch"),
    "an endless file": (Fault(size=30_000_000, no_length=True), 32, "size-mismatch"),
    "a web page with 200": (Fault(body=b"<html>", headers={"Content-Type": "text/html"}), 6, "not-a-model-file"),
    "a refusal": (Fault(status=403), 4, "not-authorised"),
    "a login": (Fault(status=401), 4, "not-authorised"),
    "not found": (Fault(status=404), 6, "mirror-status"),
    "overload": (Fault(status=503), 6, "mirror-status"),
    "silence": (Fault(hang_at=0), 5, "mirror-timeout"),
    "a broken line": (Fault(reset_at=5), 6, "mirror-unreachable"),
    "a redirect to a file": (Fault(redirect_to="file:///etc/passwd"), 6, "mirror-unreachable"),
    "a gzip bomb": (Fault(is_gzipped=True), 6, "not-a-model-file"),
}


@pytest.mark.parametrize("name", MIRRORS)
def test_a_hostile_mirror_is_refused(program: CommandLine, mirror: MirrorSimulator, name: str) -> None:
    fault, exit_code, kind = MIRRORS[name]
    mirror.always("model/weights.bin", fault)
    program.assert_refused(mirror.url("model.meta4"), exit_code, kind, "127.0.0.1")
    mirror.always("model/weights.bin", Fault())
    program.assert_pulls(mirror.url("model.meta4"))


def test_a_redirect_in_circles_ends(program: CommandLine, mirror: MirrorSimulator) -> None:
    mirror.always("model/weights.bin", Fault(redirect_to=mirror.url("model/weights.bin")))
    program.assert_refused(mirror.url("model.meta4"), 6, "mirror-unreachable", "circles")


def info(**changes: object) -> dict[bytes, object]:
    fields: dict[bytes, object] = {
        b"name": b"model",
        b"piece length": 16384,
        b"files": [{b"length": 5, b"path": [b"f"]}],
        b"pieces": b"0" * 20,
    }
    return {**fields, **{name.replace("_", " ").encode(): value for name, value in changes.items()}}


def torrent(**changes: object) -> bytes:
    return encode({b"info": info(**changes)})  # type: ignore[dict-item]


def path_in_torrent(*parts: bytes) -> bytes:
    return torrent(files=[{b"length": 5, b"path": list(parts)}])


TORRENTS: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "unsafe-torrent"),
    "a web page": (b"<html></html>", "unsafe-torrent"),
    "cut short": (torrent()[:-3], "unsafe-torrent"),
    "deep nesting": (b"d4:info" + b"l" * 200_000, "unsafe-torrent"),
    "a string of 9 exabytes": (b"d4:info9223372036854775807:x", "unsafe-torrent"),
    "a number of a million digits": (b"d4:infoi" + b"9" * 1_000_000 + b"ee", "unsafe-torrent"),
    "dot dot": (path_in_torrent(b"..", b"..", b".bashrc"), "unsafe-path"),
    "a slash in a name": (path_in_torrent(b"a/../../b"), "unsafe-path"),
    "absolute": (path_in_torrent(b"/etc/passwd"), "unsafe-path"),
    "an empty part": (path_in_torrent(b"a", b"", b"b"), "unsafe-path"),
    "a backslash": (path_in_torrent(b"a\\..\\b"), "unsafe-path"),
    "a null byte": (path_in_torrent(b"a\0b"), "unsafe-path"),
    "no UTF-8": (path_in_torrent(b"\xff\xfe"), "unsafe-torrent"),
    "the same name twice": (
        torrent(files=[{b"length": 2, b"path": [b"f"]}, {b"length": 3, b"path": [b"F"]}]),
        "unsafe-path",
    ),
    "a symbolic link": (
        torrent(files=[{b"length": 5, b"path": [b"f"], b"attr": b"l", b"symlink path": [b"..", b"x"]}]),
        "unsafe-torrent",
    ),
    "ten million pieces": (
        torrent(files=[{b"length": 16384 * 10_000_000, b"path": [b"f"]}], pieces=b"0" * 20),
        "unsafe-torrent",
    ),
    "a negative size": (torrent(files=[{b"length": -1, b"path": [b"f"]}]), "unsafe-torrent"),
    "pieces of no length": (torrent(piece_length=0), "unsafe-torrent"),
    "pieces that do not fit": (torrent(pieces=b"0" * 40), "unsafe-torrent"),
    "a dictionary for a size": (torrent(files=[{b"length": {}, b"path": [b"f"]}]), "unsafe-torrent"),
}


@pytest.mark.parametrize("name", TORRENTS)
def test_a_hostile_torrent_is_refused(program: CommandLine, tmp_path: Path, name: str) -> None:
    data, kind = TORRENTS[name]
    given = tmp_path / "given"
    given.mkdir()
    (given / "model.torrent").write_bytes(data)
    program.assert_refused(str(given / "model.torrent"), 20, kind)
    assert list(program.home.glob("partial/*")) == []


@pytest.mark.parametrize(
    "magnet, exit_code",
    [
        ("magnet:", 2),
        ("magnet:?", 2),
        ("magnet:?xt=urn:btih:", 2),
        ("magnet:?xt=urn:btih:zz", 2),
        ("magnet:?xt=urn:btih:" + "g" * 40, 2),
        ("magnet:?xt=urn:sha1:" + "0" * 40, 2),
        ("magnet:?xt=urn:btmh:1220zz", 2),
        ("magnet:?dn=only-a-name", 2),
        ("magnet:?xt=urn:btih:" + "1" * 40, 6),
        ("magnet:?xt=urn:btih:" + "1" * 40 + "&tr=" + "x" * 5000 + "&x.pe=[::1]:9&ws=file:///etc/passwd", 6),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_magnet_link_that_is_nonsense_or_dead_is_refused(program: CommandLine, magnet: str, exit_code: int) -> None:
    code, out, err = program.pull(magnet)
    assert code in {exit_code, 20 if exit_code == 2 else exit_code}, err
    assert out == ""
    assert len(err.splitlines()) == 3
    program.assert_nothing_published()


LISTINGS: Mapping[str, Callable[[dict[str, object]], object]] = {
    "not json": lambda _: "<html>",
    "a list": lambda _: [],
    "no commit": lambda document: {**document, "sha": "main"},
    "files that are none": lambda document: {**document, "siblings": {"a": 1}},
    "a path for a number": lambda document: {**document, "siblings": [{"rfilename": 5}]},
    "a negative size": lambda document: {**document, "siblings": [{"rfilename": "model.safetensors", "size": -5}]},
    "dot dot": lambda document: {
        **document,
        "siblings": [
            {"rfilename": "../model.safetensors", "size": 5, "lfs": {"sha256": SHA256, "size": 5}},
            {"rfilename": "config.json", "size": 5, "blobId": "0" * 40},
        ],
    },
    "two sizes": lambda document: {
        **document,
        "siblings": [{"rfilename": "model.safetensors", "size": 5, "lfs": {"sha256": SHA256, "size": 6}}],
    },
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_hostile_hub_listing_is_refused(program: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files = {"model.safetensors": b"w" * 5000, "config.json": b"{}"}
    with HubSimulator({"org/model": HubRepository(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.base_url)
        document = {"sha": "0" * 40, "siblings": []}
        body = LISTINGS[name](document)
        hub.listing_override = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        code, out, err = program.pull("hf:org/model")
        assert (code, out) == (20, ""), err
        assert len(err.splitlines()) == 3
        program.assert_nothing_published()
        hub.listing_override = None
        code, out, err = program.pull("hf:org/model")
        assert code == 0, err


def test_a_torrent_whose_files_differ_from_the_manifest_is_refused(program: CommandLine, tmp_path: Path) -> None:
    given = tmp_path / "given"
    other = PublisherSimulator({**MODEL.files, "config.json": b"{ }"}).publish(given)
    entries = [
        replace(entry, mirrors=(), torrents=(replace(link, url=other.torrent_path.as_uri()),))
        for entry, link in zip(MODEL.manifest().files, (e.torrents[0] for e in other.manifest.files), strict=True)
    ]
    other.manifest_path.write_bytes(serialise_metalink(MODEL.manifest().with_files(entries)))
    program.assert_refused(str(other.manifest_path), 32, "torrent-mismatch", "config.json")


@pytest.mark.parametrize(
    "ref, exit_code, needle",
    [
        ("mistral-7", 3, "mistral-7b"),
        ("mistral-7b@v9", 3, "v0.1"),
        ("/no/such/model.meta4", 3, "No such file"),
        ("hf:../..", 2, ""),
        ("hf:org", 2, ""),
        ("http://[::1/model.meta4", 2, ""),
        ("", 2, ""),
        ("\x1b[2J", 2, ""),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(program: CommandLine, ref: str, exit_code: int, needle: str) -> None:
    code, out, err = program.pull(ref)
    assert code in {exit_code, 3 if exit_code == 2 else exit_code, 6 if "http" in ref else exit_code}, err
    assert out == ""
    assert needle in err
    assert len(err.splitlines()) == 3, err
    assert "\x1b" not in err
    program.assert_nothing_published()


def test_a_catalog_that_is_hostile_is_refused(
    program: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for data in (b"", b"{", b"[" * 100_000, b"\xff", b'{"schema": 2}', b'{"schema": 1e999}'):
        (given / "catalog.json").write_bytes(data)
        monkeypatch.setenv("MISTRAL_FETCH_CATALOG", str(given / "catalog.json"))
        program.assert_refused("mistral-7b", 20, "malformed-manifest")


def test_a_full_disk_in_the_middle_is_explained_and_the_next_pull_succeeds(
    program: CommandLine, mirror: MirrorSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr("os.pwrite", refuse(28, "No space left on device"))
        program.assert_refused(mirror.url("model.meta4"), 9, "out-of-space", "--home")
    program.assert_pulls(mirror.url("model.meta4"))


def test_a_read_only_cache_is_explained(
    program: CommandLine, mirror: MirrorSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as read_only:
        read_only.setattr("os.mkdir", refuse(30, "Read-only file system"))
        program.assert_refused(mirror.url("model.meta4"), 9, "store-not-writable", "--home")
    program.assert_pulls(mirror.url("model.meta4"))


def refuse(number: int, text: str) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, text)

    return fail
