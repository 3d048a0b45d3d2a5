"""What users type, sorted by form; and what is refused, with a hint that says what to type."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.errors import AmbiguousRef, ExitCode, UsageError
from mistral_fetch.ref import (
    MAX_REF_LENGTH,
    CatalogRef,
    DirectoryRef,
    HubRef,
    MagnetRef,
    ManifestRef,
    Ref,
    TorrentRef,
    normalize_version,
    parse_ref,
)

HASH = "208b101a0f51514ecf285885a8b0f6fb1a1e4d7d"
HASH_32 = base64.b32encode(bytes.fromhex(HASH)).decode()
HASH_V2 = "ab" * 32


@pytest.mark.parametrize(
    "text,ref",
    [
        ("mistral-7b", CatalogRef("mistral-7b")),
        ("  mistral-7b\n", CatalogRef("mistral-7b")),
        ("Mistral-7B", CatalogRef("mistral-7b")),
        ("mistral-7b@v0.1", CatalogRef("mistral-7b", "v0.1")),
        ("mistral-7b@0.1", CatalogRef("mistral-7b", "v0.1")),
        ("Mistral-7B@V0.1", CatalogRef("mistral-7b", "v0.1")),
        ("demo", CatalogRef("demo")),
        ("hf:mistralai/Mistral-7B-v0.1", HubRef("mistralai/Mistral-7B-v0.1", "main")),
        ("HF:mistralai/Mistral-7B-v0.1", HubRef("mistralai/Mistral-7B-v0.1", "main")),
        ("hf:a/b@27d67f1b", HubRef("a/b", "27d67f1b")),
        ("hf:a/b@refs/pr/1", HubRef("a/b", "refs/pr/1")),
        ("model.meta4", ManifestRef("model.meta4")),
        ("dir/my model.META4", ManifestRef("dir/my model.META4")),
        ("https://host/x/model.meta4", ManifestRef("https://host/x/model.meta4")),
        ("http://127.0.0.1:8080/m.meta4?token=1", ManifestRef("http://127.0.0.1:8080/m.meta4?token=1")),
        ("model.torrent", TorrentRef("model.torrent")),
        ("/srv/model.torrent", TorrentRef("/srv/model.torrent")),
        ("https://host/model%2Etorrent", TorrentRef("https://host/model%2Etorrent")),
        ("./model", DirectoryRef("./model")),
        ("models/", DirectoryRef("models/")),
        ("a/b/c", DirectoryRef("a/b/c")),
        ("/srv/models", DirectoryRef("/srv/models")),
        ("~/models", DirectoryRef("~/models")),
        ("~", DirectoryRef("~")),
        (".", DirectoryRef(".")),
        ("..", DirectoryRef("..")),
        ("my models/b", DirectoryRef("my models/b")),
    ],
)
def test_every_form_is_recognized(text: str, ref: Ref) -> None:
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    "text,hint",
    [
        ("", "list --catalog"),
        (" \t\n", "list --catalog"),
        ("two words", "name[@version]"),
        ("mistral\x1b[2J", "name[@version]"),
        ("mistral\u202e7b", "name[@version]"),
        ("x" * (MAX_REF_LENGTH + 1), "name[@version]"),
        ("mistral-7b@", "mistral-7b alone"),
        ("mistral-7b@v0.1@v0.2", "mistral-7b alone"),
        ("@v0.1", "name[@version]"),
        ("-rf", "name[@version]"),
        ("a..b", "name[@version]"),
        ("naïve", "name[@version]"),
        ("hf:", "without the server's address"),
        ("hf:gpt2", "without the server's address"),
        ("hf:a/b/c", "without the server's address"),
        ("hf:../b", "without the server's address"),
        ("hf:a/..", "without the server's address"),
        ("hf:a/b..c", "without the server's address"),
        ("hf:a/b--c", "without the server's address"),
        ("hf:a/b.", "without the server's address"),
        ("hf:a/-b", "without the server's address"),
        ("hf:a/b?x=1", "without the server's address"),
        ("hf:a/b%2f", "without the server's address"),
        ("hf:a /b", "without the server's address"),
        ("hf:https://huggingface.co/a/b", "without the server's address"),
        ("hf:a/b@", "hf:a/b alone"),
        ("hf:a/b@../x", "hf:a/b alone"),
        ("hf:a/b@x//y", "hf:a/b alone"),
        ("hf:a/b@x/", "hf:a/b alone"),
        ("hf:a/b@x y", "hf:a/b alone"),
        ("hf:a/b@x?y", "hf:a/b alone"),
        ("ftp://host/model.meta4", "plain path"),
        ("file:///srv/model.meta4", "plain path"),
        ("https:///model.meta4", "plain path"),
        ("https://host:port/model.meta4", "check the address"),
        ("https://[host/model.meta4", "check the address"),
        ("https://host/model.safetensors", "publish DIR"),
        ("https://host/?file=model.meta4", "publish DIR"),
        ("https://huggingface.co/mistralai/Mistral-7B-v0.1", "hf:mistralai/Mistral-7B-v0.1"),
        ("https://huggingface.co/a/b/tree/refs/pr/1", "hf:a/b@refs/pr/1"),
        ("https://hf.co/a/b/", "hf:a/b"),
        ("magnet:?dn=x", "in quotes"),
        ("magnet:?xt=urn:btih:208b", "in quotes"),
        (f"magnet:?xt=urn:btih:{HASH}0", "in quotes"),
        (HASH, f"magnet:?xt=urn:btih:{HASH}"),
        ("model.safetensors", "directory"),
        ("mistral-7b.gguf", "directory"),
        ("model.metalink", "directory"),
    ],
)
def test_what_has_no_form_is_refused_with_what_to_type(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert hint in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE
    assert all(line and line.isprintable() for line in caught.value.lines())


@pytest.mark.parametrize("text", ["mistralai/Mistral-7B-v0.1", "models/mistral", "a/b@main"])
def test_two_plain_parts_are_ambiguous_and_both_ways_out_are_told(text: str) -> None:
    with pytest.raises(AmbiguousRef) as caught:
        parse_ref(text)
    assert caught.value.hint == f"type hf:{text} or ./{text}"
    assert isinstance(parse_ref(f"hf:{text}"), HubRef)
    assert isinstance(parse_ref(f"./{text}"), DirectoryRef)


@pytest.mark.parametrize(
    "text,key",
    [
        ("Mistral-7B", "mistral-7b"),
        ("Mistral-7B@0.1", "mistral-7b@v0.1"),
        ("hf:a/b", "hf:a/b@main"),
        ("hf:A/b@V1", "hf:A/b@V1"),
        ("HTTPS://User:Secret@Host.example/x/M.meta4#part", "https://host.example/x/M.meta4"),
        ("http://h:81/m.torrent?a=1", "http://h:81/m.torrent?c22fea5d7428"),
        (f"magnet:?dn=x&xt=urn:btih:{HASH.upper()}", f"magnet:btih:{HASH}"),
        (f"magnet:?xt=urn:btih:{HASH_32}&tr=udp://t:1", f"magnet:btih:{HASH}"),
        (f"magnet:?xt=urn:btih:{HASH_32.lower()}", f"magnet:btih:{HASH}"),
        (f"magnet:?xt=urn%3Abtih%3A{HASH}&dn=x", f"magnet:btih:{HASH}"),
        (f"magnet:?xt=urn%253Abtih%253A{HASH}", f"magnet:btih:{HASH}"),
        (f"MAGNET:?xt=urn:btmh:1220{HASH_V2}", f"magnet:btmh:{HASH_V2}"),
        (f"magnet:?xt=urn:btih:{HASH}&xt=urn:btmh:1220{HASH_V2}", f"magnet:btih:{HASH}"),
        (f"magnet:?tr=udp%3A%2F%http://2Ftracker.example%3A1337&xt=urn:btih:{HASH}", f"magnet:btih:{HASH}"),
    ],
)
def test_keys_are_canonical(text: str, key: str) -> None:
    assert parse_ref(text).key == key


def test_a_key_tells_queries_apart_without_showing_them() -> None:
    first, second = (parse_ref(f"https://me:s3cret@h/m.meta4?sig=s3cret{n}").key for n in (1, 2))
    assert first != second
    assert "s3cret" not in first + second


@pytest.mark.parametrize(
    "text",
    [
        "https://user:s3cret@host/foo",
        "ftp://user:s3cret@host/m.meta4",
        "https://user:s3cret@host:port/m.meta4",
        "https://user:s3c/s3cret@host/m.meta4",
        "https://user:?s3cret@host/m.meta4",
        "https://user:s3cret@[host/m.meta4",
        "https://host/foo?token=s3cret",
        "https://host/foo?s3cret",
        "https://user:s3cret@host/\x1b.meta4",
        "https://user:s3cret@huggingface.co/a/b",
        "hf:https://user:s3cret@host/foo",
        "hf:a/b@https://user:s3cret@host/foo",
        "name?token=s3cret",
        "magnet:?dn=x&tr=http://t/announce?passkey=s3cret",
    ],
)
def test_no_message_shows_credentials(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert "s3c" not in " ".join(caught.value.lines())


@pytest.mark.parametrize("name", ["model.meta4", "model.torrent", "./model", "./x/../model"])
def test_keys_of_files_are_absolute_so_two_directories_do_not_share_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = parse_ref(name).key
    assert key == str(tmp_path / Path(name).name)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert parse_ref(name).key != key


def test_keys_of_home_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_ref("~/m.meta4").key == "/home/somebody/m.meta4"
    assert parse_ref("~").key == "/home/somebody"
    assert parse_ref("~no-such-user-here/x").key.startswith("/")


def test_a_magnet_keeps_its_text_for_whoever_repairs_it() -> None:
    text = f"magnet:?xt=urn:btih:{HASH}&tr=udp%3A%2F%http://2Ft.example"
    assert parse_ref(text) == MagnetRef(text)


@pytest.mark.parametrize(
    "text,expected", [("https://h/m.meta4", True), ("m.meta4", False), ("https://h/m.torrent", True)]
)
def test_files_and_addresses_are_told_apart(text: str, expected: bool) -> None:
    ref = parse_ref(text)
    assert isinstance(ref, ManifestRef | TorrentRef)
    assert ref.is_url is expected


@pytest.mark.parametrize(
    "text,version", [("0.1", "v0.1"), ("v0.1", "v0.1"), ("V0.1", "v0.1"), ("2407", "v2407"), ("latest", "latest")]
)
def test_versions_have_one_spelling(text: str, version: str) -> None:
    assert normalize_version(text) == version


PIECES = st.sampled_from(
    [
        *("hf:", "magnet:?xt=urn:btih:", "magnet:", "https://", "://", "@", "/", "..", "~", ".meta4", ".torrent"),
        *(HASH, "mistral-7b", "v0.1", "a", "%", "\\", "[", "]", ":", "?", "#", " ", "\n"),
        *("\x00", "\u00e9", "\udc80", "\u202e"),
    ]
)


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=8).map("".join)))
def test_any_text_is_a_reference_with_a_stable_key_or_a_usage_error(text: str) -> None:
    try:
        ref = parse_ref(text)
    except UsageError as error:
        lines = error.lines()
        assert len(lines) == 3
        assert all(line.isprintable() for line in lines)
        return
    assert ref.key
    assert ref.key.isprintable()
    assert parse_ref(text).key == ref.key
    if isinstance(ref, CatalogRef | HubRef):
        assert parse_ref(ref.key) == ref
        assert ".." not in ref.key
