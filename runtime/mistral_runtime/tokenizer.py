"""Text to token ids and back, with the sentencepiece model that the snapshot holds.

Owns the vocabulary file; knows nothing of prompts or turns. What a token contributes to running text is told
in bytes, since a character outside the vocabulary is spread over several byte tokens.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from mistral_runtime.errors import BadRequest, MalformedTokenizer
from mistral_runtime.strict_json import require_regular_file

MAX_TOKENIZER_BYTES = 64 << 20  # Mistral's are 0.5 MB
_HINT = "verify the snapshot, or fetch it again"
_SPACE_MARK = "▁"
_UNKNOWN_TEXT = " ⁇ "  # what sentencepiece itself shows for <unk>


class Tokenizer:
    """A sentencepiece vocabulary with Mistral's conventions: BOS in front of every sequence, EOS ends an answer."""

    def __init__(self, path: Path) -> None:
        size = require_regular_file(path, hint=_HINT)
        if size > MAX_TOKENIZER_BYTES:
            raise MalformedTokenizer(
                f"{path} is too large", detail=f"expected at most {MAX_TOKENIZER_BYTES} bytes, found {size}", hint=_HINT
            )
        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise MalformedTokenizer(
                f"{path} is not a sentencepiece model", detail=f"expected a vocabulary, found: {error}", hint=_HINT
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        # A piece is written in the characters that it stands for; "<0x0A>" and control tokens only make it longer.
        self._longest = max(map(len, map(self._model.id_to_piece, range(self.vocab_size))))
        if self.bos_id < 0 or self.eos_id < 0:
            raise MalformedTokenizer(
                f"{path} lacks the tokens that mark begin and end",
                detail=f"expected ids of 0 or more, found {self.bos_id} and {self.eos_id}",
                hint=_HINT,
            )

    def require_vocab_size(self, expected: int) -> None:
        """Raise MalformedTokenizer unless the model's vocabulary has as many entries as this one."""
        if self.vocab_size != expected:
            raise MalformedTokenizer(
                f"{self.path} does not belong to this model",
                detail=f"expected the configuration's vocab_size {expected}, found {self.vocab_size} pieces",
                hint=_HINT,
            )

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of `text`, with BOS in front unless told otherwise. Control tokens are never read from text.

        Raises:
            BadRequest: The text holds lone surrogates: bytes that were not UTF-8 when it was typed.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRequest(
                "the prompt is not valid UTF-8",
                detail=f"expected text, found an undecodable byte at character {error.start}",
                hint="save the prompt as UTF-8, or check the locale of this terminal",
            ) from error
        ids: list[int] = self._model.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of a whole sequence, by sentencepiece's own rules."""
        text: str = self._model.decode(ids)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token adds to running text, as UTF-8 bytes, possibly part of a character."""
        if self._model.is_control(token_id):
            return b""
        if self._model.is_unknown(token_id):
            return _UNKNOWN_TEXT.encode()
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # "<0xE2>"
        return piece.replace(_SPACE_MARK, " ").encode()

    def piece(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it: "▁hill", "<0x0A>", "</s>"."""
        piece: str = self._model.id_to_piece(token_id)
        return piece

    def longest_piece(self) -> int:
        """Return how many characters of text the longest token stands for."""
        return self._longest

    def begins_word(self, token_id: int) -> bool:
        """Say whether the token is written with a space in front; a space that is a byte token is not."""
        piece: str = self._model.id_to_piece(token_id)
        return piece.startswith(_SPACE_MARK)
