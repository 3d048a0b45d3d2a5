"""An engine loop without a process, for tests: messages in, what was told out, one turn at a time."""

from __future__ import annotations

from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from mistral_runtime.engine import Engine, Request
from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.lookup import LookupMode
from mistral_runtime.serve.caches import SERVING_SLACK, CacheMaker
from mistral_runtime.serve.constraints import Constraints
from mistral_runtime.serve.engine_loop import EngineLoop, Inbox
from mistral_runtime.serve.protocol import Finished, Generate, Message, Stats, Step, decode_line, encode_line
from mistral_runtime.serve.scheduler import Limits
from mistral_runtime.transformer import Transformer

LIMITS = Limits(cache_positions=4096, max_running=8, prefill_chunk=8, prefill_alone=32)


class TestLoop:
    """A loop and everything it told."""

    __test__ = False

    def __init__(
        self,
        model: Transformer,
        *,
        context: int = 256,
        lookup: LookupMode = "off",
        constraints: Constraints | None = None,
        eos_id: int | None = 2,
        static: StaticStep | None = None,
        **limits: Any,
    ) -> None:
        self.told: list[Message] = []
        self._inbox: Inbox = SimpleQueue()
        self.loop = EngineLoop(
            replace(LIMITS, **limits),
            CacheMaker(model, context, SERVING_SLACK, static),
            inbox=self._inbox,
            emit=self._tell,
            lookup=lookup,
            constraints=constraints,
            eos_id=eos_id,
        )

    def _tell(self, message: Message) -> None:
        assert decode_line(encode_line(message)) == message  # what cannot be said to the other process is no answer
        self.told.append(message)

    def put(self, *messages: Message) -> None:
        """Let messages arrive before the next turn."""
        for message in messages:
            self._inbox.put(message)

    def turns(self, count: int) -> None:
        """Compute some steps."""
        for _ in range(count):
            self.loop.turn(wait=False)

    def until_idle(self) -> None:
        """Compute until everything is answered."""
        self.turns(1)
        while not self.loop.is_idle:
            self.loop.turn(wait=self.loop.has_nothing_to_compute)

    def tokens(self, key: str) -> list[int]:
        """Return the answer so far."""
        steps = [message for message in self.told if isinstance(message, Step)]
        return [token.token for step in steps for token in step.tokens if token.id == key]

    def finished(self, key: str) -> Finished:
        """Return how an answer ended; exactly once."""
        (found,) = [message for message in self.told if isinstance(message, Finished) and message.id == key]
        return found

    def stats(self) -> Stats:
        """Return the latest."""
        return [message for message in self.told if isinstance(message, Stats)][-1]


def alone(model: Transformer, request: Generate) -> list[int]:
    """Return the tokens that the single engine gives."""
    wanted = Request(request.prompt, request.max_new_tokens, request.sampling, frozenset(request.stop_ids))
    return list(Engine(model).generate(wanted))
