from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_fetch import metalink
from mistral_fetch.digest import Digest
from mistral_fetch.errors import MalformedManifest, ManifestError, UnsafePath
from mistral_fetch.manifest import MAX_FILES, FileEntry, Manifest, MirrorUrl, ModelInfo, PieceHashes, TorrentLink
from mistral_fetch.metalink import METALINK_NAMESPACE, parse_metalink, serialise_metalink

NAMESPACE = f'xmlns="{METALINK_NAMESPACE}"'
SHA256 = "a" * 64

hex64 = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.from_regex(r"[A-Za-z0-9_&<>'\"é;#][A-Za-z0-9_&<>'\"é;#-]{0,20}", fullmatch=True)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), max_size=60).map(str.strip)


@st.composite
def entries(draw: st.DrawFn, path: str) -> FileEntry:
    size = draw(st.integers(0, 1 << 40))
    length = draw(st.integers(max(1, size // 5), 1 << 41))
    count = -(-size // length)
    pieces = PieceHashes(length, tuple(draw(st.lists(hex64, min_size=count, max_size=count))))
    urls = draw(st.lists(st.sampled_from(["https://a.example/x?a=1&b=<2>", "http://b.example/é"]), unique=True))
    members = draw(st.lists(st.just("") | paths, min_size=len(urls), max_size=len(urls)))
    return FileEntry(
        path,
        size,
        draw(st.sampled_from([(), (Digest("sha256", SHA256),), (Digest("sha256", SHA256), Digest("md5", "0" * 32))])),
        pieces if size and draw(st.booleans()) else None,
        tuple(MirrorUrl(url, at, member) for at, (url, member) in enumerate(zip(urls, members, strict=True), start=1)),
        draw(st.sampled_from([(), (TorrentLink("https://a.example/m.torrent", path),)])),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    chosen = draw(st.lists(paths, min_size=1, max_size=4, unique_by=lambda path: path.casefold().partition("/")[0]))
    info = ModelInfo(**{name: draw(texts) for name in ("name", "version", "licence", "credit", "source_url")})
    return Manifest(tuple(draw(entries(path)) for path in chosen), info)


@given(manifests())
@settings(deadline=None)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    data = serialise_metalink(manifest)
    assert parse_metalink(data) == manifest
    assert serialise_metalink(parse_metalink(data)) == data


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_a_manifest_error(data: bytes) -> None:
    try:
        parse_metalink(data)
    except ManifestError:
        return


@given(manifests(), st.data())
@settings(deadline=None)
def test_a_damaged_document_is_a_manifest_or_a_manifest_error(manifest: Manifest, data: st.DataObject) -> None:
    document = bytearray(serialise_metalink(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_metalink(bytes(document))
    except ManifestError:
        return


def test_the_files_order_does_not_matter() -> None:
    a, b = FileEntry("a", 1), FileEntry("b", 2)
    assert serialise_metalink(Manifest((b, a))) == serialise_metalink(Manifest((a, b)))


def document(*files: str, head: str = "", root: str = f"metalink {NAMESPACE}") -> bytes:
    return f"{head}<{root}>{''.join(files)}</{root.partition(' ')[0]}>".encode()


def file(inner: str = "<size>1</size>", name: str = "f") -> str:
    return f'<file name="{name}">{inner}</file>'


def test_the_shape_is_the_one_rfc_5854_gives() -> None:
    entry = FileEntry(
        "w.bin",
        5,
        (Digest("sha256", SHA256),),
        PieceHashes(4, ("b" * 64, "c" * 64)),
        (MirrorUrl("https://a.example/w.bin", 1),),
        (TorrentLink("https://a.example/m.torrent", "w.bin"),),
    )
    root = ElementTree.fromstring(serialise_metalink(Manifest((entry,), ModelInfo(licence="Apache-2.0"))))
    space = f"{{{METALINK_NAMESPACE}}}"
    assert root.tag == f"{space}metalink"
    (element,) = root.findall(f"{space}file")
    assert element.get("name") == "w.bin"
    assert element.findtext(f"{space}size") == "5"
    assert [(h.get("type"), h.text) for h in element.findall(f"{space}hash")] == [("sha-256", SHA256)]
    (pieces,) = element.findall(f"{space}pieces")
    assert (pieces.get("type"), pieces.get("length")) == ("sha-256", "4")
    assert [h.text for h in pieces] == ["b" * 64, "c" * 64]
    (url,) = element.findall(f"{space}url")
    assert (url.get("priority"), url.text) == ("1", "https://a.example/w.bin")
    (torrent,) = element.findall(f"{space}metaurl")
    assert (torrent.get("mediatype"), torrent.text) == ("torrent", "https://a.example/m.torrent")
    # Ours come in a namespace of their own, and not as elements: aria2c would take those for files.
    assert {name for name in root.attrib if name.startswith(f"{{{metalink.OUR_NAMESPACE}}}")}
    assert {child.tag for child in root} == {f"{space}generator", f"{space}file"}


def test_what_other_programs_write_is_read() -> None:
    foreign = document(
        file(
            "<identity>x</identity><size> 3 </size><version>1</version><hash type='sha-1'>"
            + "0" * 40
            + f"</hash><hash type='sha-256'>{SHA256.upper()}</hash>"
            + "<pieces length='2' type='sha-1'><hash>"
            + "0" * 40
            + "</hash><hash>"
            + "1" * 40
            + "</hash></pieces>"
            + "<url location='de' priority='2'>https://a.example/f</url><url>https://b.example/f</url>"
            + "<url>ftp://c.example/f</url><metaurl mediatype='torrent'>https://a.example/t</metaurl>"
            + "<metaurl mediatype='application/xml'>https://a.example/x</metaurl>"
        ),
        head="<?xml version='1.0'?><!-- made elsewhere -->",
    )
    (entry,) = parse_metalink(foreign).files
    assert (entry.size, entry.sha256, entry.pieces) == (3, SHA256, None)
    assert [mirror.url for mirror in entry.mirrors] == ["https://a.example/f", "https://b.example/f"]
    assert [mirror.priority for mirror in entry.mirrors] == [2, 999999]
    assert entry.torrents == (TorrentLink("https://a.example/t", "f"),)


BOMB = "<!DOCTYPE m [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
    f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 10}'>" for n in range(9)
)
HOSTILE = {
    "nothing": b"",
    "not xml": b"\x00\x01\x02",
    "a web page": b"<!DOCTYPE html><html><body>sign in</body></html>",
    "a web page without doctype": b"<html><body/></html>",
    "cut short": document(file())[:-8],
    "two roots": document(file()) + document(file()),
    "no files": document(),
    "metalink 3": b'<metalink version="3.0" xmlns="http://www.metalinker.org/"><files/></metalink>',
    "no namespace": document(file(), root="metalink"),
    "an entity bomb": document(file("<size>&j;</size>"), head=BOMB + "]>"),
    "a file behind an entity": document(
        file("<url>&x;</url>"), head="<!DOCTYPE m [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"
    ),
    "an undefined entity": document(file("<size>&x;</size>")),
    "another encoding": document(file()).decode().encode("utf-16") + b"\xff",
    "bytes that are no UTF-8": document(file()).replace(b'"f"', b'"\xe9"'),
    "deep nesting": document("<x>" * 100_000),
    "deep nesting that is closed again": document("<x>" * 20 + "</x>" * 20, file()),
    "a huge text": document(file(f"<size>{'1' * 70_000}</size>")),
    "a huge size": document(file(f"<size>{10**17}</size>")),
    "a size beyond numbers": document(file(f"<size>{'9' * 5000}</size>")),
    "a negative size": document(file("<size>-1</size>")),
    "a size of letters": document(file("<size>many</size>")),
    "a size in Arabic digits": document(file("<size>٣</size>")),
    "an empty size": document(file("<size/>")),
    "a short digest": document(file("<hash type='sha-256'>abc</hash>")),
    "a digest of letters": document(file(f"<hash type='sha-256'>{'z' * 64}</hash>")),
    "pieces without a length": document(file("<size>1</size><pieces type='sha-256'/>")),
    "pieces of nothing": document(file("<size>1</size><pieces length='0' type='sha-256'/>")),
    "too few pieces": document(file("<size>9</size><pieces length='4' type='sha-256'></pieces>")),
    "too many pieces": document(
        file(f"<size>1</size><pieces length='4' type='sha-256'>{f'<hash>{SHA256}</hash>' * 2}</pieces>")
    ),
    "pieces without a size": document(file("<pieces length='4' type='sha-256'/>")),
    "a piece that is no digest": document(
        file("<size>1</size><pieces length='4' type='sha-256'><hash>x</hash></pieces>")
    ),
    "a priority of letters": document(file("<url priority='first'>https://a.example/f</url>")),
    "too many files": document(*(file(name=f"f{n}") for n in range(10_001))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_document_is_refused(name: str) -> None:
    with pytest.raises(MalformedManifest) as caught:
        parse_metalink(HOSTILE[name])
    assert caught.value.exit_code == 20
    assert all(0 < len(line) < 500 for line in caught.value.lines())


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "..",
        "C:/x",
        "C:x",
        "a\\b",
        "..\\x",
        "a&#10;b",
        "a&#x202e;b",
        "x&#x200b;",
        "a/" * 16 + "a",
        "a" * 256,
        "a./b",
        " a",
        "a ",
        "PROVENANCE.json",
        "provenance.JSON",
        ".complete",
        ".COMPLETE/x",
        "manifest.meta4",
    ],
)
def test_an_unsafe_name_is_refused(name: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        parse_metalink(document(file(name=name)))
    assert caught.value.exit_code == 20
    assert all(caught.value.lines())


@pytest.mark.parametrize(
    "one, other", [("a", "a"), ("a", "A"), ("d/a", "D/A"), ("é", "e\u0301"), ("a", "a/b"), ("A", "a/b"), ("ß", "SS")]
)
def test_names_that_clash_somewhere_are_refused(one: str, other: str) -> None:
    with pytest.raises(UnsafePath, match="refused the file name"):
        parse_metalink(document(file(name=one), file(name=other)))


def test_a_document_beyond_the_limit_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metalink, "MAX_METALINK_BYTES", 100)
    with pytest.raises(MalformedManifest, match="not a usable"):
        parse_metalink(document(file()) + b" " * 200)


def urls_of(inner: str, base: str = "") -> list[str]:
    return [mirror.url for mirror in parse_metalink(document(file(inner)), base).files[0].mirrors]


@pytest.mark.parametrize(
    "base, address, expected",
    [
        ("https://a.example/m/x.meta4", "f/w%20x", ["https://a.example/m/f/w%20x"]),
        ("https://a.example/m/x.meta4", "../f", ["https://a.example/f"]),
        ("https://a.example/m/x.meta4", "//b.example/f", ["https://b.example/f"]),
        ("https://a.example/m/x.meta4", "http://b.example/f", ["http://b.example/f"]),
        ("https://a.example/m/x.meta4", "file:///etc/passwd", []),
        ("https://a.example/m/x.meta4", "ftp://b.example/f", []),
        ("https://a.example/m/x.meta4", "javascript:alert(1)", []),
        ("file:///media/stick/x.meta4", "m/w", ["file:///media/stick/m/w"]),
        ("file:///media/stick/x.meta4", "file:///media/stick/m/w", ["file:///media/stick/m/w"]),
        ("file:///media/stick/x.meta4", "../secret", []),
        ("file:///media/stick/x.meta4", "m/../../secret", []),
        ("file:///media/stick/x.meta4", "%2e%2e/secret", []),
        ("file:///media/stick/x.meta4", "m/%2e%2e/%2e%2e/secret", []),
        ("file:///media/stick/x.meta4", "/etc/passwd", []),
        ("file:///media/stick/x.meta4", "file:///etc/passwd", []),
        ("file:///media/stick/x.meta4", "file:///media/stick2/w", []),
        ("file:///media/stick/x.meta4", "file://evil.example/media/stick/w", []),
        ("file:///media/stick/x.meta4", "https://a.example/f", ["https://a.example/f"]),
        ("", "f", []),
        ("", "file:///etc/passwd", []),
        ("", "https://a.example/f", ["https://a.example/f"]),
    ],
)
def test_addresses_lead_only_where_they_may(base: str, address: str, expected: list[str]) -> None:
    assert urls_of(f"<url>{address}</url>", base) == expected


@pytest.mark.parametrize(
    "address", ["http://[::1", "https://a.example:99999999/f", "http://\u2100.example/", "//[", "http://[x]/f"]
)
@pytest.mark.parametrize("base", ["", "https://a.example/m.meta4", "file:///m/x.meta4"])
def test_an_unreadable_address_is_no_crash(address: str, base: str) -> None:
    try:
        parse_metalink(document(file(f"<url>{address}</url>")), base)
    except MalformedManifest:
        return


def test_mirrors_are_bounded_and_each_once() -> None:
    many = "".join(f"<url>https://a.example/{n % 300}</url>" for n in range(1000))
    assert len(urls_of(many)) == metalink.MAX_MIRRORS
    assert len(urls_of("<url>https://a.example/f</url>" * 5)) == 1


@pytest.mark.parametrize("encoding", ["rot13", "zlib_codec", "utf-7", "utf-16", "no-such-thing"])
def test_the_encoding_a_document_claims_is_not_used(encoding: str) -> None:
    head = f"<?xml version='1.0' encoding='{encoding}'?>"
    assert parse_metalink(document(file(), head=head)).files[0].path == "f"


def test_unknown_elements_are_skipped_wherever_they_are() -> None:
    foreign = '<x:extra xmlns:x="urn:other"><x:size>7</x:size></x:extra>'
    (entry,) = parse_metalink(document(foreign, file(f"{foreign}<size>1</size>"))).files
    assert entry.size == 1


def test_digests_that_no_metalink_can_hold_are_left_out_of_it() -> None:
    entry = FileEntry("f", 1, (Digest("gitsha1", "0" * 40),))
    assert parse_metalink(serialise_metalink(Manifest((entry,)))).files[0].digests == ()


def test_a_second_digest_that_differs_ends_the_reading_at_once() -> None:
    # Compared with all before it, each of so many would take minutes; after the second, nothing is read on.
    many = "".join(f"<hash type='md5'>{n:032x}</hash>" for n in range(2)) + "<hash type='md5'>never read</hash>"
    with pytest.raises(MalformedManifest) as caught:
        parse_metalink(document(file(many)))
    assert "one md5 of 'f', got two that differ" in caught.value.detail


def test_a_digest_may_be_repeated() -> None:
    (entry,) = parse_metalink(document(file(f"<hash type='sha-256'>{SHA256}</hash>" * 3))).files
    assert entry.digests == (Digest("sha256", SHA256),)


def test_reading_stops_at_one_file_too_many() -> None:
    # Two of one name would be refused as a clash, had the list been read to its end.
    with pytest.raises(MalformedManifest) as caught:
        parse_metalink(document("<file name='a'/>" * (MAX_FILES + 1)))
    assert caught.value.detail == f"expected at most {MAX_FILES} files, got more"


def mirrors_of(inner: str, base: str = "") -> tuple[MirrorUrl, ...]:
    return parse_metalink(document(file(inner)), base).files[0].mirrors


def member(inner: str, attributes: str = "name='m/f'") -> str:
    return f"<m:member xmlns:m='{metalink.OUR_NAMESPACE}' {attributes}>{inner}</m:member>"


def test_a_file_in_an_archive_is_written_where_other_programs_skip_it() -> None:
    mirrors = (MirrorUrl("https://a.example/m.tar", 3, 'm/"f"'), MirrorUrl("https://a.example/f", 4))
    data = serialise_metalink(Manifest((FileEntry("f", 1, mirrors=mirrors),)))
    assert b'<m:member name="m/&quot;f&quot;" priority="3">https://a.example/m.tar</m:member>' in data
    (element,) = ElementTree.fromstring(data).iter(f"{{{METALINK_NAMESPACE}}}url")
    assert element.text == "https://a.example/f"
    assert parse_metalink(data).files[0].mirrors == mirrors


@pytest.mark.parametrize("attributes", ["", "name=''"])
def test_a_member_without_a_name_has_the_file_s_own(attributes: str) -> None:
    assert mirrors_of(member("https://a.example/m.tar", attributes)) == (
        MirrorUrl("https://a.example/m.tar", 999999, "f"),
    )


def test_an_archive_is_resolved_capped_and_kept_once_like_any_mirror() -> None:
    base = "https://a.example/m/x.meta4"
    assert mirrors_of(member("../m.tar", "name='x/f' priority='7'"), base) == (
        MirrorUrl("https://a.example/m.tar", 7, "x/f"),
    )
    assert mirrors_of(member("ftp://a.example/m.tar") + member("file:///etc/x.tar"), base) == ()
    assert len(mirrors_of(member("m.tar") * 3 + "<url>m.tar</url>", base)) == 2
    many = "".join(member(f"https://a.example/{n}.tar") for n in range(500))
    assert len(mirrors_of(many)) == metalink.MAX_MIRRORS


@pytest.mark.parametrize("name", ["../f", "/etc/passwd", "a&#10;b", "a\\b"])
def test_an_unsafe_name_in_an_archive_is_refused(name: str) -> None:
    with pytest.raises(UnsafePath):
        mirrors_of(member("https://a.example/m.tar", f"name='{name}'"))
