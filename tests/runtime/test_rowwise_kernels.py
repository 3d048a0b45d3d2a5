"""The compiled norms, rotations and gates against torch's, against themselves beside other rows, and against misuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mistral_runtime.kernels import rowwise
from mistral_runtime.kernels.build import ROWWISE_SOURCE, BuildFailed, load_library
from mistral_runtime.kernels.rowwise import RowwiseKernels, kernels_for, rowwise_kernels
from mistral_runtime.layers import RMSNorm
from mistral_runtime.rope import apply_rope, rope_cos_sin

# One unit in the last place: before rounding, sums in another order, exponentials and fused products differ by less.
ULP = 2.0**-7


@pytest.fixture
def kernels() -> RowwiseKernels:
    # Not by `rowwise_kernels`: a library that its check refuses has to fail here, and not to be skipped.
    try:
        return RowwiseKernels(load_library(ROWWISE_SOURCE))
    except BuildFailed as error:
        pytest.skip(f"no kernels here: {error}")


def _rows(*shape: int, seed: int = 0, scale: float = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _is_within_one_ulp(found: Tensor, expected: Tensor) -> bool:
    near = (found.float() - expected.float()).abs() <= ULP * expected.float().abs() + 1e-6
    return bool(near.all()) and float((found != expected).float().mean()) < 0.05  # and mostly the very same


@pytest.mark.parametrize("dim", [1, 15, 16, 100, 4096])
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_a_norm_is_torchs(kernels: RowwiseKernels, dim: int, scale: float) -> None:
    x, added, weight = _rows(2, 5, dim, scale=scale), _rows(2, 5, dim, seed=1, scale=scale), _rows(dim, seed=2)
    norm = RMSNorm(dim, eps=1e-5).bfloat16()
    norm.weight.data = weight
    sums, normed = kernels.add_and_norm(x, added, weight, 1e-5)
    assert torch.equal(sums, x + added)
    assert _is_within_one_ulp(normed, norm(x + added))  # by torch: gradients are on
    assert torch.equal(kernels.norm(sums, weight, 1e-5), normed)


@pytest.mark.parametrize("dim", [2, 16, 34, 128])
def test_a_rotation_is_torchs(kernels: RowwiseKernels, dim: int) -> None:
    q, k = _rows(2, 9, 8, dim), _rows(2, 9, 2, dim, seed=1)
    angles = rope_cos_sin(range(505, 514), head_dim=dim, theta=1e4)
    for found, expected in zip(kernels.rope(q, k, *angles), apply_rope(q, k, *angles), strict=True):
        assert _is_within_one_ulp(found, expected)  # torch's differs from itself where it fuses a multiplication


@pytest.mark.parametrize("count", [1, 15, 16, 17, 5000])
@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_a_gate_is_torchs(kernels: RowwiseKernels, count: int, scale: float) -> None:
    a, b = _rows(3, count, scale=scale), _rows(3, count, seed=1)
    assert _is_within_one_ulp(kernels.gate(a, b), silu(a) * b)


def test_extremes_come_out_as_from_torch(kernels: RowwiseKernels) -> None:
    a = torch.tensor([0.0, -0.0, 3e38, -3e38, math.inf, -100, 100, math.nan]).bfloat16()
    found, expected = kernels.gate(a, torch.ones_like(a)), silu(a)
    assert torch.allclose(found, expected, equal_nan=True, atol=1e-36)
    x = torch.full((2, 64), 3.0).bfloat16()
    x[0, 5] = math.nan
    normed = kernels.norm(x, torch.ones(64).bfloat16(), 1e-5)
    assert normed[0].isnan().all()
    assert torch.equal(normed[1], torch.ones(64).bfloat16())


def _calls(kernels: RowwiseKernels) -> list[Callable[[int], Tensor]]:
    x, y, weight = _rows(1, 24, 8, 256), _rows(1, 24, 8, 256, seed=1), _rows(8 * 256, seed=2)
    cos, sin = rope_cos_sin(range(24), head_dim=256, theta=1e4)
    return [
        lambda n: kernels.add_and_norm(x[:, :n].flatten(2), y[:, :n].flatten(2), weight, 1e-5)[1],
        lambda n: kernels.rope(x[:, :n], y[:, :n], cos[:n], sin[:n])[1],
        lambda n: kernels.gate(x[:, :n], y[:, :n]),
    ]


@pytest.mark.parametrize("which", range(3))
def test_neither_other_rows_nor_threads_change_a_bit(kernels: RowwiseKernels, which: int) -> None:
    call, threads, results = _calls(kernels)[which], torch.get_num_threads(), []
    try:
        for count, rows in ((1, 1), (1, 24), (2, 24), (3, 7)):
            torch.set_num_threads(count)
            results.append(call(rows)[:, :1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_what_the_kernels_would_misread_is_refused(kernels: RowwiseKernels) -> None:
    x, weight = _rows(1, 3, 2, 16), _rows(16)
    cos, sin = rope_cos_sin(range(3), head_dim=16, theta=1e4)
    for wrong in (
        lambda: kernels.norm(x.float(), weight, 1e-5),
        lambda: kernels.norm(x, weight[:8], 1e-5),
        lambda: kernels.norm(x, weight.float(), 1e-5),
        lambda: kernels.add_and_norm(x, x[:, :2], weight, 1e-5),
        lambda: kernels.gate(x, x[:, :2]),
        lambda: kernels.rope(x, x[:, :2], cos, sin),
        lambda: kernels.rope(x, x, cos[:2], sin[:2]),
        lambda: kernels.rope(x, x, cos.double(), sin),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()


def test_they_are_used_only_where_they_are_made_for(kernels: RowwiseKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _rows(1, 4)
    monkeypatch.setattr(rowwise, "rowwise_kernels", lambda: kernels)
    assert kernels_for(x) is None  # gradients may be wanted
    with torch.inference_mode():
        assert kernels_for(x) is kernels
        assert kernels_for(x.float()) is None
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        assert kernels_for(x) is None


def test_a_library_that_computes_something_else_is_not_used(
    kernels: RowwiseKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rowwise_kernels.__wrapped__() is not None
    monkeypatch.setattr(RowwiseKernels, "gate", lambda _self, a, _b: torch.zeros_like(a))
    assert rowwise_kernels.__wrapped__() is None
    monkeypatch.setenv("MISTRAL_RUNTIME_KERNELS", "off")
    assert rowwise_kernels.__wrapped__() is None
