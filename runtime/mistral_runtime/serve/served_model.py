"""The model as the HTTP process knows it: names, vocabulary, template and limits. No weights, and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_runtime.prompt import resolve_template
from mistral_runtime.serve.api_error import ApiError, bad_request
from mistral_runtime.serve.chat_prompt import ChatPrompt
from mistral_runtime.serve.threads import in_thread
from mistral_runtime.snapshot import declared_chat_template, declared_licence, find_tokenizer, find_weights, load_config
from mistral_runtime.tokenizer import Tokenizer

_SHORT_CHARACTERS = 4096


@dataclass(frozen=True)
class ServedModel:
    """What requests are read with. `chat` is None for a base model, `licence` where nobody said."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    chat: ChatPrompt | None
    created: int
    licence: str | None = None

    def require_name(self, name: str | None) -> str:
        """Return the name to answer with: the one asked for, or the first where none was.

        Raises:
            ApiError: 404, no such model.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            message = f"the model {name[:120]!r} is not served here; expected {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def require_chat(self) -> ChatPrompt:
        """Return how turns are written.

        Raises:
            ApiError: A base model.
        """
        if self.chat is None:
            raise bad_request(
                "this is a base model: it continues text and has no chat template; use /v1/completions, or start the "
                "server with --chat-template",
                code="no_chat_template",
            )
        return self.chat

    async def encode(self, text: str, *, context: int, bos: bool = True) -> list[int]:
        """Return the ids of a text, refusing at once what cannot fit however it is cut into tokens.

        Raises:
            ApiError: It has more than `context` tokens for certain.
        """
        if len(text) <= _SHORT_CHARACTERS:
            return self.tokenizer.encode(text, bos=bos)
        refuse_hopeless(len(text), self.tokenizer, context)
        return await in_thread(lambda: self.tokenizer.encode(text, bos=bos))


def refuse_hopeless(characters: int, tokenizer: Tokenizer, context: int) -> None:
    """Raise for a text so long that even the longest tokens would not make it fit: counting takes seconds.

    Raises:
        ApiError: It is too long.
    """
    at_least = characters // tokenizer.longest_piece()
    if at_least > context:
        raise context_exceeded(context, prompt=at_least, answer=None, at_least=True)


def context_exceeded(context: int, *, prompt: int, answer: int | None, at_least: bool = False) -> ApiError:
    """Return the error for a prompt that leaves no room, or not the room that was asked for."""
    asked = f"the prompt has {'at least ' if at_least else ''}{prompt} tokens"
    if answer is not None:
        asked += f" and the answer may have {answer}, {prompt + answer} together"
    return bad_request(
        f"this model's maximum context length is {context} tokens, but {asked}; nothing is cut off unasked",
        param=None if answer is None else "max_tokens",
        code="context_length_exceeded",
    )


def room_for_answer(context: int, prompt: Sequence[int], wanted: int | None) -> int:
    """Return how long the answer may get: as asked, or all that is left.

    Raises:
        ApiError: It does not fit.
    """
    left = context - len(prompt)
    if wanted is not None and wanted > left:
        raise context_exceeded(context, prompt=len(prompt), answer=wanted)
    if wanted is None and left < 1:
        raise context_exceeded(context, prompt=len(prompt), answer=None)
    return left if wanted is None else wanted


def open_model(directory: Path, *, chat_template: str, names: tuple[str, ...], created: int) -> ServedModel:
    """Read a snapshot's small files.

    Raises:
        CheckpointError: The directory is incomplete or not understood.
    """
    config = load_config(directory, find_weights(directory).layout)
    tokenizer = Tokenizer(find_tokenizer(directory))
    tokenizer.require_vocab_size(config.vocab_size)
    template = resolve_template(chat_template, declared=declared_chat_template(directory), tokenizer=tokenizer)
    chat = None if template is None else ChatPrompt(template, tokenizer)
    return ServedModel(names, tokenizer, chat, created, declared_licence(directory))
