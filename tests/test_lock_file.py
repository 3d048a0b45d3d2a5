"""The lock file: the same bytes for the same models, and no edit by hand goes unnoticed."""

from __future__ import annotations

import re

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import ConfigError, MalformedManifest
from mistral_fetch.lock_file import LockedFile, LockedModel, LockFile, parse_lock, serialise_lock
from mistral_fetch.provision import parse_provision
from mistral_fetch.strict_toml import find_line

ONE = Digest("sha256", "1" * 64)
TWO = Digest("gitsha1", "2" * 40)
FILES = (LockedFile("config.json", 7, TWO), LockedFile("weights/w.bin", 1 << 40, ONE))
HUB = LockedModel("hf:org/model", "c0ffee", "hub", "hub-c0ffee", Assurance.GITSHA1, FILES)
CATALOG = LockedModel("mistral-7b", "mistral-7b@v0.1", "hub", "hub-1", Assurance.SHA256, (LockedFile("w.bin", 3, ONE),))
TORRENT = LockedModel(
    "magnet:?xt=urn:btih:" + "a" * 40, "", "torrent", "btih-" + "a" * 40, Assurance.BTV1, (LockedFile("w", 1, None),)
)
LOCK = LockFile((CATALOG, HUB, TORRENT))
TEXT = serialise_lock(LOCK).decode()


def test_what_is_written_is_what_is_read() -> None:
    assert set(parse_lock(TEXT.encode(), "x").models) == set(LOCK.models)


def test_the_text_does_not_depend_on_the_order_of_the_models() -> None:
    assert serialise_lock(LockFile((TORRENT, HUB, CATALOG))) == TEXT.encode()


def test_names_in_the_cache_and_content_digests_follow_from_the_entries() -> None:
    assert [model.key for model in LOCK.models] == [
        "mistral-7b@v0.1",
        "hf:org/model@main",
        "magnet:btih:" + "a" * 40,
    ]
    assert CATALOG.content_digest is not None
    assert HUB.content_digest is None  # a git blob id is no sha256


def test_text_is_quoted_so_that_it_is_only_text() -> None:
    model = LockedModel('./a"\\[b.meta4', "0" * 16, "manifest", "manifest-1", Assurance.SHA256, CATALOG.files)
    (read,) = parse_lock(serialise_lock(LockFile((model,))), "x").models
    assert read == model


EDITS = {
    "a digest of another file": ('digest = "sha256:111', 'digest = "sha256:211', "manifest: expected sha256:"),
    "a digest that is none": (f'digest = "{ONE}"', 'digest = "sha256:zz"', "digest: expected a digest"),
    "a digest in capitals": (f'digest = "{TWO}"', f'digest = "{str(TWO).upper()}"', "digest: expected a digest"),
    "another size": ("size = 7", "size = 8", "manifest: expected sha256:"),
    "a size that cannot be": ("size = 7", "size = -7", "size: expected a whole number"),
    "a size as text": ("size = 7", 'size = "7"', "size: expected a whole number"),
    "an unknown key": ("size = 7", "size = 7\nsign = 1", "sign: expected only known keys"),
    "an unknown key on top": ("version = 1", "version = 1\nmirror = 'x'", "mirror: expected only known keys"),
    "a way out": ('"config.json"', '"../config.json"', "path: expected a plain relative path"),
    "an absolute path": ('"config.json"', '"/etc/passwd"', "path: expected a plain relative path"),
    "a path with a backslash": ('"config.json"', '"a\\\\b"', "path: expected a plain relative path"),
    "a name of the snapshot's own": ('"config.json"', '".complete"', "path: expected a plain relative path"),
    "a file twice": ('"config.json"', '"weights/w.bin"', "path: expected every entry once"),
    "files out of order": ('"config.json"', '"z.json"', "file: expected files sorted by path"),
    "two names that are one": ('"config.json"', '"WEIGHTS/W.bin"', "file: expected files that do not clash"),
    "another version": ("version = 1", "version = 2", "version: expected a whole number from 1 to 1"),
    "no version": ("version = 1\n", "", "the key 'version'"),
    "an unknown channel": ('channel = "torrent"', 'channel = "carrier"', "channel: expected one of"),
    "a reference to a directory": ('ref = "mistral-7b"', 'ref = "./models"', "ref: expected something that can be"),
    "no reference": ('ref = "mistral-7b"', 'ref = "one/two"', "ref: expected a reference"),
    "a revision out of the store": ('"mistral-7b@v0.1"', '"../../x@1"', "revision: expected a name@version"),
    "no revision": ('revision = "c0ffee"\n', "", "the key 'revision'"),
    "an identity with a line break": ('"hub-c0ffee"', '"hub-\\n"', "identity: expected the name"),
    "another model's content": ('content = "sha256:', 'content = "sha256:0', "content: expected a digest"),
    "a model twice": ('[[model]]\nref = "hf', TEXT.split("\n\n", 1)[1] + '\n[[model]]\nref = "hf', "every entry once"),
    "a level that is none": ('"btv1"', '"certain"', "assurance: expected one of"),
    "no TOML": ("[[model]]", "[[model]", "the file: expected TOML"),
    "a list of files too deep": ("version = 1", "version = " + "[" * 9000, "the file: expected TOML"),
    "a number too long": ("size = 7", "size = " + "7" * 9000, "the file: expected TOML"),
}


