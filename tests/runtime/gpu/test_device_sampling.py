"""Tokens chosen on the device follow the distributions of `sampling.py`, and chance depends on seed and position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mistral_runtime.gpu.counter_random import uniform
from mistral_runtime.gpu.device_sampling import NOT_FINITE, DeviceSampler, RowChoice
from mistral_runtime.sampling import penalize, token_probabilities
from mistral_runtime.sampling_params import SamplingParams

VOCAB = 40
SETTINGS = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, top_k=7),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=2.0, top_p=1e-9),
)


def _logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def _sampler(*rows: RowChoice) -> DeviceSampler:
    return DeviceSampler(rows, vocab_size=VOCAB, device="cpu")


def _at(*positions: int) -> Tensor:
    return torch.tensor(positions)


def test_every_row_has_the_distribution_of_its_own_settings() -> None:
    logits = _logits(len(SETTINGS))
    probabilities, ids = _sampler(*map(RowChoice, SETTINGS)).probabilities(logits)
    found = torch.zeros_like(logits).scatter(1, ids, probabilities)
    expected = torch.stack([token_probabilities(row, each) for row, each in zip(logits, SETTINGS, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_drawn_tokens_follow_the_distribution(params: SamplingParams) -> None:
    count, logits = 20_000, _logits(seed=4)
    sampler = DeviceSampler(
        [RowChoice(SamplingParams(**{**vars(params), "seed": 11}))] * count, vocab_size=VOCAB, device="cpu"
    )
    drawn = sampler.choose(logits.expand(count, -1), torch.arange(count))
    expected = token_probabilities(logits[0], params).double() * count
    found = torch.bincount(drawn, minlength=VOCAB).double()
    assert not found[expected == 0].any()
    common = expected >= 5
    statistic = float(((found - expected)[common] ** 2 / expected[common]).sum())
    freedom = max(1, int(common.sum()) - 1)
    # The mean of chi-square and four deviations; seeds are fixed, so it holds always or never.
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    rows = [RowChoice(SamplingParams(temperature=1.0, top_p=0.9, seed=seed)) for seed in (5, 6, 7, 5)]
    logits = _logits(4)
    logits[3] = logits[0]
    together, alone = _sampler(*rows), [_sampler(row) for row in rows]
    tokens = []
    for step in range(20):
        positions = _at(step, step + 3, step + 9, step)
        ids = together.choose(logits, positions)
        each = [one.choose(logits[i : i + 1], positions[i : i + 1]) for i, one in enumerate(alone)]
        assert torch.equal(ids, torch.cat(each))
        assert ids[0] == ids[3]
        tokens.append(ids.tolist())
    assert len({tuple(row) for row in zip(*tokens, strict=True)}) == 3


def test_greedy_rows_take_the_likeliest_beside_rows_that_draw() -> None:
    logits = _logits(3)
    sampler = _sampler(*(RowChoice(SamplingParams(temperature=t, seed=1)) for t in (0.0, 3.0, 0.0)))
    for step in range(5):
        ids = sampler.choose(logits, _at(step, step, step))
        assert ids[[0, 2]].tolist() == logits.argmax(1)[[0, 2]].tolist()
    assert torch.equal(_sampler(*[RowChoice(SamplingParams())] * 3).choose(logits, _at(0, 0, 0)), logits.argmax(1))


def test_the_repetition_penalty_is_that_of_sampling() -> None:
    logits, seen = _logits()[0], [3, 9, 3]
    row = RowChoice(SamplingParams(repetition_penalty=4.0), seen=seen)
    sampler = _sampler(row, RowChoice(SamplingParams()))
    for step in range(10):
        ids = sampler.choose(logits.expand(2, -1), _at(step, step))
        assert ids.tolist() == [int(penalize(logits, seen, 4.0).argmax()), int(logits.argmax())]
        seen.append(int(ids[0]))


def test_presence_counts_once_and_frequency_every_time() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6] = 1.0, 0.9
    sampler = _sampler(
        RowChoice(SamplingParams(), presence=0.2), RowChoice(SamplingParams(), presence=0.0, frequency=0.04)
    )
    chosen = [sampler.choose(logits, _at(step, step)).tolist() for step in range(6)]
    # 1.0; then 0.8 against 0.9; then 0.8 against 0.7 for good.
    assert [ids[0] for ids in chosen] == [5, 6, 5, 5, 5, 5]
    # 1, .96, .92, .88 against .9; .88 against .86; .84 against .86.
    assert [ids[1] for ids in chosen] == [5, 5, 5, 6, 5, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_told_by_its_id_and_harms_no_other(value: float, temperature: float) -> None:
    logits = _logits(2)
    logits[0, 7] = value
    rows = [RowChoice(SamplingParams(temperature=temperature, repetition_penalty=1.5, seed=1))] * 2
    ids = _sampler(*rows).choose(logits, _at(4, 4))
    assert ids[0] == NOT_FINITE
    assert ids[1] == _sampler(rows[1]).choose(logits[1:], _at(4))[0]


def test_random_numbers_match_known_values_of_splitmix64() -> None:
    # Seeded with 0, SplitMix64 gives 0xE220A8397B1DCDAF first.
    first = 0xE220A8397B1DCDAF

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        return z ^ z >> 31

    assert mix(0x9E3779B97F4A7C15) == first
    assert float(uniform(torch.tensor(0), torch.tensor(0))) == (mix(first) >> 11) * 2.0**-53
    largest = (1 << 63) - 1
    expected = mix((mix((largest + 0x9E3779B97F4A7C15) % 2**64) + 3 * 0x9E3779B97F4A7C15) % 2**64)
    assert float(uniform(torch.tensor(largest), torch.tensor(3))) == (expected >> 11) * 2.0**-53


def test_random_numbers_are_even_along_seeds_and_positions() -> None:
    for seeds, positions in ((torch.zeros(10_000), torch.arange(10_000)), (torch.arange(10_000), torch.zeros(10_000))):
        numbers = uniform(seeds.long(), positions.long())
        assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1
        counts = numbers.histc(20, 0, 1)
        assert float(((counts - 500) ** 2 / 500).sum()) < 19 + 4 * math.sqrt(38)


def test_a_row_without_a_seed_draws_one() -> None:
    seeds = {RowChoice(SamplingParams(temperature=1.0)).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
