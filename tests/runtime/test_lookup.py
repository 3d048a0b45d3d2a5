"""Guessing ahead: which tokens are proposed, how many, and that an answer is the same with and without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.engine import Engine, Request, eager_step
from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.lookup import MAX_DRAFT, DraftPace, PromptLookup
from mistral_runtime.reference import reference_generate
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]
PROMPT = [1, 17, 42, 5, 99, 17, 42, 5]


def _load(directory: Path) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Transformer:
    directory = tmp_path_factory.mktemp("snapshot")
    write_snapshot(directory)
    return _load(directory)


# --- the guess --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),
        ([1, 2, 3, 7, 0, 1, 2, 3, 8, 0, 1, 2, 3], [8, 0, 1, 2]),  # of equals the more recent
        ([9, 1, 2, 3, 7, 0, 5, 1, 2, 3, 8, 0, 9, 1, 2, 3], [7, 0, 5, 1]),  # but the longer before the more recent
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a match that overlaps the end goes round
        ([5, 5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 9, 1, 2], []),  # two tokens are no match
        ([1, 2, 3], []),  # the end does not match itself
        ([], []),
    ],
)
def test_the_longest_recent_match_is_continued(ids: list[int], expected: list[int]) -> None:
    assert PromptLookup(ids).propose(4) == expected
    assert PromptLookup(ids).propose(2) == expected[:2]
    assert PromptLookup(ids).propose(0) == []


def test_the_index_finds_what_a_plain_search_finds() -> None:
    ids = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    index = PromptLookup()
    for end, token in enumerate(ids):
        index.append(token)
        seen = ids[: end + 1]
        places = [p for p in range(3, len(seen)) if seen[p - 3 : p] == seen[-3:]]
        assert bool(index.propose(5)) == bool(places)
        if places:
            assert index.propose(1)[0] in {seen[p] for p in places}


# --- how long it may be -----------------------------------------------------------------------------------------------


def _wrong(pace: DraftPace, tokens: int, *, seconds_per_row: float = 0.0) -> int:
    """Play an answer in which every guess is wrong; return how many tokens were guessed."""
    for _ in range(tokens):
        drafted = pace.limit()
        pace.note(drafted=drafted, accepted=0, seconds=1.0 + drafted * seconds_per_row)
    return pace.drafted


def test_auto_guesses_wrongly_no_more_than_the_purse_allows() -> None:
    for tokens in (10, 100, 1000):
        assert 0 < _wrong(DraftPace("auto"), tokens) <= 8 + tokens / 16


def test_auto_recovers_when_guesses_become_right() -> None:
    pace = DraftPace("auto")
    _wrong(pace, 200)
    for _ in range(40):
        drafted = pace.limit()
        pace.note(drafted=drafted, accepted=drafted, seconds=1.0)
    assert pace.limit() == MAX_DRAFT


def test_auto_stops_for_good_when_the_clock_shows_a_loss() -> None:
    pace = DraftPace("auto")
    pace.note(drafted=0, accepted=0, seconds=1.0)
    for _ in range(8):
        assert pace.limit() > 0
        pace.note(drafted=2, accepted=2, seconds=3.1)  # three tokens in the time of 3.1
    assert pace.limit() == 0
    pace.note(drafted=0, accepted=0, seconds=99.0)
    assert pace.limit() == 0


def test_on_never_stops_and_off_never_begins() -> None:
    assert _wrong(DraftPace("on"), 100) >= 100
    assert _wrong(DraftPace("off"), 100) == 0


def test_length_follows_what_was_right() -> None:
    pace = DraftPace("on")
    lengths = [pace.limit()]
    for accepted in (4, 8, 15, 15, 3, 0, 1):
        pace.note(drafted=pace.limit(), accepted=accepted, seconds=1.0)
        lengths.append(pace.limit())
    assert lengths == [4, 8, 15, 15, 15, 4, 1, 2]


# --- the answer -------------------------------------------------------------------------------------------------------


class _Oracle(PromptLookup):
    """Guesses the true continuation, except that every `wrong_every`-th position of the text is guessed wrongly."""

    truth: Sequence[int] = ()
    wrong_every = 10**9

    def propose(self, limit: int) -> list[int]:
        places = range(len(self), min(len(self) + limit, len(self.truth)))
        return [(self.truth[p] + (p % self.wrong_every == 0)) % 300 for p in places]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[_Oracle]:
    monkeypatch.setattr("mistral_runtime.engine.PromptLookup", _Oracle)
    monkeypatch.setattr(_Oracle, "truth", ())
    monkeypatch.setattr(_Oracle, "wrong_every", 10**9)
    return _Oracle


@pytest.mark.parametrize("window", [None, 1, 8, 64])
@pytest.mark.parametrize("wrong_every", [1, 2, 3, 7, 16, 10**9])
def test_greedy_ids_equal_the_reference_wherever_guesses_go_wrong(
    window: int | None, wrong_every: int, tmp_path: Path, write_snapshot: WriteSnapshot, oracle: type[_Oracle]
) -> None:
    # Windows below and above the draft's length, positions taken back before, at and after the roll of each.
    weights = write_snapshot(tmp_path, sliding_window=window)
    model = _load(tmp_path)
    expected = reference_generate(weights, model.config, PROMPT, 44)
    oracle.truth, oracle.wrong_every = PROMPT + expected, wrong_every
    generation = Engine(model, lookup="on", prefill_chunk=3).generate(Request(PROMPT, 44))
    assert list(generation) == expected
    assert generation.pace.drafted > 0
    assert (generation.pace.accepted == 0) == (wrong_every == 1)
    assert (generation.pace.accepted == generation.pace.drafted) == (wrong_every == 10**9)


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 40])
def test_a_prompt_cut_over_the_window_edge_changes_nothing(
    chunk: int, model: Transformer, oracle: type[_Oracle]
) -> None:
    prompt = PROMPT * 7
    plain = list(Engine(model).generate(Request(prompt, 40)))
    oracle.truth, oracle.wrong_every = prompt + plain, 5
    generation = Engine(model, lookup="on", prefill_chunk=chunk).generate(Request(prompt, 40))
    assert list(generation) == plain
    assert 0 < generation.pace.accepted < generation.pace.drafted


SAMPLINGS = {
    "plain": SamplingParams(temperature=1.0),
    "filters": SamplingParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.3),
    "greedy penalty": SamplingParams(repetition_penalty=1.3),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_ids_are_those_of_plain_decoding_for_every_seed(
    name: str, model: Transformer, oracle: type[_Oracle]
) -> None:
    # The same ids for the same random numbers, so the distribution is the same too.
    for seed in range(5):
        request = Request(PROMPT, 40, replace(SAMPLINGS[name], seed=seed))
        expected = list(Engine(model).generate(request))
        oracle.truth, oracle.wrong_every = PROMPT + expected, 3
        generation = Engine(model, lookup="on").generate(request)
        assert list(generation) == expected
        assert 0 < generation.pace.accepted < generation.pace.drafted


def test_stop_token_in_the_middle_of_a_guess_ends_the_answer(model: Transformer, oracle: type[_Oracle]) -> None:
    expected = list(Engine(model).generate(Request(PROMPT, 20)))
    oracle.truth = PROMPT + expected
    stop = next(token for place, token in enumerate(expected) if place > 2 and token not in expected[:place])
    generation = Engine(model, lookup="on").generate(Request(PROMPT, 20, stop_ids=frozenset({stop})))
    assert list(generation) == expected[: expected.index(stop)]
    assert generation.finish_reason == "stop"


def test_cancel_ends_after_the_current_token_of_a_guess(model: Transformer, oracle: type[_Oracle]) -> None:
    oracle.truth = PROMPT + list(Engine(model).generate(Request(PROMPT, 50)))
    cancel = threading.Event()
    received = []
    generation = Engine(model, lookup="on").generate(Request(PROMPT, 50, cancel=cancel))
    for token in generation:
        received.append(token)
        if len(received) == 3:
            cancel.set()
    assert len(received) == 3
    assert generation.finish_reason == "interrupted"


def test_no_step_computes_more_than_the_answer_has_room_for(model: Transformer, oracle: type[_Oracle]) -> None:
    oracle.truth = [*PROMPT, *Engine(model).generate(Request(PROMPT, 20)), *[7] * 40]
    computed = []

    def counting(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        computed.append(len(ids))
        return eager_step(model, ids, cache, last_only=last_only)

    generation = Engine(model, lookup="on", step=counting).generate(Request(PROMPT, 20))
    assert len(list(generation)) == 20
    assert computed == [8, 5, 9, 5]  # 1 token, then 1+4, 1+8, 1+4


@pytest.mark.parametrize("is_used", [True, False])
def test_a_value_that_is_no_number_is_an_error_only_where_it_is_used(
    is_used: bool, model: Transformer, oracle: type[_Oracle]
) -> None:
    expected = list(Engine(model).generate(Request(PROMPT, 12)))
    # The first guess is of places 9 to 12. Row 2 follows the guess of place 10: used if that is right.
    oracle.truth, oracle.wrong_every = PROMPT + expected, 10**9 if is_used else 10
    spoilt: list[bool] = []

    def spoiling(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        rows = eager_step(model, ids, cache, last_only=last_only)
        if not last_only and not spoilt:
            spoilt.append(True)
            rows = rows.clone()
            rows[2, 7] = float("nan")
        return rows

    generation = Engine(model, lookup="on", step=spoiling).generate(Request(PROMPT, 12))
    if is_used:
        with pytest.raises(NonFiniteLogits, match="found 1 of 300"):
            list(generation)
    else:
        assert list(generation) == expected


def test_weights_that_are_no_numbers_are_an_error(model: Transformer) -> None:
    spoilt = Transformer(model.config)
    spoilt.load_state_dict(model.state_dict())
    spoilt.state_dict()["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    with pytest.raises(NonFiniteLogits):
        list(Engine(spoilt, lookup="on").generate(Request(PROMPT, 12)))