@pytest.mark.parametrize("reason", EDITS)
def test_an_edit_by_hand_is_refused_and_named(reason: str) -> None:
    old, new, expected = EDITS[reason]
    assert old in TEXT
    with pytest.raises(MalformedManifest) as refused:
        parse_lock(TEXT.replace(old, new, 1).encode(), "my.lock")
    assert expected in refused.value.detail
    assert "my.lock" in refused.value.what


def test_the_line_is_the_one_that_was_edited() -> None:
    text = TEXT.replace("size = 7", "size = -7")
    with pytest.raises(MalformedManifest) as refused:
        parse_lock(text.encode(), "my.lock")
    number = int(re.match(r"line (\d+),", refused.value.detail)[1])  # type: ignore[index]
    assert text.splitlines()[number - 1] == "size = -7"


def test_a_file_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(MalformedManifest, match="cannot be used") as refused:
        parse_lock(TEXT.encode() + b"#" * (17 << 20), "my.lock")
    assert "at most 16777216 bytes" in refused.value.detail


def test_lines_are_found_below_nested_headers() -> None:
    text = "[[a]]\nx = 1\n[[a.b]]\ny = 2\n[[a]]\n[[a.b]]\n[[a.b]]\ny = 3\n"
    assert find_line(text, ".a[1].b[1].y") == 8
    assert find_line(text, ".a[0].x") == 2
    assert find_line(text, ".a[1].b[0].y") == 6  # not there: its table
    assert find_line(text, ".c") is None


WRONG_WISHES = {
    "an unknown key": ('[[model]]\nref = "mistral-7b"\nfiles = []', "line 3, model[0].files: expected only known keys"),
    "a model twice": (
        '[[model]]\nref = "hf:a/b"\n[[model]]\nref = "hf:a/b@main"',
        "line 4, model[1].ref: expected every model once",
    ),
    "a level that is none": ('[policy]\nmin-assurance = "sure"\n[[model]]\nref = "x"', "line 2, policy.min-assurance"),
    "no models": ("[policy]\nprune = true", "the key 'model'"),
    "a word for a switch": ('[policy]\nprune = "yes"\n[[model]]\nref = "x"', "line 2, policy.prune: expected true"),
    "bits that do not exist": ('[[model]]\nref = "x"\nquantize = ["int3"]', "line 3, model[0].quantize[0]"),
}


@pytest.mark.parametrize("reason", WRONG_WISHES)
def test_a_wish_that_makes_no_sense_is_named(reason: str) -> None:
    text, expected = WRONG_WISHES[reason]
    with pytest.raises(ConfigError) as refused:
        parse_provision(text.encode(), "mistral-fetch.toml")
    assert expected in refused.value.detail
