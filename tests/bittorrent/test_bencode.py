"""Bencoding: one form per value, and bounded work on hostile bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.bittorrent.bencode import MAX_DEPTH, MAX_VALUES, BencodeError, Decoder, decode, encode

VALUES = st.recursive(
    st.integers(-(10**18), 10**18) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_encoded_is_decoded_again(value):
    assert decode(encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data):
    with contextlib.suppress(BencodeError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i",
        b"ie",
        b"i-e",
        b"i-0e",
        b"i01e",
        b"i1",
        b"i1x",
        b"i" + b"9" * 40 + b"e",
        b"i\xb2e",
        b"3:ab",
        b"03:abc",
        b"-1:a",
        b"99999999999:a",
        b"l",
        b"li1e",
        b"d1:a",
        b"d1:ai1e",
        b"di1ei2ee",
        b"d1:ai1e1:ai2ee",
        b"i1ei2e",
        b"x",
        b"l" * (MAX_DEPTH + 2) + b"e" * (MAX_DEPTH + 2),
        b"l" * 1_000_000,
        b"l" + b"le" * MAX_VALUES + b"e",
    ],
)
def test_malformed_bytes_are_refused(data):
    with pytest.raises(BencodeError):
        decode(data)


def test_the_place_of_top_level_values_is_told():
    data = b"d4:infod1:ai1ee1:zi2ee"
    decoder = Decoder(data)
    decoder.decode()
    start, end = decoder.spans[b"info"]
    assert data[start:end] == b"d1:ai1ee"


def test_keys_are_sorted_as_bytes():
    assert encode({b"b": 1, b"a": 2, b"": 3, b"B": 4}) == b"d0:i3e1:Bi4e1:ai2e1:bi1ee"


@pytest.mark.parametrize("value", [1.5, "text", None, True, {"key": 1}, [None]])
def test_other_values_are_not_encoded(value):
    with pytest.raises(TypeError):
        encode(value)
