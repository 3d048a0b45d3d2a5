"""Answers that have to match a grammar: which tokens may come next, by llguidance.

Owns the way from a request's grammar to masks over our vocabulary. Building a grammar can take a good part of a second
and a mask a good part of a millisecond, so both happen on threads of their own while the model computes; llguidance
lets go of the interpreter meanwhile. Its limits bound what a hostile grammar can cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mistral_runtime.errors import BadRequest, MistralRuntimeError
from mistral_runtime.serve.protocol import Grammar
from mistral_runtime.serve.vocabulary import Vocabulary
from mistral_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_GRAMMAR_BYTES = 256 << 10
MAX_JSON_DEPTH = 64
MAX_CHOICES = 1000
# Between two elements: nothing, a space, or a line break and its indentation. Without a bound a model that likes
# blanks never comes to the point.
_JSON_BLANKS = r"( |\n {0,24})?"
_BITS = torch.arange(8, dtype=torch.uint8)
_HINT = "correct the grammar; see the documentation of llguidance for what is understood"


def grammar_source(grammar: Grammar) -> str:
    """Return the grammar in llguidance's own form.

    Raises:
        BadRequest: Too long, or its text is not what its kind says.
    """
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise _refused(grammar, f"expected at most {MAX_GRAMMAR_BYTES} bytes, found {size}")
    if any("\ud800" <= character <= "\udfff" for character in grammar.text):
        raise _refused(grammar, "expected text that UTF-8 can hold, found half of a surrogate pair")
    from llguidance import LLMatcher

    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type":"object"}', overrides={"whitespace_pattern": _JSON_BLANKS})
    if grammar.kind == "json_schema":
        schema = _parsed(grammar)
        if not isinstance(schema, dict | bool):
            raise _refused(grammar, f"expected a JSON object, found {type(schema).__name__}")
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        schema.pop("x-guidance", None)  # would override our own options
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _JSON_BLANKS})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_lark(_choice(grammar))
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    raise _refused(grammar, f"expected json_schema, json_object, regex, lark or choice, found {grammar.kind!r}")


def _choice(grammar: Grammar) -> str:
    texts = _parsed(grammar)
    if (
        not isinstance(texts, list)
        or not 1 <= len(texts) <= MAX_CHOICES
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise _refused(grammar, f"expected a JSON list of 1 to {MAX_CHOICES} texts, none empty")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _parsed(grammar: Grammar) -> object:
    try:
        value: object = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise _refused(grammar, f"expected JSON, found: {type(error).__name__}: {error}") from error
    if _depth(value) > MAX_JSON_DEPTH:
        raise _refused(grammar, f"expected at most {MAX_JSON_DEPTH} levels, found more")
    return value


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        depth += 1
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for item in inner if isinstance(item, list) for child in item]
    return depth


def _refused(grammar: Grammar, detail: str) -> BadRequest:
    return BadRequest(f"the {str(grammar.kind)[:20]} grammar is refused", detail=detail, hint=_HINT)


def _as_refusal(grammar: Grammar, error: BaseException) -> MistralRuntimeError:
    """Return what to say of a grammar that was not built: a panic of llguidance's ends no more than its own answer."""
    if isinstance(error, MistralRuntimeError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return BadRequest(
            "grammars are not available here",
            detail=f"expected the package llguidance, found: {error}",
            hint='install it on the server: pip install "mistral-fetch[serve]"',
        )
    return _refused(grammar, f"expected what llguidance can build, found: {type(error).__name__}: {str(error)[:200]}")


class Constraint:
    """Where one answer is in its grammar.

    Attributes:
        is_complete: Whether nothing can follow.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, worker: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._worker = worker
        # Asked for beforehand: while a mask is computed the matcher raises at every other call.
        self.is_complete = matcher.is_stopped()
        self._next: Future[bytes] = worker.submit(matcher.compute_bitmask)

    def mask(self) -> Tensor:
        """Return which ids may come next, (V) of bool; it was begun when the last one came.

        Raises:
            BadRequest: A limit was reached.
        """
        packed = self._next.result()
        if self._matcher.is_error():
            raise self._broken()
        packed_bits = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        bits = (packed_bits[:, None] >> _BITS) & 1  # the lowest bit of each byte comes first
        return bits.flatten()[: self._vocab_size].bool()

    def advance(self, token: int) -> None:
        """Take in a token that the mask allowed, and begin with the next mask.

        Raises:
            BadRequest: A limit was reached.
        """
        if not self._matcher.consume_token(token):
            raise self._broken()
        self.is_complete = self._matcher.is_stopped()
        if not self.is_complete:
            self._next = self._worker.submit(self._matcher.compute_bitmask)

    def _broken(self) -> BadRequest:
        return BadRequest(
            "the grammar cannot be followed any further",
            detail=f"expected a next token within llguidance's limits, found: {self._matcher.get_error()}",
            hint="make the grammar simpler",
        )


class Constraints:
    """Build grammars over one vocabulary, on a thread apart from that of the masks, which must not wait for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._source = tokenizer
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._masker = ThreadPoolExecutor(1, thread_name_prefix="mask")
        self._tokenizer: LLTokenizer | None = None

    def compile(self, grammar: Grammar, done: Callable[[Constraint | MistralRuntimeError], None]) -> None:
        """Build a grammar on the other thread, which then calls `done`, whatever came of it."""

        def tell(built: Future[Constraint]) -> None:
            if not built.cancelled():
                error = built.exception()
                done(built.result() if error is None else _as_refusal(grammar, error))

        self._builder.submit(self._compiled, grammar).add_done_callback(tell)

    def _compiled(self, grammar: Grammar) -> Constraint:
        source = grammar_source(grammar)
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._tokenizer is None:
            vocabulary = cast("TokenizerWrapper", Vocabulary(self._source))
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=self._vocab_size)
        limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(grammar, f"expected a grammar, found: {matcher.get_error()}")
        return Constraint(matcher, self._vocab_size, self._masker)

    def close(self) -> None:
        """End the threads."""
        for worker in (self._builder, self._masker):
            worker.shutdown(wait=False, cancel_futures=True)
