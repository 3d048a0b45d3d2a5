"""Streamed text equals the text of the whole, never shows half a character and never part of a stop string."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_runtime.errors import BadRequest, MalformedTokenizer, MissingFile
from mistral_runtime.text_stream import StopMatcher, StreamingDecoder
from mistral_runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def mistral_v1() -> Tokenizer:
    """Mistral 7B v0.1's own vocabulary, which mistral-common ships."""
    import mistral_common

    return Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")


def _stream(tokenizer: Tokenizer, ids: list[int], *, strip: bool = True) -> list[str]:
    decoder = StreamingDecoder(tokenizer, strip_leading_space=strip)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


TEXTS = [
    "Hello world",
    "déjà vu",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "a  b   c",
    "tab\tand\nline",
    "",
    "x" * 300,
    "𝕄𝕚𝕤𝕥𝕣𝕒𝕝",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_streaming(text: str, mistral_v1: Tokenizer) -> None:
    ids = mistral_v1.encode(text)
    assert ids[0] == mistral_v1.bos_id
    assert mistral_v1.decode(ids) == text
    assert "".join(_stream(mistral_v1, ids)) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 31_999) | st.sampled_from([0, 1, 2, 28705, 259]), max_size=30))
def test_streaming_equals_decoding_the_whole(ids: list[int], mistral_v1: Tokenizer) -> None:
    assert "".join(_stream(mistral_v1, ids)) == mistral_v1.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=12))
def test_any_bytes_stream_as_sentencepiece_decodes_them(data: bytes, mistral_v1: Tokenizer) -> None:
    ids = [3 + byte for byte in data]  # <0x00> is id 3
    assert "".join(_stream(mistral_v1, ids)) == mistral_v1.decode(ids)


def test_an_emoji_over_four_byte_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    ids = [3 + byte for byte in "🌬".encode()]
    assert _stream(tokenizer, ids) == ["", "", "", "🌬", ""]


def test_no_character_reaches_across_a_control_token(mistral_v1: Tokenizer) -> None:
    first, second = (3 + byte for byte in "é".encode())
    assert _stream(mistral_v1, [first, mistral_v1.bos_id, second]) == ["", "\ufffd", "\ufffd", ""]


def test_an_unfinished_character_ends_in_replacements(tokenizer: Tokenizer) -> None:
    ids = [3 + byte for byte in "🌬".encode()[:3]]
    assert _stream(tokenizer, ids) == ["", "", "", "\ufffd\ufffd\ufffd"]


def test_only_the_first_space_is_taken_off(mistral_v1: Tokenizer) -> None:
    ids = mistral_v1.encode("  two spaces", bos=False)
    assert "".join(_stream(mistral_v1, ids)) == "  two spaces"
    assert "".join(_stream(mistral_v1, ids, strip=False)) == "   two spaces"


def test_control_tokens_show_nothing_and_do_not_use_up_the_space_rule(mistral_v1: Tokenizer) -> None:
    ids = [mistral_v1.bos_id, *mistral_v1.encode("Hi", bos=False), mistral_v1.eos_id]
    assert "".join(_stream(mistral_v1, ids)) == "Hi"


def test_control_tokens_are_never_read_from_text(mistral_v1: Tokenizer) -> None:
    ids = mistral_v1.encode("</s><s>", bos=False)
    assert mistral_v1.eos_id not in ids
    assert mistral_v1.bos_id not in ids


def test_text_that_was_not_utf8_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="UTF-8"):
        tokenizer.encode("caf\udce9")


def test_bad_tokenizer_files_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(MissingFile):
        Tokenizer(tmp_path / "tokenizer.model")
    for content in (b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", tokenizer.path.read_bytes()[:-7]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(MalformedTokenizer, match=r"bad\.model"):
            Tokenizer(tmp_path / "bad.model")
    with (tmp_path / "huge.model").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(MalformedTokenizer, match="too large"):
        Tokenizer(tmp_path / "huge.model")


def test_vocabulary_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.require_vocab_size(300)
    with pytest.raises(MalformedTokenizer, match="32000"):
        tokenizer.require_vocab_size(32000)


# --- stop strings ---------------------------------------------------------------------------------------------------


def _match(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(part) for part in parts)
    return shown + matcher.flush(), matcher.matched


def _splits(text: str) -> list[list[str]]:
    """Return every way to cut `text` into consecutive pieces."""
    result = []
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        parts, start = [], 0
        for position, cut in enumerate(cuts, start=1):
            if cut:
                parts.append(text[start:position])
                start = position
        result.append([*parts, text[start:]])
    return result


STOP_CASES = [
    (["\n\nQ:"], "yes\n\nQ: no", "yes", "\n\nQ:"),
    (["\n"], "one\ntwo", "one", "\n"),
    (["aab"], "aaaab!", "aa", "aab"),
    (["END", "STOP"], "a STO END", "a STO ", "END"),
    (["abcd", "bc"], "xabcd", "xa", "bc"),
    (["abc", "ab"], "xabc", "x", "ab"),
    (["zz"], "buzz", "bu", "zz"),
    (["zzz"], "buzz", "buzz", None),
    (["🌬"], "w🌬ind", "w", "🌬"),
    ([], "nothing", "nothing", None),
    (["ab"], "abab", "", "ab"),
]


@pytest.mark.parametrize("stops, text, shown, matched", STOP_CASES)
def test_stop_string_is_found_at_every_split(stops: list[str], text: str, shown: str, matched: str | None) -> None:
    for parts in _splits(text):
        assert _match(stops, parts) == (shown, matched), parts


def test_no_part_of_a_stop_string_is_ever_shown() -> None:
    matcher = StopMatcher(["</answer>"])
    shown = [matcher.feed(character) for character in "42</answ and </answer>tail"]
    assert "".join(shown) == "42</answ and "
    assert matcher.matched == "</answer>"
    assert matcher.flush() == ""


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=14),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=6),
)
def test_cutting_does_not_change_the_result(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert _match(stops, parts) == _match(stops, [text])
    shown, matched = _match(stops, parts)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (matched is None) == (not ends)
    if matched is None:
        assert shown == text
    else:
        assert text.startswith(shown + matched)
        assert len(shown) + len(matched) == min(ends)
