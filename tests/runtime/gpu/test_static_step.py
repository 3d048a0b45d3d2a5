"""The static step gives what `batched_step` gives, whatever the buckets, the padding, the window and the slots."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mistral_runtime.batched_step import Segment, batched_step
from mistral_runtime.config import MoeConfig
from mistral_runtime.engine import eager_step
from mistral_runtime.gpu import static_step
from mistral_runtime.gpu.graphs import EagerRunner
from mistral_runtime.gpu.static_cache import SlotCache, SlotPool, pool_bytes
from mistral_runtime.gpu.static_step import (
    BATCH_BUCKETS,
    Bucket,
    StaticStep,
    batch_bucket,
    length_bucket,
    visible_columns,
)
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.transformer import Transformer
from tests.runtime.gpu.models import CONFIG, make_model

# Of the largest logit: float32 differs in the order of sums; bfloat16 rounds every activation to 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def _ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(CONFIG.vocab_size), k=count)


def _pair(step: StaticStep, prompt: Sequence[int]) -> tuple[SlotCache, RollingKVCache]:
    """Return one sequence twice: in a slot, and in a cache of its own."""
    pool = step.pool
    cache = pool.new_cache(pool.context)
    assert cache is not None
    other = step.model.new_cache(pool.context, slack=pool.slack)
    for each in (cache, other):
        eager_step(step.model, prompt, each)
    return cache, other


def _make(model: Transformer, *, slots: int, context: int = 80, slack: int = 0) -> StaticStep:
    return StaticStep(model, SlotPool(model, slots=slots, context=context, slack=slack), EagerRunner())


def _check_steps(step: StaticStep, pairs: Sequence[tuple[SlotCache, RollingKVCache]], *, count: int) -> None:
    tokens = [_ids(count, seed=90 + index) for index in range(len(pairs))]
    for number in range(count):
        rows = [(cache, tokens[index][number]) for index, (cache, _) in enumerate(pairs)]
        logits = step.decode(rows)
        expected = torch.cat(
            batched_step(step.model, [Segment(o, [r[1]]) for (_, o), r in zip(pairs, rows, strict=True)])
        )
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCES[step.model.dtype], f"step {number}"
        assert [cache.length for cache, _ in pairs] == [other.length for _, other in pairs]


@pytest.fixture(autouse=True)
def _small_length_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_step, "MIN_LENGTH_BUCKET", 4)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("window", "slack"), [(None, 0), (12, 0), (12, 5)])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_rows_get_what_they_get_in_caches_of_their_own(
    count: int, window: int | None, slack: int, dtype: torch.dtype
) -> None:
    step = _make(make_model(replace(CONFIG, sliding_window=window), dtype), slots=5, slack=slack)
    pairs = [_pair(step, _ids(2 + 9 * index, seed=index)) for index in range(count)]
    # 20 steps pass the window, the end of the buffer, and several powers of two.
    _check_steps(step, pairs, count=20)


def test_slots_in_any_order_and_with_gaps_are_gathered() -> None:
    step = _make(make_model(), slots=6)
    pairs = [_pair(step, _ids(3 + index, seed=index)) for index in range(6)]
    _check_steps(step, [pairs[4], pairs[0], pairs[3]], count=4)


def test_a_padded_row_changes_no_sequence() -> None:
    step = _make(make_model(), slots=4)
    pairs = [_pair(step, _ids(5, seed=index)) for index in range(4)]
    idle = [buffer[3].clone() for buffer in step.pool.keys + step.pool.values]
    _check_steps(step, pairs[:3], count=3)
    assert all(
        torch.equal(before, buffer[3]) for before, buffer in zip(idle, step.pool.keys + step.pool.values, strict=True)
    )
    _check_steps(step, [pairs[3]], count=3)


@pytest.mark.parametrize("window", [None, 12])
def test_a_slot_used_again_shows_nothing_of_its_last_sequence(window: int | None) -> None:
    step = _make(make_model(replace(CONFIG, sliding_window=window)), slots=1)
    first = _pair(step, _ids(30, seed=1))
    slot = first[0].slot
    assert step.pool.new_cache(10) is None
    del first
    gc.collect()
    second = _pair(step, _ids(2, seed=2))
    assert second[0].slot == slot
    _check_steps(step, [second], count=20)


def test_positions_taken_back_are_not_seen_again() -> None:
    step = _make(make_model(replace(CONFIG, sliding_window=12)), slots=1, slack=5)
    pair = _pair(step, _ids(25, seed=1))
    for cache in pair:
        eager_step(step.model, _ids(5, seed=7), cache)
        cache.rewind(5)
    _check_steps(step, [pair], count=12)


def test_running_a_step_twice_does_what_once_does() -> None:
    # Graphs are captured behind warm-ups that run the step for real.
    step = _make(make_model(), slots=2)
    pairs = [_pair(step, _ids(6, seed=index)) for index in range(2)]
    bucket = step.place([(cache, 5) for cache, _ in pairs])
    first = step.launch(bucket).clone()
    assert torch.equal(first, step.launch(bucket))
    _check_steps(step, pairs, count=2)


def test_buckets_are_few_and_large_enough() -> None:
    assert [batch_bucket(count) for count in (1, 2, 3, 5, 16, 17, 32)] == [1, 2, 4, 8, 16, 32, 32]
    assert {batch_bucket(count) for count in range(1, 33)} == set(BATCH_BUCKETS)
    with pytest.raises(ValueError, match="33"):
        batch_bucket(33)
    assert [length_bucket(filled, 100) for filled in (1, 4, 5, 64, 65, 100)] == [4, 4, 8, 64, 100, 100]


def test_one_program_serves_many_steps() -> None:
    step = _make(make_model(), slots=3)
    pairs = [_pair(step, _ids(5, seed=index)) for index in range(3)]
    seen = set()
    for _ in range(60):
        seen.add(step.place([(cache, 1) for cache, _ in pairs]))
        step.decode([(cache, 1) for cache, _ in pairs])
    assert seen == {Bucket(4, columns, in_order=True) for columns in (8, 16, 32, 64, 80)}


def test_visible_columns_follow_the_definition() -> None:
    for window in (None, 6):
        for position in range(30):
            capacity = 30 if window is None else 8
            mask = visible_columns(torch.tensor([position]), capacity, capacity=capacity, window=window)[0]
            stored = {j % capacity: j for j in range(position + 1)}
            visible = [s in stored and (window is None or stored[s] > position - window) for s in range(capacity)]
            assert mask.tolist() == visible


def test_what_cannot_be_a_step_is_refused_before_anything_changes() -> None:
    step = _make(make_model(), slots=2, context=8)
    cache, _ = _pair(step, _ids(8, seed=1))
    stranger, _ = _pair(_make(make_model(), slots=1), _ids(3, seed=1))
    for rows in ([], [(cache, 1), (cache, 1)], [(stranger, 1)], [(cache, 1)]):
        with pytest.raises(ValueError):
            step.decode(rows)
    assert cache.length == 8


def test_a_mixture_of_experts_has_no_static_step() -> None:
    config = replace(CONFIG, moe=MoeConfig(num_experts=4, num_experts_per_tok=2))
    with pytest.raises(ValueError, match="experts"):
        _make(make_model(config), slots=1)


def test_pool_bytes_are_those_of_its_buffers() -> None:
    model = make_model(replace(CONFIG, sliding_window=12))
    pool = SlotPool(model, slots=3, context=50, slack=2)
    taken = sum(buffer.numel() * buffer.element_size() for buffer in pool.keys + pool.values)
    assert pool_bytes(model, slots=3, context=50, slack=2) == taken
