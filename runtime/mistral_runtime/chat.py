"""The `chat` command: a line in, an answer out, until the input ends.

Plain on purpose: it works in a terminal and in a pipe alike. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from mistral_runtime.engine import Request
from mistral_runtime.errors import Interrupted, RequestError
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.prompt import ChatTemplate, Message, require_template
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.session import (
    DEFAULT_CHAT_CONTEXT,
    ComputeOptions,
    Session,
    answer_tokens,
    load_session,
    open_snapshot,
    stream_answer,
)
from mistral_runtime.startup import StartClock
from mistral_runtime.terminal import MAX_PROMPT_BYTES, decode_input, write_err, write_out

HELP = "/reset starts over, /quit or the end of input leaves, Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatOptions:
    """What the command line asked for."""

    directory: Path
    sampling: SamplingParams
    compute: ComputeOptions
    max_tokens: int | None = None
    context: int | None = None
    chat_template: str = "auto"
    system: str | None = None
    stops: tuple[str, ...] = field(default_factory=tuple)
    quiet: bool = False
    timings: bool = False
    clock: StartClock = field(default_factory=StartClock)


def run_chat(options: ChatOptions, interrupts: Interrupts) -> int:
    """Hold a conversation on the standard streams and return the exit code.

    Raises:
        NoChatTemplate: A base model, found before its weights are looked at.
        MistralRuntimeError: Any other failure that has three lines to show.
        Interrupted: A signal while no answer was under way.
    """
    snapshot = open_snapshot(options.directory, chat_template=options.chat_template)
    options.clock.mark("snapshot")
    template = require_template(snapshot.template, snapshot.tokenizer)
    options.clock.mark("prompt")
    context = options.context
    if context is None and snapshot.config.context_limit is not None:
        context = min(snapshot.config.context_limit, DEFAULT_CHAT_CONTEXT)
    loaded = load_session(
        snapshot,
        options.compute,
        positions=context or snapshot.config.max_position_embeddings,
        context=context,
        report=_ignore if options.quiet else write_err,
        clock=options.clock,
    )
    with closing(loaded) as session:
        if not options.quiet:
            write_err(HELP)
        return Conversation(session, template, options, context, interrupts).run()


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(
        self,
        session: Session,
        template: ChatTemplate,
        options: ChatOptions,
        context: int | None,
        interrupts: Interrupts,
    ) -> None:
        self._session = session
        self._template = template
        self._options = options
        self._context = context
        self._interrupts = interrupts
        self._opening = [] if options.system is None else [Message("system", options.system)]
        self._history: list[Message] = list(self._opening)
        self._has_told_the_start = False

    def run(self) -> int:
        """Read lines until the end of input or /quit. A question that cannot be served ends itself, not the chat."""
        while True:
            if sys.stdin.isatty():
                sys.stderr.write("> ")
                sys.stderr.flush()
            line = sys.stdin.buffer.readline(MAX_PROMPT_BYTES)
            if not line:
                return 0
            try:
                question = decode_input(line).strip()
                if question == "/quit":
                    return 0
                if question == "/reset":
                    self._history = list(self._opening)
                    write_err("the conversation starts over")
                elif question:
                    self._answer(question)
            except RequestError as error:
                write_err(str(error))

    def _answer(self, question: str) -> None:
        self._session.clock.leave_out()  # what went by was a person typing
        asked = [*self._history, Message("user", question)]
        prompt = self._template.encode(asked)
        config = self._session.snapshot.config
        count = answer_tokens(config, prompt_tokens=len(prompt), wanted=self._options.max_tokens, context=self._context)
        eos = frozenset({self._session.snapshot.tokenizer.eos_id})
        with self._interrupts.answering() as cancel:
            answer = stream_answer(
                self._session,
                Request(prompt, count, self._options.sampling, eos, cancel),
                stops=(*self._options.stops, *self._template.stop_strings),
                strip_leading_space=True,
                emit=write_out,
            )
        write_out("" if answer.text.endswith("\n") else "\n")
        self._tell_the_start_once()
        # A question without an answer would leave two questions in a row, which no template can write.
        if answer.text.strip():
            self._history = [*asked, Message("assistant", answer.text.strip())]
        self._say_how_it_ended(answer.finish_reason)

    def _tell_the_start_once(self) -> None:
        if self._options.timings and not self._has_told_the_start:
            self._has_told_the_start = True
            write_err(self._session.clock.line())

    def _say_how_it_ended(self, finish_reason: str) -> None:
        if finish_reason == "length":
            write_err("(cut off at the largest length; --max-tokens raises it)")
        elif finish_reason == "interrupted":
            write_err("(stopped)")
            # Ctrl-C stops the answer; a request to terminate means the whole program.
            if self._interrupts.received not in (None, signal.SIGINT):
                raise Interrupted(self._interrupts.received or signal.SIGTERM)


def _ignore(_text: str) -> None:
    """Show nothing."""
