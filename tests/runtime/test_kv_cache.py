"""The rolling cache's arithmetic: which position is where, and what is still there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.attention import window_mask
from mistral_runtime.config import ModelConfig
from mistral_runtime.kv_cache import RollingKVCache, cache_bytes


def _marked(positions: range, config: ModelConfig) -> Tensor:
    """Keys whose every value is their own position, (1, K, T, D)."""
    column = torch.tensor([float(p) for p in positions])
    return column[None, None, :, None].expand(1, config.n_kv_heads, -1, config.head_dim)


def _store(cache: RollingKVCache, count: int, config: ModelConfig) -> tuple[list[int], list[int]]:
    """Store `count` positions in layer 0; return the positions announced and those found."""
    announced = cache.seen_positions(count).tolist()
    new = _marked(range(cache.length, cache.length + count), config)
    keys, values = cache.update(0, new, new)
    cache.advance(count)
    assert torch.equal(keys, values)
    return announced, [int(p) for p in keys[0, 0, :, 0]]


def test_the_worked_example_in_the_docstring_holds(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, sliding_window=4)
    cache = RollingKVCache(config, context=100, dtype=torch.float32)
    assert _store(cache, 6, config)[1] == [0, 1, 2, 3, 4, 5]
    assert cache._slot_positions(cache.length).tolist() == [4, 5, 2, 3]
    assert _store(cache, 1, config)[1] == [4, 5, 6, 3]
    assert _store(cache, 3, config)[1] == [4, 5, 6, 3, 7, 8, 9]


@pytest.mark.parametrize("steps", [[1] * 30, [3, 1, 1, 9, 1, 20, 1, 1], [25, 1, 1], [7, 7, 7], [8, 8], [9, 1, 9]])
def test_every_visible_position_is_there_exactly_once(steps: list[int], tiny_config: ModelConfig) -> None:
    cache = RollingKVCache(tiny_config, context=10_000, dtype=torch.float32)
    for count in steps:
        start = cache.length
        announced, found = _store(cache, count, tiny_config)
        assert announced == found
        queries = torch.arange(start, start + count)
        visible = window_mask(queries, torch.tensor(found), 8)
        for query, row in zip(queries.tolist(), visible, strict=True):
            seen = sorted(p for p, is_seen in zip(found, row.tolist(), strict=True) if is_seen)
            assert seen == list(range(max(0, query - 7), query + 1))


def test_a_decode_step_needs_no_mask(tiny_config: ModelConfig) -> None:
    cache = RollingKVCache(tiny_config, context=10_000, dtype=torch.float32)
    for position in range(40):
        _, found = _store(cache, 1, tiny_config)
        assert sorted(found) == list(range(max(0, position - 7), position + 1))


@pytest.mark.parametrize("window, context, capacity", [(8, 100, 8), (8, 5, 5), (None, 100, 100)])
def test_capacity_is_the_smaller_of_window_and_context(
    window: int | None, context: int, capacity: int, tiny_config: ModelConfig
) -> None:
    config = replace(tiny_config, sliding_window=window)
    assert RollingKVCache(config, context=context, dtype=torch.float32).capacity == capacity
    # 2 (keys and values) · 2 layers · 2 heads · 16 values · 4 bytes
    assert cache_bytes(config, context, bytes_per_head=4 * 16) == capacity * 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("window", [None, 64])
def test_a_cache_that_cannot_roll_refuses_to_lose_positions(window: int | None, tiny_config: ModelConfig) -> None:
    cache = RollingKVCache(replace(tiny_config, sliding_window=window), context=10, dtype=torch.float32)
    cache.require_room(10)
    with pytest.raises(ValueError, match="10 positions cannot take 11"):
        cache.require_room(11)


def test_the_mask_is_open_at_the_far_end() -> None:
    # W = 3: query 5 sees 3, 4, 5 and no longer 2.
    assert window_mask(torch.tensor([5]), torch.arange(8), 3).tolist() == [[False] * 3 + [True] * 3 + [False] * 2]


@pytest.mark.parametrize("slack", [0, 1, 3, 15])
@pytest.mark.parametrize("start", range(1, 26))
def test_positions_taken_back_leave_everything_that_is_still_visible(
    slack: int, start: int, tiny_config: ModelConfig
) -> None:
    # W = 8, from before the roll to past the end of the largest buffer (8 + 15).
    for taken_back in range(slack + 2):
        cache = RollingKVCache(tiny_config, context=10_000, dtype=torch.float32, slack=slack)
        _store(cache, start, tiny_config)
        _store(cache, slack + 1, tiny_config)
        cache.rewind(taken_back)
        for count in (1, slack + 1, 1, 12):
            first = cache.length
            hides_nothing = cache.hides_nothing(count)
            announced, found = _store(cache, count, tiny_config)
            visible = window_mask(torch.arange(first, first + count), torch.tensor(announced), 8)
            assert visible.all() or not hides_nothing
            for query, row in enumerate(visible.tolist(), start=first):
                seen = [p for p, is_seen in zip(found, row, strict=True) if is_seen]
                assert sorted(seen) == list(range(max(0, query - 7), query + 1))


def test_going_back_further_than_the_slack_is_refused(tiny_config: ModelConfig) -> None:
    cache = RollingKVCache(tiny_config, context=10_000, dtype=torch.float32, slack=3)
    _store(cache, 11, tiny_config)
    cache.rewind(11)  # nothing has been overwritten yet
    _store(cache, 12, tiny_config)
    cache.rewind(3)
    cache.rewind(1)
    with pytest.raises(ValueError, match="slack of 3 at 8 cannot go back to 7"):
        cache.rewind(1)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.rewind(-1)


def test_slack_is_paid_for_only_by_what_outgrows_the_window(tiny_config: ModelConfig) -> None:
    sizes = [cache_bytes(tiny_config, context, bytes_per_head=1, slack=15) for context in (5, 20, 100)]
    assert [size // cache_bytes(tiny_config, 1, bytes_per_head=1) for size in sizes] == [5, 20, 23]
