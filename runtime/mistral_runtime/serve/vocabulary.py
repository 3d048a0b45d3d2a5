"""Our vocabulary in the shape that llguidance asks for."""

from __future__ import annotations

from mistral_runtime.tokenizer import Tokenizer


class Vocabulary:
    """The bytes of every token, and how text that a grammar forces is written in tokens."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        # Control tokens have no text, and <unk> stands for none: no grammar asks for them.
        self.special_token_ids = [
            token for token, text in enumerate(texts) if not text or tokenizer.piece(token) == "<unk>"
        ]
        special = set(self.special_token_ids)
        self.tokens = [
            tokenizer.piece(token).encode() if token in special else text for token, text in enumerate(texts)
        ]
        self._by_text = {text: token for token, text in enumerate(self.tokens) if token not in special}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of text in the middle of a sequence."""
        # sentencepiece puts a space in front of what it takes for a beginning; a line break first keeps it away.
        ids = self._tokenizer.encode("\n" + text, bos=False)
        lead = b""
        for count, token in enumerate(ids, start=1):
            lead += self.tokens[token]
            if lead in (b" \n", b"\n"):
                return ids[count:]
        # The vocabulary joins line breaks to what follows: then byte by byte, which every such vocabulary can.
        return [self._by_text[bytes([byte])] for byte in text.encode()]
