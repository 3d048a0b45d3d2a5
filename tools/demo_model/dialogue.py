"""Turn conversations into token ids: the prompt format of the demo model, and its tokenizer.

Owns the exact text between turns. A prompt is BOS and then, as one string, `Q: question`, a newline, `A:`; the answer
follows after a space and ends with EOS. In a later turn the earlier answer ends with a newline instead:

    Q: first question\\nA: first answer\\nQ: second question\\nA:
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sentencepiece

UNK, BOS, EOS = 0, 1, 2
_SPACE_PIECE = "\u2581"


@dataclass(frozen=True)
class Turn:
    """A question as typed, and the answer expected; in training perhaps only its first `spoken` tokens."""

    question: str
    answer: str
    spoken: int | None = None


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation, with the label of each position's next token and its weight in the loss."""

    tokens: list[int]
    labels: list[int]
    weights: list[float]


def prompt_text(turns: Sequence[Turn], question: str) -> str:
    """Return the text after which the model answers the question."""
    past = "".join(f"Q: {turn.question}\nA: {turn.answer}\n" for turn in turns)
    return f"{past}Q: {question}\nA:"


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> bytes:
    """Return a SentencePiece model in Mistral's manner: BPE, byte fallback, split digits, no pad, text untouched."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,  # more threads may count merges in another order, and the file must not change
        minloglevel=2,
    )
    return model.getvalue()


class Dialogue:
    """Encodes conversations with one tokenizer."""

    def __init__(self, model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._space = self.processor.piece_to_id(_SPACE_PIECE)
        self._answers: dict[str, list[int]] = {}

    def encode_prompt(self, turns: Sequence[Turn], question: str) -> list[int]:
        """Return the token ids of the prompt, BOS first."""
        return [BOS, *self.processor.encode(prompt_text(turns, question))]

    def encode_answer(self, answer: str) -> list[int]:
        """Return the token ids of ` answer`; SentencePiece itself puts the space before it."""
        if answer not in self._answers:
            self._answers[answer] = self.processor.encode(answer)
        return self._answers[answer]

    def example(self, turns: Sequence[Turn], question_weight: float) -> Example:
        """Return the conversation as one training example.

        Every answer is labelled to end in EOS, as at inference; only the text of the next turn shows a newline there.
        One that is cut short ends with the label of its next token.

        Args:
            turns: The conversation, one turn or more.
            question_weight: Weight in the loss of the tokens that the user types.
        """
        tokens, labels, weights = [BOS], [], []
        for number, turn in enumerate(turns):
            asked = self._encode_question(turn.question, is_first=number == 0)
            whole = [*self.encode_answer(turn.answer), EOS]
            told = whole[: len(whole) if turn.spoken is None else turn.spoken + 1]
            # The last label of an answer is never fed: the newline that opens the following turn comes in its place,
            # and that newline is nobody's label.
            targets = asked if number == 0 else asked[1:]
            labels += [*targets, *told]
            weights += [question_weight] * len(targets) + [1.0] * len(told)
            tokens += [*asked, *told[:-1]]
        return Example(tokens, labels, weights)

    def _encode_question(self, question: str, is_first: bool) -> list[int]:
        head = self.processor.encode("Q:") if is_first else self._inside("\nQ:")
        body = self.processor.encode(question)
        return [*head, *body, *self._inside("\nA:")]

    def _inside(self, text: str) -> list[int]:
        """Encode text as it is encoded in the middle of a string: without the leading space piece."""
        ids: list[int] = self.processor.encode(text)
        return ids[1:] if ids[0] == self._space else ids


def encode_rows(examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Pad examples to one length; padding has weight zero."""
    length = max(len(example.tokens) for example in examples)
    tokens = [example.tokens + [EOS] * (length - len(example.tokens)) for example in examples]
    labels = [example.labels + [EOS] * (length - len(example.labels)) for example in examples]
    weights = [example.weights + [0.0] * (length - len(example.weights)) for example in examples]
    return tokens, labels, weights
