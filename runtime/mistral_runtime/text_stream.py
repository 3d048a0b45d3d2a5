"""From a stream of tokens to a stream of text that is safe to show.

Two filters, both pure and both incremental: one never shows part of a character, the other never shows part
of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from mistral_runtime.tokenizer import Tokenizer


def _one_replacement_per_byte(error: UnicodeError) -> tuple[str, int]:
    # Python's own "replace" merges the bytes of a truncated character; sentencepiece shows one U+FFFD for each.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mistral-runtime-replace", _one_replacement_per_byte)


class StreamingDecoder:
    """Turn token ids into text as they come.

    Bytes of an unfinished character are held back. With `strip_leading_space`, the space that sentencepiece puts before
    the first word of a text is taken off the first piece that shows anything, as decoding the whole would; a
    continuation of a prompt keeps it, since there it separates two words.
    """

    def __init__(self, tokenizer: Tokenizer, *, strip_leading_space: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("mistral-runtime-replace")
        self._at_start = strip_leading_space

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` completes, maybe none."""
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return self.flush()  # a control token: sentencepiece lets no character reach across one
        if self._at_start:
            self._at_start = False
            if self._tokenizer.begins_word(token_id):
                data = data[1:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return U+FFFD for each byte of a character that never finished."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Pass text on up to the first stop string, which is never shown, not even in part.

    Worked example, stop string "\\n\\nQ:". Fed "…yes.\\n", it shows "…yes." and holds "\\n" back; fed "\\n" it holds
    two; fed "So" it shows "\\n\\nSo"; fed "Q:" instead, it stops. Of several stop strings the one that is complete
    first counts, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return what may be shown now; `matched` is set once a stop string is complete."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _end, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return shown

    def flush(self) -> str:
        """Return what was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def text_pieces(tokens: Iterable[int], decoder: StreamingDecoder, matcher: StopMatcher) -> Iterator[str]:
    """Give text that is safe to show as the tokens come, up to their end or the first stop string."""
    for token in tokens:
        if shown := matcher.feed(decoder.feed(token)):
            yield shown
        if matcher.matched is not None:
            return
    if shown := matcher.feed(decoder.flush()) + matcher.flush():
        yield shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins, short of the whole."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
