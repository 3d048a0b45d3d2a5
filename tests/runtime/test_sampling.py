"""Sampling: each filter on hand-made logits, and drawn frequencies against the distribution they claim."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_runtime.errors import BadSampling, NonFiniteLogits
from mistral_runtime.sampling import (
    min_p_ids,
    new_generator,
    next_token,
    penalize,
    token_probabilities,
    top_k_ids,
    top_p_ids,
)
from mistral_runtime.sampling_params import SamplingParams

PROBABILITIES = [0.5, 0.25, 0.15, 0.07, 0.03]
LOGITS = torch.tensor(PROBABILITIES).log()


def _draw(params: SamplingParams, count: int, logits: Tensor = LOGITS, seen: tuple[int, ...] = ()) -> list[int]:
    generator = new_generator(params)
    return [next_token(logits, params, seen=seen, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("k, kept", [(1, [0]), (3, [0, 1, 2]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_likeliest(k: int, kept: list[int]) -> None:
    assert top_k_ids(LOGITS, k).tolist() == kept


@pytest.mark.parametrize(
    "p, kept", [(0.01, [0]), (0.49, [0]), (0.6, [0, 1]), (0.8, [0, 1, 2]), (0.99, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]) -> None:
    assert top_p_ids(LOGITS, p).tolist() == kept
    shuffled = LOGITS.flip(0)
    assert top_p_ids(shuffled, p).tolist() == sorted(4 - token for token in kept)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_top_p_of_many_equals_the_sorted_way(p: float, spread: float) -> None:
    """With bfloat16's few values there are ties everywhere, and with a spread of 0 nothing else."""
    logits = (torch.randn(3000, generator=torch.Generator().manual_seed(5)) * spread).bfloat16().float()
    probabilities, ids = logits.softmax(-1).sort(descending=True, stable=True)
    assert top_p_ids(logits, p).tolist() == sorted(ids[probabilities.cumsum(-1) - probabilities < p].tolist())


@pytest.mark.parametrize("fraction, kept", [(0.01, [0, 1, 2, 3, 4]), (0.1, [0, 1, 2, 3]), (0.4, [0, 1]), (0.9, [0])])
def test_min_p_is_relative_to_the_likeliest(fraction: float, kept: list[int]) -> None:
    assert min_p_ids(LOGITS, fraction).tolist() == kept


def test_repetition_penalty_pushes_down_on_both_sides_of_zero() -> None:
    penalized = penalize(torch.tensor([2.0, -2.0, 2.0, 0.0]), [0, 1, 1, 3], 2.0)
    assert penalized.tolist() == [1.0, -4.0, 2.0, 0.0]


def test_pure_functions_leave_their_input_alone() -> None:
    before = LOGITS.clone()
    penalize(LOGITS, [0], 2.0)
    token_probabilities(LOGITS, SamplingParams(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1))
    assert torch.equal(LOGITS, before)


def test_greedy_takes_the_likeliest_and_heeds_the_penalty() -> None:
    assert _draw(SamplingParams(), 3) == [0, 0, 0]
    logits = torch.tensor([2.0, 1.5])
    assert _draw(SamplingParams(repetition_penalty=2.0), 1, logits, seen=(0,)) == [1]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, [math.sqrt(p) for p in PROBABILITIES]),
        ({"temperature": 0.5}, [p * p for p in PROBABILITIES]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0, 0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0, 0]),
        ({"min_p": 0.4}, [0.5, 0.25, 0, 0, 0]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.7}, [math.sqrt(0.5), math.sqrt(0.25), 0, 0, 0]),
    ],
    ids=str,
)
def test_drawn_frequencies_follow_the_distribution(settings: dict[str, Any], expected: list[float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 7} | settings)
    count = 4000
    drawn = Counter(_draw(params, count))
    for token, weight in enumerate(expected):
        p = weight / sum(expected)
        # Five standard deviations of a binomial; exactly zero where the token is ruled out.
        assert abs(drawn[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


def test_equal_seeds_give_equal_draws_and_others_do_not() -> None:
    first = _draw(SamplingParams(temperature=1.0, seed=1), 40)
    assert first == _draw(SamplingParams(temperature=1.0, seed=1), 40)
    assert first != _draw(SamplingParams(temperature=1.0, seed=2), 40)


def test_without_a_seed_runs_differ() -> None:
    assert _draw(SamplingParams(temperature=1.0), 60) != _draw(SamplingParams(temperature=1.0), 60)


def test_a_tiny_temperature_neither_overflows_nor_wanders() -> None:
    params = SamplingParams(temperature=1e-6, seed=0)
    assert _draw(params, 5, torch.tensor([1000.0, 999.0, -1000.0])) == [0] * 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(NonFiniteLogits, match="1 of 3"):
        _draw(SamplingParams(), 1, torch.tensor([0.0, bad, 1.0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": 11.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"seed": -1},
        {"seed": 1 << 63},
    ],
    ids=str,
)
def test_setting_out_of_range_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSampling, match=next(iter(settings))) as caught:
        SamplingParams(**settings)
    assert caught.value.exit_code == 2


SMALLEST = 5e-324


@pytest.mark.parametrize("params", [{"temperature": SMALLEST}, {"temperature": 1e-40}, {"top_p": SMALLEST}])
def test_numbers_too_small_for_float32_leave_the_likeliest_alone(params: dict[str, float]) -> None:
    chosen = SamplingParams(**{"temperature": 1.0, "seed": 1, **params})
    assert token_probabilities(LOGITS, chosen).tolist() == [1, 0, 0, 0, 0]
    assert set(_draw(chosen, 5)) == {0}


@pytest.mark.parametrize("penalty", [SMALLEST, 1e-40, 1e-30])
def test_a_penalty_too_small_for_float32_leaves_numbers(penalty: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    params = SamplingParams(1.0, repetition_penalty=penalty, seed=1)
    assert penalize(logits, [0, 1, 3], penalty).isfinite().all()
    assert set(_draw(params, 20, logits, seen=(0, 1, 3))) <= {0, 1}
