"""``publish``: a publisher's transcript."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mistral_fetch.metalink import parse_metalink


def test_publish_says_what_it_wrote(program, manifest):
    shown = program("publish", "tiny", "--out", "out", "--licence", "Apache-2.0", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    first, *files = shown.out.splitlines()
    assert first == "tiny: 2 files, 281.6 kB"
    assert re.fullmatch(r"  out/tiny.meta4", files[0])
    assert re.fullmatch(r"  out/tiny.torrent \(v1 [0-9a-f]{40}, v2 [0-9a-f]{64}\)", files[1])
    assert re.fullmatch(r"  out/tiny.v1.torrent \(v1 [0-9a-f]{40}, for clients without v2\)", files[2])
    assert files[3].startswith("  out/SHA256SUMS (")
    assert files[4].startswith("Serve out with the files in out/tiny")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "SHA256SUMS",
        "tiny.meta4",
        "tiny.torrent",
        "tiny.v1.torrent",
    ]


def test_what_was_published_can_be_pulled(program, manifest):
    assert program("publish", "tiny", "--out", ".", "--name", "tiny", "--quiet").code == 0
    shown = program("pull", "tiny.meta4", "--json", "--quiet")
    assert shown.code == 0, shown.err
    assert shown.json["assurance"] == "sha256"


@pytest.mark.parametrize(
    ("named", "code", "words"),
    [
        ("empty", 2, "cannot publish empty"),
        ("nowhere", 3, "nowhere"),
        ("./nowhere", 3, "there is no directory ./nowhere"),
        ("tiny.meta4", 3, "tiny.meta4 is not complete in the cache"),
        ("hf:org/none", 3, "hf:org/none is not complete in the cache"),
    ],
)
def test_what_cannot_be_published_is_refused(program, manifest, tmp_path, named, code, words):
    (tmp_path / "empty").mkdir()
    shown = program("publish", named, "--out", "out", "--quiet")
    assert (shown.code, shown.out) == (code, "")
    assert shown.err.startswith("error: ")
    assert words in shown.err
    assert not (tmp_path / "out").exists()


def written(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.parametrize("by_path", [False, True], ids=["REF", "its snapshot directory"])
def test_a_complete_model_of_the_cache_is_published_like_its_directory(program, manifest, pulled, by_path):
    """Links into the cache's blobs are followed, and the cache's own papers are no part of the model."""
    flags = ["--licence", "Apache-2.0", "--model-version", "1", "--name", "tiny-1", "--quiet"]
    assert program("publish", pulled if by_path else "tiny.meta4", "--out", "one", "--quiet").code == 0
    shown = program("publish", "./tiny", "--out", "two", *flags)
    assert shown.code == 0, shown.err
    # Only the name inside the papers differs: the model's own is tiny, at version 1.
    one, two = written("one"), written("two")
    assert set(one) == {"SHA256SUMS", "tiny-1.meta4", "tiny-1.torrent", "tiny-1.v1.torrent"}
    assert one["tiny-1.meta4"].replace(b'm:name="tiny"', b'm:name="tiny-1"') == two["tiny-1.meta4"]
    del one["tiny-1.meta4"], two["tiny-1.meta4"]
    assert one == two


def test_flags_win_over_what_the_cache_knows(program, manifest, pulled):
    shown = program(
        "publish", "tiny.meta4", "--out", "o", "--licence", "MIT", "--credit", "Me", "--name", "x", "--quiet"
    )
    assert shown.code == 0, shown.err
    info = parse_metalink(Path("o/x.meta4").read_bytes()).info
    assert (info.name, info.version, info.licence, info.credit) == ("x", "1", "MIT", "Me")


def test_a_snapshot_whose_link_leads_elsewhere_is_refused(program, manifest, pulled, tmp_path):
    weights = (pulled / "weights.bin").read_bytes()
    (tmp_path / "elsewhere").write_bytes(weights)
    (pulled / "weights.bin").unlink()
    (pulled / "weights.bin").symlink_to(tmp_path / "elsewhere")
    shown = program("publish", "tiny.meta4", "--out", "out", "--quiet")
    assert (shown.code, shown.out) == (2, "")
    assert "a link out of the cache" in shown.err


def test_a_name_that_no_directory_can_have_is_refused(program, manifest):
    for arguments in (["x" * 300, "--out", "out"], ["tiny", "--out", "x" * 300]):
        shown = program("publish", *arguments)
        assert (shown.code, shown.out) == (2, "")
        assert "cannot be a directory" in shown.err.splitlines()[0]
        assert len(shown.err.splitlines()) == 3
