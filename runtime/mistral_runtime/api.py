"""The runtime as a library: load a directory once, then ask it from Python.

`from mistral_runtime import load`. Nothing here prints or handles signals; Ctrl-C raises KeyboardInterrupt as anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Request, check_context
from mistral_runtime.errors import BadRequest
from mistral_runtime.prompt import Message, require_template
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.scoring import all_logits, require_ids
from mistral_runtime.session import (
    DEFAULT_CHAT_CONTEXT,
    ComputeOptions,
    Session,
    answer_tokens,
    load_session,
    open_snapshot,
)
from mistral_runtime.text_stream import StopMatcher, StreamingDecoder, text_pieces
from mistral_runtime.tokenizer import Tokenizer

_ROLES = ("system", "user", "assistant")


def load(
    directory: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    chat_template: str = "auto",
    ignore_memory_plan: bool = False,
) -> Model:
    """Load a snapshot directory, after the checks and the memory plan of the command line.

    Args:
        directory: Weights, configuration and tokenizer, as `mistral-fetch pull` prints it.
        device: "auto", "cuda", "mps", "xpu" or "cpu".
        dtype: "auto", "bfloat16", "float16" or "float32".
        threads: CPU threads, for all of torch in this process; None takes as many as may run at once.
        context: Most tokens of prompt and answer together; None is the model's own limit. Memory is planned for this
            many, or for 8,192 where there is neither this nor a sliding window.
        chat_template: "auto", "v1", "v3", "demo" or "none".
        ignore_memory_plan: Load even if the plan does not fit.

    Raises:
        MistralRuntimeError: One of its kinds, with three lines: what, expected and found, what to do next.
    """
    snapshot = open_snapshot(Path(directory), chat_template=chat_template)
    limit = snapshot.config.context_limit
    planned = context or min(limit or snapshot.config.max_position_embeddings, DEFAULT_CHAT_CONTEXT)
    options = ComputeOptions(device, dtype, threads, ignore_memory_plan, graphs=True)
    session = load_session(snapshot, options, positions=planned, context=context, report=_ignore)
    return Model(session, context=context)


class Model:
    """A loaded model. Answers one question at a time; start another only when the first is read to its end.

    Attributes:
        tokenizer: Text to ids and back: `tokenizer.encode(text)`, `tokenizer.decode(ids)`, `tokenizer.piece(id)`.
        config: The model's sizes, by Mistral's names.
    """

    def __init__(self, session: Session, *, context: int | None) -> None:
        self.tokenizer: Tokenizer = session.snapshot.tokenizer
        self.config: ModelConfig = session.snapshot.config
        self._session = session
        self._context = context

    def generate(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continue `text` as it is, whatever the model, and give the continuation piece by piece.

        Args:
            max_tokens: Longest answer; None is 256, or the room left.
            stop: End before any of these texts.
            temperature: 0 takes the likeliest token every time. The other settings are as in `SamplingParams`.

        Raises:
            RequestError: At once and not at the first piece: a setting out of range, or a prompt too long.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        ids = self.tokenizer.encode(text)
        return self._stream(ids, max_tokens, stop, params, strip_leading_space=False)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer the last of `messages`, each {"role": "system" | "user" | "assistant", "content": text}.

        The other arguments are those of `generate`.

        Raises:
            NoChatTemplate: A base model.
            RequestError: Another thing that cannot be served, at once and not at the first piece.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        template = require_template(self._session.snapshot.template, self.tokenizer)
        ids = template.encode([_message(message) for message in messages])
        return self._stream(ids, max_tokens, (*_texts(stop), *template.stop_strings), params, strip_leading_space=True)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits after each of the T `ids`, (T, V), float32 on the CPU; row t expects token t + 1.

        Raises:
            BadRequest: No ids, or some that the vocabulary does not have.
            PromptTooLong: More of them than the context.
            NonFiniteLogits: The model computed NaN or infinity.
        """
        require_ids(ids, self.config.vocab_size)
        # One less, since the check counts an answer of one token, which is not computed with here.
        check_context(self.config, prompt_tokens=max(1, len(ids) - 1), max_new_tokens=1, context=self._context)
        return all_logits(self._session.engine.model, ids)

    def _stream(
        self,
        ids: list[int],
        max_tokens: int | None,
        stop: Sequence[str],
        params: SamplingParams,
        *,
        strip_leading_space: bool,
    ) -> Iterator[str]:
        matcher = StopMatcher(_texts(stop))
        count = answer_tokens(self.config, prompt_tokens=len(ids), wanted=max_tokens, context=self._context)
        request = Request(ids, count, params, frozenset({self.tokenizer.eos_id}))
        decoder = StreamingDecoder(self.tokenizer, strip_leading_space=strip_leading_space)
        return text_pieces(self._session.engine.generate(request), decoder, matcher)


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    # A lone string is a sequence of its letters, and would stop at every one of them.
    if isinstance(stop, str) or "" in stop:
        raise BadRequest(
            "stop is not a list of texts",
            detail=f"expected texts of at least one character, found {stop!r}",
            hint='write stop=["…"], or leave it out',
        )
    return tuple(stop)


def _message(message: Mapping[str, str]) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or not isinstance(content, str) or len(message) != 2:
        raise BadRequest(
            "this is no message",
            detail=f"expected a role ({', '.join(_ROLES)}) and a text as content, found {dict(message)!r}",
            hint='write {"role": "user", "content": "…"}',
        )
    return Message(role, content)  # type: ignore[arg-type]


def _ignore(_text: str) -> None:
    """Show nothing."""
