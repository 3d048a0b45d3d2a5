"""The compiled attention against float64, against itself with other neighbours, and against misuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.attention import grouped_attention, window_mask
from mistral_runtime.kernels import calling
from mistral_runtime.kernels.attention import AttentionKernel, attention_kernel, takes
from mistral_runtime.kernels.build import ATTENTION_SOURCE, BuildFailed, load_library

LENGTHS = [1, 2, 3, 5, 15, 16, 17, 255, 256, 257, 700]  # around lanes, keys at once and chunks of 256


@pytest.fixture
def kernel() -> AttentionKernel:
    # Not by `attention_kernel`: a library that its check refuses has to fail here, and not to be skipped.
    try:
        return AttentionKernel(load_library(ATTENTION_SOURCE))
    except BuildFailed as error:
        pytest.skip(f"no kernels here: {error}")


def _inputs(
    count: int, seen: int, *, heads: int = 8, kv_heads: int = 2, dim: int = 128, batch: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + seen)
    shapes = [(batch, count, heads, dim), *[(batch, kv_heads, seen, dim)] * 2]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention by its definition, in float64, with keys and values repeated for each query head."""
    k, v = (t.double().repeat_interleave(q.shape[2] // t.shape[1], dim=1) for t in (k, v))
    scores = q.double().transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dim", [16, 20, 64, 128, 192])
@pytest.mark.parametrize("seen", LENGTHS)
def test_one_position_gathers_what_the_definition_says(kernel: AttentionKernel, seen: int, dim: int) -> None:
    q, k, v = _inputs(1, seen, dim=dim)
    # bfloat16 results are off by 2⁻⁹ at most and weights by as much: 0.0022 was measured.
    assert _error(kernel(q, k, v, None), _exact(q, k, v, None)) < 0.004


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (6, 2), (10, 2), (32, 8), (7, 1)])
def test_any_number_of_heads_can_share_keys(kernel: AttentionKernel, heads: int, kv_heads: int) -> None:
    q, k, v = _inputs(3, 300, heads=heads, kv_heads=kv_heads, batch=2)
    mask = window_mask(torch.arange(297, 300), torch.arange(300), None)
    assert _error(kernel(q, k, v, mask), _exact(q, k, v, mask)) < 0.004


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("dim", [16, 128])
def test_each_position_gets_bit_for_bit_what_it_gets_alone(
    kernel: AttentionKernel, dim: int, window: int | None
) -> None:
    q, k, v = _inputs(8, 700, dim=dim)
    mask = window_mask(torch.arange(692, 700), torch.arange(700), window)
    together = kernel(q, k, v, mask)
    assert _error(together, _exact(q, k, v, mask)) < 0.004
    for i in range(8):
        seen = 693 + i  # a step of its own ends with its own position
        own_mask = mask[i : i + 1, :seen].contiguous()
        alone = kernel(q[:, i : i + 1].contiguous(), k[:, :, :seen], v[:, :, :seen], own_mask)
        assert torch.equal(alone[:, 0], together[:, i])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("count", [31, 32, 33, 100])
def test_a_chunk_of_a_prompt_gathers_what_the_definition_says(
    kernel: AttentionKernel, count: int, window: int | None
) -> None:
    q, k, v = _inputs(count, 600, batch=2, dim=64)
    mask = window_mask(torch.arange(600 - count, 600), torch.arange(600), window)
    assert _error(kernel(q, k, v, mask), _exact(q, k, v, mask)) < 0.004


def test_the_number_of_threads_changes_no_bit(kernel: AttentionKernel) -> None:
    q, k, v = _inputs(2, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernel(q, k, v, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_lies_behind_the_seen_slots_is_never_read_into_the_result(kernel: AttentionKernel) -> None:
    q, k, v = _inputs(1, 40)
    expected = kernel(q, k[:, :, :33].contiguous(), v[:, :, :33].contiguous(), None)
    k[:, :, 33:], v[:, :, 33:] = math.nan, math.nan
    assert torch.equal(kernel(q, k[:, :, :33], v[:, :, :33], None), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dim", [16, 128])
def test_nan_comes_out_as_nan(kernel: AttentionKernel, which: int, dim: int) -> None:
    inputs = _inputs(1, 300, dim=dim)
    inputs[which][0, 0, 0, 3] = math.nan
    assert bool(torch.isnan(kernel(*inputs, None)).any())


def test_large_scores_do_not_overflow(kernel: AttentionKernel) -> None:
    q, k, v = _inputs(1, 300)
    q, k = q * 100, k * 100
    assert _error(kernel(q, k, v, None), _exact(q, k, v, None)) < 0.004


def test_what_the_kernel_would_misread_is_refused(kernel: AttentionKernel) -> None:
    q, k, v = _inputs(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    wrong = [
        (q.float(), k, v, mask),
        (q, k.half(), v, mask),
        (q.transpose(1, 2), k, v, mask),
        (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, mask),
        (q, k, v[:, :, :39], mask),
        (q, k, v, mask.float()),
        (q, k, v, mask[:, :39]),
        (q, k, v, mask.T.contiguous().T),
        (q[:, :, :7].contiguous(), k, v, mask),
        (q, k[:, :, :0], v[:, :, :0], None),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"."):
            kernel(*arguments)


@pytest.mark.parametrize("seen", [1, 40])
def test_keys_that_do_not_come_from_a_cache_are_laid_out_first(kernel: AttentionKernel, seen: int) -> None:
    q, k, v = _inputs(1, seen)
    across = k.transpose(1, 2).contiguous().transpose(1, 2)  # as projections leave them
    assert torch.equal(grouped_attention(q, across, v, None), kernel(q, k, v, None))


def test_attention_goes_through_the_kernel_only_where_it_is_made_for_it(
    kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("mistral_runtime.attention.attention_kernel", lambda: lambda *a: calls.append(1) or kernel(*a))
    q, k, v = _inputs(2, 40)
    found = grouped_attention(q, k, v, None)
    assert calls == [1]
    monkeypatch.setattr("mistral_runtime.attention.attention_kernel", lambda: None)
    assert _error(grouped_attention(q, k, v, None), found.double()) < 0.004
    assert takes(q)
    assert not takes(q.float())
    assert not takes(q.clone().requires_grad_())
    assert not takes(torch.empty(1, 1, 2, 520, dtype=torch.bfloat16))


def test_without_a_compiler_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_source: Path) -> None:
        raise BuildFailed("no C compiler")

    monkeypatch.setattr(calling, "load_library", fail)
    assert attention_kernel.__wrapped__() is None


def test_a_library_that_computes_something_else_is_not_used(
    kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_kernel.__wrapped__() is not None
    monkeypatch.setattr(AttentionKernel, "__call__", lambda *_: torch.zeros(1, 2, 256, dtype=torch.bfloat16))
    assert attention_kernel.__wrapped__() is None
