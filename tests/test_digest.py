"""Digests are values that cannot be malformed, ranked by what a match proves, and computed in a stream."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.digest import Assurance, Digest, new_hash, sha256_of

LENGTHS = {"sha256": 64, "sha1": 40, "gitsha1": 40, "md5": 32}


def test_assurance_is_ordered_from_weak_to_strong() -> None:
    labels = [level.label for level in sorted(Assurance)]
    assert labels == ["size", "md5", "btv1", "gitsha1", "btv2", "sha256", "signed"]


@pytest.mark.parametrize("level", Assurance)
def test_assurance_labels_round_trip(level: Assurance) -> None:
    assert Assurance.parse(level.label) is level
    assert Assurance.parse(level.label.upper()) is level


@pytest.mark.parametrize("label", ["", "sha512", "sha256 ", "50", "sha-256"])
def test_unknown_assurance_names_the_known_ones(label: str) -> None:
    with pytest.raises(ValueError, match="one of size, md5, btv1"):
        Assurance.parse(label)


@pytest.mark.parametrize("algorithm,length", LENGTHS.items())
def test_digest_accepts_its_own_length_alone(algorithm: str, length: int) -> None:
    assert str(Digest(algorithm, "a" * length)) == f"{algorithm}:{'a' * length}"
    for wrong in (0, length - 1, length + 1, 2 * length):
        with pytest.raises(ValueError, match=f"not a {algorithm} value"):
            Digest(algorithm, "a" * wrong)


@pytest.mark.parametrize(
    "value",
    ["A" * 64, "g" * 64, "0" * 63 + "\n", "0" * 64 + "\n", " " + "0" * 63, "٠" * 64, "0x" + "0" * 62, "-" + "0" * 63],
    ids=["upper", "letter", "short-and-newline", "newline", "space", "arabic", "prefix", "sign"],
)
def test_digest_refuses_everything_but_lower_case_hexadecimal(value: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 value"):
        Digest("sha256", value)


@pytest.mark.parametrize("algorithm", ["sha512", "SHA256", "", "sha-256", "crc32"])
def test_unknown_algorithms_are_refused(algorithm: str) -> None:
    with pytest.raises(ValueError, match="unknown digest algorithm"):
        Digest(algorithm, "0" * 64)
    with pytest.raises(ValueError, match="unknown digest algorithm"):
        new_hash(algorithm, 0)


def test_parse_lowers_the_value_and_needs_an_algorithm() -> None:
    assert Digest.parse("md5:" + "AB" * 16) == Digest("md5", "ab" * 16)
    for text in ("", "md5", ":" + "0" * 32, "0" * 64, "md5:" + "0" * 31, "md5::" + "0" * 32):
        with pytest.raises(ValueError):
            Digest.parse(text)


@given(st.sampled_from(sorted(LENGTHS)), st.binary(min_size=32, max_size=32))
def test_text_form_round_trips(algorithm: str, data: bytes) -> None:
    digest = Digest(algorithm, data.hex()[: LENGTHS[algorithm]])
    assert Digest.parse(str(digest)) == digest


def test_assurance_of_a_digest_is_none_for_piece_algorithms() -> None:
    levels = {name: Digest(name, "0" * length).assurance for name, length in LENGTHS.items()}
    assert levels == {
        "sha256": Assurance.SHA256,
        "sha1": None,
        "gitsha1": Assurance.GITSHA1,
        "md5": Assurance.MD5,
    }


# Each from its standard: FIPS 180-4, RFC 1321, and `git hash-object` of the same bytes.
KNOWN = [
    ("sha256", b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("sha256", b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ("sha1", b"abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
    ("md5", b"abc", "900150983cd24fb0d6963f7d28e17f72"),
    ("gitsha1", b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
    ("gitsha1", b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
]


@pytest.mark.parametrize("algorithm,content,expected", KNOWN)
def test_known_values(algorithm: str, content: bytes, expected: str) -> None:
    hasher = new_hash(algorithm, len(content))
    hasher.update(content)
    assert hasher.hexdigest() == expected


@given(st.sampled_from(sorted(LENGTHS)), st.binary(max_size=300), st.integers(1, 50))
def test_streaming_in_any_steps_gives_the_same_value(algorithm: str, content: bytes, step: int) -> None:
    whole, stream = new_hash(algorithm, len(content)), new_hash(algorithm, len(content))
    whole.update(content)
    for at in range(0, len(content), step):
        stream.update(memoryview(content)[at : at + step])
    assert stream.hexdigest() == whole.hexdigest()
    assert Digest(algorithm, whole.hexdigest()).value == whole.hexdigest()


@given(st.binary(max_size=100))
def test_git_blob_id_depends_on_the_announced_length(content: bytes) -> None:
    right, wrong = new_hash("gitsha1", len(content)), new_hash("gitsha1", len(content) + 1)
    right.update(content)
    wrong.update(content)
    assert right.hexdigest() != wrong.hexdigest()
    assert right.hexdigest() == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_sha256_of_bytes_and_views() -> None:
    assert sha256_of(b"abc") == sha256_of(memoryview(b"abc")) == Digest("sha256", KNOWN[1][2])
