"""Manifests: names that cannot escape, sizes and pieces that fit, one content digest for the same files."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import ExitCode, MalformedManifest, ManifestError, UnsafePath
from mistral_fetch.manifest import (
    MAX_DEPTH,
    MAX_FILE_SIZE,
    MAX_FILES,
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    FileEntry,
    Manifest,
    ModelInfo,
    PieceHashes,
    validate_path,
    validate_paths,
)

ZERO = "0" * 64
ONE = "1" * 64


def entry(path: str, size: int | None = 1, sha256: str | None = ZERO) -> FileEntry:
    return FileEntry(path, size, (Digest("sha256", sha256),) if sha256 else ())


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "consolidated.00.pth",
        "original/consolidated.00.pth",
        ".gitattributes",
        "a b/c d.txt",
        "naïve/模型.bin",
        "LICENSE",
        "dir/PROVENANCE.json",
        "...txt",
        "-rf",
        "~x",
        "$(id)",
        "a" * MAX_NAME_BYTES,
        "/".join("a" * MAX_DEPTH),
    ],
)
def test_plain_names_are_accepted(path: str) -> None:
    validate_path(path)
    assert Manifest((entry(path),)).entry(path).path == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        ".",
        "../x",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        "./a",
        "a/..",
        "a\\b",
        "..\\x",
        "C:x",
        "C:/x",
        "a:b",
        "a\x00b",
        "a\nb",
        "a\x1b[2Jb",
        "a\x7fb",
        "a\u202eb",
        "a\u200bb",
        "a\ufeffb",
        "a\u2028b",
        "a\udc80b",
        " a",
        "a ",
        "a/ b",
        "a /b",
        "a\u00a0",
        "a.",
        "a./b",
        "...",
        "a" * (MAX_NAME_BYTES + 1),
        "é" * 128,
        "/".join("a" * (MAX_DEPTH + 1)),
        "/".join(["a" * 200] * 6),
        ".complete",
        ".COMPLETE",
        "PROVENANCE.json",
        "provenance.JSON",
        "manifest.meta4",
        "manifest.meta4/x",
        ".complete/x",
    ],
)
def test_unsafe_names_are_refused(path: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        validate_path(path)
    assert caught.value.exit_code is ExitCode.BAD_MANIFEST
    assert all(line and line.isprintable() for line in caught.value.lines())
    with pytest.raises(UnsafePath):
        Manifest((entry(path),))


@pytest.mark.parametrize(
    "one,two",
    [
        ("a", "a"),
        ("a", "A"),
        ("config.json", "Config.JSON"),
        ("caf\u00e9", "cafe\u0301"),
        ("stra\u00dfe", "STRASSE"),
        ("a", "a/b"),
        ("A/b", "a"),
        ("a/b", "a/b/c"),
        ("x/caf\u00e9", "x/CAFE\u0301/y"),
    ],
)
def test_names_that_clash_on_some_file_system_are_refused_in_either_order(one: str, two: str) -> None:
    for pair in ([one, two], [two, one]):
        with pytest.raises(UnsafePath, match="refused the file name"):
            validate_paths(pair)


def test_names_that_only_look_alike_do_not_clash() -> None:
    validate_paths(["a", "b", "ab", "a.b", "c/a", "c/b", "d/a"])
    validate_paths(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])


@given(st.text(min_size=1, max_size=40))
def test_an_accepted_name_stays_below_the_directory_it_is_joined_to(path: str) -> None:
    try:
        validate_path(path)
    except UnsafePath:
        return
    joined = PurePosixPath("/cache/model") / path
    assert joined.parts[:3] == ("/", "cache", "model")
    assert ".." not in joined.parts
    assert str(joined) == f"/cache/model/{path}"
    assert path.encode()
    assert not any(unicodedata.category(character).startswith("Cc") for character in path)


@given(st.lists(st.text(alphabet="aAbé/.\\ \n", max_size=6), max_size=5))
def test_any_list_of_names_is_accepted_or_refused_with_a_manifest_error(paths: list[str]) -> None:
    try:
        validate_paths(paths)
    except ManifestError as error:
        lines = error.lines()
        assert all(line.isprintable() for line in lines)
    else:
        assert len({path.casefold() for path in paths}) == len(paths) >= 1


@pytest.mark.parametrize("count", [0, MAX_FILES + 1])
def test_no_files_or_too_many_are_refused(count: int) -> None:
    with pytest.raises(MalformedManifest, match="list of files"):
        Manifest(tuple(entry(f"f{index}") for index in range(count)))


@pytest.mark.parametrize("size", [-1, MAX_FILE_SIZE + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(MalformedManifest, match="impossible size"):
        Manifest((entry("a", size),))
    Manifest((entry("a", MAX_FILE_SIZE),))


@pytest.mark.parametrize(
    "size,length,count",
    [(10, 4, 2), (10, 4, 4), (0, 4, 1), (None, 4, 0), (None, 4, 1), (10, 0, 0), (10, -4, 1), (8, 4, 3)],
)
def test_pieces_that_do_not_fit_the_size_are_refused(size: int | None, length: int, count: int) -> None:
    with pytest.raises(MalformedManifest, match="do not fit its size"):
        Manifest((FileEntry("a", size, pieces=PieceHashes(length, (ZERO,) * count)),))


@pytest.mark.parametrize("size,length,count", [(10, 4, 3), (8, 4, 2), (0, 4, 0), (1, 4 << 20, 1)])
def test_pieces_that_fit_are_kept(size: int, length: int, count: int) -> None:
    pieces = PieceHashes(length, (ZERO,) * count)
    assert Manifest((FileEntry("a", size, pieces=pieces),)).entry("a").pieces == pieces


@pytest.mark.parametrize("value", ["", "0" * 63, "A" * 64, "g" * 64, "0" * 64 + "\n"])
def test_a_piece_digest_that_could_match_nothing_is_refused(value: str) -> None:
    with pytest.raises(MalformedManifest, match="a piece of a has a digest that is none"):
        Manifest((FileEntry("a", 5, pieces=PieceHashes(4, (ZERO, value))),))


def test_two_digests_of_one_kind_are_refused() -> None:
    with pytest.raises(MalformedManifest, match="two digests of one kind") as caught:
        Manifest((FileEntry("a", 1, (Digest("sha256", ZERO), Digest("sha256", ONE))),))
    assert f"sha256:{ONE}" in caught.value.detail
    Manifest((FileEntry("a", 1, (Digest("sha256", ZERO), Digest("md5", "0" * 32))),))


def test_a_file_knows_its_strongest_digest() -> None:
    md5, git, strong = Digest("md5", "0" * 32), Digest("gitsha1", "0" * 40), Digest("sha256", ZERO)
    assert FileEntry("a", 1).assurance is Assurance.SIZE
    assert FileEntry("a", 1, (Digest("sha1", "0" * 40),)).assurance is Assurance.SIZE
    assert FileEntry("a", 1, (md5,)).assurance is Assurance.MD5
    assert FileEntry("a", 1, (git, md5)).assurance is Assurance.GITSHA1
    entry = FileEntry("a", 1, (md5, strong, git))
    assert entry.assurance is Assurance.SHA256
    assert entry.sha256 == ZERO
    assert entry.digest("gitsha1") == git
    assert entry.digest("sha1") is None
    assert FileEntry("a", 1, (md5,)).sha256 is None


# The format of the listing is fixed: a second implementation gets the same digest from sha256sum's own lines.
def test_content_digest_is_the_sha256_of_a_documented_listing() -> None:
    manifest = Manifest((entry("b/c", 20, ONE), entry("a", 3, ZERO)))
    listing = f"{ZERO}  3  a\n{ONE}  20  b/c\n"
    assert manifest.content_digest() == Digest("sha256", hashlib.sha256(listing.encode()).hexdigest())


@given(st.permutations(range(6)), st.integers())
def test_order_mirrors_and_info_do_not_change_what_a_manifest_is(order: list[int], seed: int) -> None:
    files = [entry(name, size, f"{size:064x}") for size, name in enumerate(["a", "B", "c/d", "c/e", "f.g", "é"])]
    manifest = Manifest(tuple(files))
    shuffled = Manifest(tuple(files[index] for index in order))
    assert shuffled == manifest
    info = ModelInfo(name=str(random.Random(seed).random()))
    assert Manifest(shuffled.files, info).content_digest() == manifest.content_digest()
    assert [file.path for file in shuffled.files] == sorted(file.path for file in files)


@pytest.mark.parametrize(
    "changed",
    [entry("a", 2, ZERO), entry("a", 1, ONE), entry("A", 1, ZERO)],
    ids=["size", "sha256", "path"],
)
def test_content_digest_changes_with_any_part_of_a_file(changed: FileEntry) -> None:
    assert Manifest((changed,)).content_digest() != Manifest((entry("a"),)).content_digest()


@pytest.mark.parametrize(
    "open_entry", [entry("a", None), entry("a", 1, None), FileEntry("a", 1, (Digest("md5", "0" * 32),))]
)
def test_a_manifest_with_open_ends_has_no_content_digest(open_entry: FileEntry) -> None:
    manifest = Manifest((open_entry, entry("b")))
    assert not manifest.is_fully_pinned
    with pytest.raises(MalformedManifest, match="a has no sha256 or size yet"):
        manifest.content_digest()


def test_size_counts_what_is_known() -> None:
    assert Manifest((entry("a", 3), entry("b", None), entry("c", 4))).size == 7


def test_with_files_keeps_the_info_and_validates_again() -> None:
    info = ModelInfo(name="m", licence="Apache-2.0")
    manifest = Manifest((entry("a"),), info)
    assert manifest.with_files([entry("z"), entry("b")]).info == info
    assert [file.path for file in manifest.with_files([entry("z"), entry("b")]).files] == ["b", "z"]
    with pytest.raises(UnsafePath):
        manifest.with_files([entry("../a")])


def test_a_missing_entry_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        Manifest((entry("a"),)).entry("nothing")


def test_longest_path_allowed_is_measured_in_bytes() -> None:
    part = "é" * 127  # 254 bytes
    validate_path("/".join([part] * 4))  # 1019 bytes
    with pytest.raises(UnsafePath):
        validate_path("/".join([part] * 4) + "/123456")
    assert MAX_PATH_BYTES == 1024
