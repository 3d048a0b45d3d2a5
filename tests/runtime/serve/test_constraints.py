"""Answers that have to match a grammar do, and a bad grammar is refused with what is wrong with it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Semaphore

import pytest

pytest.importorskip("llguidance")

from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.constraints import MAX_GRAMMAR_BYTES, Constraint, Constraints
from mistral_runtime.serve.protocol import Cancel, Generate, Grammar
from mistral_runtime.serve.vocabulary import Vocabulary
from mistral_runtime.session import ComputeOptions, load_session, open_snapshot
from mistral_runtime.tokenizer import Tokenizer
from mistral_runtime.transformer import Transformer

from .conftest import DEMO
from .loops import TestLoop

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bernd"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo() -> Transformer:
    options = ComputeOptions(threads=1, dtype="float32", lookup="off")
    snapshot = open_snapshot(DEMO, chat_template="auto")
    session = load_session(snapshot, options, positions=512, context=None, report=lambda _line: None)
    return session.engine.model


@pytest.fixture
def loop(demo: Transformer, demo_tokenizer: Tokenizer):
    constraints = Constraints(demo_tokenizer)
    yield TestLoop(demo, context=512, constraints=constraints, eos_id=demo_tokenizer.eos_id, lookup="on")
    constraints.close()


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def ask(loop: TestLoop, tokenizer: Tokenizer, grammar: Grammar, **changes) -> tuple[str, str]:
    prompt = tokenizer.encode("Q: Who is there?\nA:")
    request = Generate("a", prompt, changes.pop("max_new_tokens", 400), grammar=grammar, **changes)
    loop.put(request)
    loop.until_idle()
    end = loop.finished("a")
    return text_of(tokenizer, loop.tokens("a")), end.reason if end.error is None else end.error["detail"]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_an_answer_is_json_that_fits_the_schema(loop: TestLoop, demo_tokenizer: Tokenizer, seed: int | None) -> None:
    sampling = SamplingParams() if seed is None else SamplingParams(1.5, seed=seed)
    text, reason = ask(loop, demo_tokenizer, Grammar("json_schema", json.dumps(SCHEMA)), sampling=sampling)
    assert reason == "stop"
    value = json.loads(text)
    assert value["name"] in ("Ann", "Bernd")
    assert 0 <= value["age"] <= 150
    assert all(isinstance(liked, bool) for liked in value["likes"])


@pytest.mark.parametrize(
    "grammar, pattern",
    [
        (Grammar("regex", "[0-9]{3}-[a-f]{2}"), "[0-9]{3}-[a-f]{2}"),
        (Grammar("choice", '["yes", "no", "\\"maybe\\" ü\\n"]'), 'yes|no|"maybe" ü\n'),
        (Grammar("lark", 'start: "<" WORD ">"\nWORD: /[a-z]{1,8}/'), "<[a-z]{1,8}>"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_an_answer_matches(loop: TestLoop, demo_tokenizer: Tokenizer, grammar: Grammar, pattern: str) -> None:
    text, reason = ask(loop, demo_tokenizer, grammar, sampling=SamplingParams(1.0, seed=4))
    assert re.fullmatch(pattern, text)
    assert reason == "stop"


def test_an_object_is_one_even_when_it_is_cut(loop: TestLoop, demo_tokenizer: Tokenizer) -> None:
    text, reason = ask(loop, demo_tokenizer, Grammar("json_object", ""), max_new_tokens=5)
    assert reason in ("length", "stop")
    assert text.startswith("{")


def test_a_grammar_may_end_before_it_has_to(loop: TestLoop, demo_tokenizer: Tokenizer) -> None:
    eos = demo_tokenizer.eos_id
    text, reason = ask(loop, demo_tokenizer, Grammar("regex", "a{2,50}"), logit_bias=[(eos, 100.0)])
    assert (text, reason) == ("aa", "stop")  # the end is not part of it, and does not come before it may


BAD = {
    "regex": (Grammar("regex", "["), "unclosed"),
    "schema": (Grammar("json_schema", '{"type":"strin"}'), "Invalid type"),
    "no json": (Grammar("json_schema", "{"), "expected JSON"),
    "no schema": (Grammar("json_schema", "[1]"), "expected a JSON object"),
    "deep": (Grammar("json_schema", '{"not":' * 70 + "{}" + "}" * 70), "levels"),
    "very deep": (Grammar("json_schema", "[" * 100_000), "expected JSON"),
    "remote": (Grammar("json_schema", '{"$ref":"http://127.0.0.1:1/x"}'), "does not fetch"),
    "lark": (Grammar("lark", 'start: "a" | other'), "unknown name"),
    "no choice": (Grammar("choice", "[]"), "1 to 1000"),
    "empty choice": (Grammar("choice", '[""]'), "none empty"),
    "long": (Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1)), "bytes"),
    "half a pair": (Grammar("regex", "\ud800"), "surrogate"),
    "half a pair, escaped": (Grammar("choice", '["\\ud800"]'), "expected what llguidance can build"),
    "kind": (Grammar("xml", "a"), "found 'xml'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("grammar, message", BAD.values(), ids=BAD)
def test_a_bad_grammar_is_refused_by_what_is_wrong(
    loop: TestLoop, demo_tokenizer: Tokenizer, grammar: Grammar, message: str
) -> None:
    text, detail = ask(loop, demo_tokenizer, grammar)
    assert text == ""
    assert message in detail


class BusyMatcher:
    """Like llguidance's: while a mask is computed, no other call is allowed."""

    def __init__(self) -> None:
        self.go_on = Semaphore(0)
        self._busy = Lock()

    def compute_bitmask(self) -> bytes:
        with self._busy:
            self.go_on.acquire(timeout=10)  # so that a failure ends
        return b"\xff"

    def is_stopped(self) -> bool:
        assert self._busy.acquire(blocking=False), "Already mutably borrowed"
        self._busy.release()
        return False

    is_error = is_stopped

    def consume_token(self, token: int) -> bool:
        return not self.is_stopped()


def test_nothing_is_asked_of_a_matcher_that_computes_a_mask() -> None:
    matcher = BusyMatcher()
    with ThreadPoolExecutor(1) as worker:
        constraint = Constraint(matcher, 8, worker)  # type: ignore[arg-type]
        for token in range(2):
            assert not constraint.is_complete
            matcher.go_on.release()
            assert constraint.mask().all()
            constraint.advance(token)
        assert not constraint.is_complete
        matcher.go_on.release()


def test_others_go_on_while_a_grammar_is_built(loop: TestLoop, demo_tokenizer: Tokenizer) -> None:
    prompt = demo_tokenizer.encode("Q: Who")
    loop.put(Generate("cancelled", prompt, 5, grammar=Grammar("regex", "a+")), Generate("plain", prompt, 5))
    loop.put(Cancel("cancelled"))
    loop.until_idle()
    assert loop.finished("plain").reason == "length"
    assert loop.finished("cancelled").reason == "cancelled"
    assert loop.tokens("cancelled") == []


def test_forced_text_is_cut_as_in_the_middle_of_a_sequence(demo_tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(demo_tokenizer)
    for text in ('{"name"', " the", "the", "\n\n x", "ü", ""):
        ids = vocabulary(text)
        assert b"".join(vocabulary.tokens[token] for token in ids) == text.encode(), text
    assert {demo_tokenizer.bos_id, demo_tokenizer.eos_id} <= set(vocabulary.special_token_ids)
    assert len(vocabulary.tokens) == demo_tokenizer.vocab_size
