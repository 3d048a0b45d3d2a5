"""The turns so far, and how the next answer comes about.

Owns what the model is shown: system prompt, turns, settings. Knows nothing of how lines are read.
"""

from __future__ import annotations

import signal
from contextlib import suppress

from mistral_runtime.chat.options import ChatOptions
from mistral_runtime.chat.screen import Screen
from mistral_runtime.chat.settings import Settings
from mistral_runtime.engine import Request
from mistral_runtime.errors import BadRequest, Interrupted, PromptTooLong
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.prompt import ChatTemplate, Message
from mistral_runtime.session import Answer, Session, answer_tokens, stream_answer


class Conversation:
    """A conversation with one model; `turns` are pairs of question and answer.

    Args:
        context: Most tokens of prompt and answer together, None where a window bounds the cache.
        positions: How many the cache is made for.
    """

    def __init__(
        self,
        session: Session,
        template: ChatTemplate,
        options: ChatOptions,
        *,
        context: int | None,
        positions: int,
        interrupts: Interrupts,
        screen: Screen,
    ) -> None:
        self.system = options.system
        self.settings = Settings(options.sampling, options.max_tokens)
        self.turns: list[Message] = []
        self.last_question: str | None = None
        self._session = session
        self._template = template
        self._options = options
        self._context = context
        self._interrupts = interrupts
        self._screen = screen
        # Other ranks follow their own caches forwards only.
        self._cache = session.engine.conversation_cache(positions, may_rewind=session.ranks == 1)
        self._has_told_the_start = False

    def ask(self, question: str) -> None:
        """Answer a question on the screen, and remember both.

        Raises:
            RequestError: The question cannot be served; the conversation is as it was.
            Interrupted: A second signal, or one that means the whole program.
        """
        self._session.clock.leave_out()  # what went by was a person typing
        self.last_question = question
        asked = [*self.turns, Message("user", question)]
        prompt = self._template.encode([*self._opening(self.system), *asked])
        answer = self._answer(prompt, self._room_for(prompt))
        # A question without an answer would leave two questions in a row, which no template can write.
        if answer.text.strip():
            self.turns = [*asked, Message("assistant", answer.text.strip())]
        self._tell_the_start_once()
        self._say_how_it_went(answer)

    def undo(self) -> str:
        """Take back the last question and its answer, and return the question.

        Raises:
            BadRequest: There is none.
        """
        if not self.turns:
            raise BadRequest(
                "there is nothing to take back",
                detail="expected at least one question with an answer, found none",
                hint="ask something first",
            )
        question = self.turns[-2].content
        self.turns = self.turns[:-2]
        return question

    def retry(self) -> None:
        """Ask the last question again, its answer forgotten; if that fails, the answer is kept.

        Raises:
            RequestError: There is none, or it cannot be served.
        """
        if self.last_question is None:
            raise BadRequest(
                "there is nothing to ask again",
                detail="expected a question before /retry, found none",
                hint="ask something first",
            )
        kept = self.turns
        if kept and kept[-2].content == self.last_question:
            self.turns = kept[:-2]
        if self.settings.sampling.temperature == 0:
            self._screen.remark("(at temperature 0 the answer stays the same; /set temperature 0.7 makes it vary)")
        try:
            self.ask(self.last_question)
        finally:
            if len(self.turns) < len(kept):
                self.turns = kept

    def reset(self) -> None:
        """Forget every turn; the system prompt and the settings stay."""
        self.turns, self.last_question = [], None

    def set_system(self, text: str | None) -> None:
        """Change what stands before the first question.

        Raises:
            BadRequest: The template has no place for it.
        """
        self._template.encode([*self._opening(text), Message("user", "?")])
        self.system = text

    def replace(self, system: str | None, turns: list[Message]) -> None:
        """Go on from another conversation.

        Raises:
            BadRequest: It does not fit this model's template.
        """
        self._template.encode([*self._opening(system), *turns, Message("user", "?")])
        self.system, self.turns = system, turns
        self.last_question = turns[-2].content if turns else None

    def _opening(self, system: str | None) -> list[Message]:
        return [] if system is None else [Message("system", system)]

    def _room_for(self, prompt: list[int]) -> int:
        """Return the answer's largest length."""
        config = self._session.snapshot.config
        try:
            return answer_tokens(
                config, prompt_tokens=len(prompt), wanted=self.settings.max_tokens, context=self._context
            )
        except PromptTooLong as error:
            raise PromptTooLong(
                error.what,
                detail=error.detail,
                hint="/reset starts over and /undo takes back the last turn; else shorten the question"
                " or lower max_tokens, or begin again with a larger --context",
            ) from error

    def _answer(self, prompt: list[int], count: int) -> Answer:
        eos = frozenset({self._session.snapshot.tokenizer.eos_id})
        with self._interrupts.answering() as cancel:
            try:
                return stream_answer(
                    self._session,
                    Request(prompt, count, self.settings.sampling, eos, cancel),
                    stops=(*self._options.stops, *self._template.stop_strings),
                    strip_leading_space=True,
                    emit=self._screen.show,
                    cache=self._cache,
                )
            finally:
                with suppress(BrokenPipeError):  # the reader left; that error is under way already
                    self._screen.end()

    def _tell_the_start_once(self) -> None:
        if self._options.timings and not self._has_told_the_start:
            self._has_told_the_start = True
            self._screen.remark(self._session.clock.line())

    def _say_how_it_went(self, answer: Answer) -> None:
        if answer.finish_reason == "length":
            self._screen.remark("(cut off at the largest length; /set max_tokens or --max-tokens raises it)")
        elif answer.finish_reason == "interrupted":
            self._screen.remark("(stopped)")
            # Ctrl-C stops the answer; a request to terminate means the whole program.
            if self._interrupts.received not in (None, signal.SIGINT):
                raise Interrupted(self._interrupts.received or signal.SIGTERM)
        if self._options.wants_footer:
            self._screen.remark(self._footer(answer))

    def _footer(self, answer: Answer) -> str:
        limits = [n for n in (self._context, self._session.snapshot.config.context_limit) if n is not None]
        used = answer.prompt_tokens + answer.generated_tokens
        rate = answer.tokens_per_second
        parts = [f"{answer.generated_tokens} token{'s' * (answer.generated_tokens != 1)}"]
        parts += [] if rate is None else [f"{rate:.1f} tokens/s"]
        parts += [f"context {used:,} of {min(limits):,}" if limits else f"context {used:,}"]
        return " · ".join(parts)
