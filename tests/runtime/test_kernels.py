"""The compiled kernels: what they compute, on every kind of processor that rows.c knows, and what they refuse."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mistral_runtime.kernels import build
from mistral_runtime.kernels.rows import MAX_ROWS, RowKernels, kernels_reason, row_kernels
from mistral_runtime.linear_rows import QuantizedLinear, RowLinear
from mistral_runtime.quantized import dequantize, quantize

# Kernels that were built and found wrong are no reason to skip what tells how.
pytestmark = pytest.mark.skipif(
    kernels_reason() in ("no C compiler", "only on Linux"), reason="nothing compiles kernels here"
)

INSTRUCTIONS = {
    "all that this processor has": (),
    "no bfloat16, no VNNI": ("-mno-avx512bf16", "-mno-avx512vnni"),
    "no AVX-512": ("-mno-avx512bf16", "-mno-avx512vnni", "-mno-avx512bw"),
}
ROUNDED_TO = {8: 32767, 4: 127}  # the largest integer that stands for an activation beside weights of so many bits
SHAPES = [(1, 128), (2, 256), (3, 128), (5, 384), (7, 128), (13, 1024)]


@pytest.fixture(scope="module", params=list(INSTRUCTIONS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RowKernels]:
    flags = INSTRUCTIONS[request.param]
    if not flags:
        native = row_kernels()
        assert native is not None
        yield native
        return
    if platform.machine() != "x86_64":
        pytest.skip("these branches are for x86")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_OPTIONS", (*build._OPTIONS, *flags))
        patch.setenv(build.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield RowKernels(build.load_library())


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


class Matrix(NamedTuple):
    """A matrix of some kind, what multiplies by it, and the weights it stands for in float64."""

    multiply: Callable[..., Tensor]
    exact: Tensor
    bits: int
    group: int


KINDS = [(16, 0), (8, 64), (8, 128), (4, 64), (4, 128)]


def _matrix(kernels: RowKernels, bits: int, group: int, outputs: int, inputs: int) -> Matrix:
    plain = _draw(outputs, inputs, seed=1)
    if bits == 16:
        return Matrix(lambda x, wide=False: kernels.bf16(plain, x, wide=wide), plain.double(), bits, inputs)
    made = quantize(plain, bits=bits, group=group, name="w")
    integers = dequantize(made.values, torch.ones_like(made.scales)).double()
    exact = integers * made.scales.double().repeat_interleave(group, dim=1)
    call = kernels.int8 if bits == 8 else kernels.int4
    return Matrix(lambda x, wide=False: call(made.values, made.scales, x, wide=wide), exact, bits, group)


def _most_error(matrix: Matrix, x: Tensor) -> Tensor:
    """Return how far a float32 sum over rounded activations may be from the product, by output.

    Half a step of each group's activations times its weights, and 1e-6 of all magnitudes for the sum itself.
    """
    weights, rows = matrix.exact.abs(), x.double().abs()
    bound = 1e-6 * (rows @ weights.T)
    if matrix.bits != 16:
        steps = rows.unflatten(1, (-1, matrix.group)).amax(-1) / ROUNDED_TO[matrix.bits]
        bound += 0.501 * steps @ weights.unflatten(1, (-1, matrix.group)).sum(-1).T
    return bound


@pytest.mark.parametrize("bits, group", KINDS)
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_the_product_is_that_of_float64(kernels: RowKernels, bits: int, group: int, outputs: int, inputs: int) -> None:
    matrix = _matrix(kernels, bits, group, outputs, inputs)
    for rows in range(1, MAX_ROWS + 1):
        x = _draw(rows, inputs, seed=rows)
        wide = matrix.multiply(x, wide=True)
        assert wide.dtype == torch.float32
        assert bool(((wide.double() - x.double() @ matrix.exact.T).abs() <= _most_error(matrix, x)).all())
        assert torch.equal(matrix.multiply(x), wide.to(torch.bfloat16))


@pytest.mark.parametrize("inputs", [1, 15, 31, 33, 50, 97, 130])
def test_bfloat16_takes_any_number_of_inputs(kernels: RowKernels, inputs: int) -> None:
    matrix = _matrix(kernels, 16, 0, 5, inputs)
    x = _draw(3, inputs)
    assert bool(((matrix.multiply(x, wide=True).double() - x.double() @ matrix.exact.T).abs() <= 1e-5).all())


@pytest.mark.parametrize("bits, group", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: RowKernels, bits: int, group: int) -> None:
    """Bit for bit, also beside a row of NaN, at any place, and with any number of threads."""
    inputs = 421 if bits == 16 else 384  # with a rest
    matrix = _matrix(kernels, bits, group, 15, inputs)
    x = _draw(MAX_ROWS, inputs)
    alone = torch.cat([matrix.multiply(row[None], wide=True) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in range(1, MAX_ROWS + 1):
                assert torch.equal(matrix.multiply(x[:rows], wide=True), alone[:rows])
                order = torch.arange(MAX_ROWS).roll(rows)[:rows]
                assert torch.equal(matrix.multiply(x[order], wide=True), alone[order])
            broken = x.clone()
            broken[3] = torch.nan
            others = [0, 1, 2, 4, 5, 6, 7]
            assert torch.equal(matrix.multiply(broken, wide=True)[others], alone[others])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits, group", KINDS)
def test_zeros_give_zeros(kernels: RowKernels, bits: int, group: int) -> None:
    matrix = _matrix(kernels, bits, group, 5, 256)
    assert not matrix.multiply(torch.zeros(6, 256, dtype=torch.bfloat16), wide=True).any()


@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30, 1e-36, 1e-40])
@pytest.mark.parametrize("bits, group", KINDS)
def test_activations_of_any_size_are_rounded_in_their_own_group_only(
    kernels: RowKernels, bits: int, group: int, size: float
) -> None:
    matrix = _matrix(kernels, bits, group, 5, 256)
    x = _draw(5, 256)
    x[2, 70] = size
    x[3] *= size
    product = matrix.multiply(x, wide=True).double()
    # Below the least normal number the hardware may take a value for zero.
    assert bool(((product - x.double() @ matrix.exact.T).abs() <= _most_error(matrix, x) + 1e-28).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits, group", KINDS)
def test_what_is_not_finite_is_not_hidden(kernels: RowKernels, bits: int, group: int, bad: float) -> None:
    matrix = _matrix(kernels, bits, group, 7, 256)
    for rows in (1, 6):
        x = _draw(rows, 256)
        x[-1, 131] = bad
        product = matrix.multiply(x)
        assert not torch.isfinite(product[-1]).any()
        assert torch.isfinite(product[:-1]).all()


@pytest.mark.parametrize("bits, group", [(8, 64), (8, 128), (4, 64), (4, 128)])
@pytest.mark.parametrize("first, count", [(0, 13), (5, 3), (12, 1), (13, 0)])
def test_expanding_is_dequantizing(kernels: RowKernels, bits: int, group: int, first: int, count: int) -> None:
    made = quantize(_draw(13, 384), bits=bits, group=group, name="w")
    expanded = kernels.expand(made.values, made.scales, first, count)
    assert torch.equal(expanded, dequantize(made.values, made.scales)[first : first + count])


# --- what never reaches the C -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 128),
        torch.zeros(2, 127, dtype=torch.bfloat16),
        torch.zeros(128, dtype=torch.bfloat16),
        torch.zeros((), dtype=torch.bfloat16),
        torch.zeros(0, 128, dtype=torch.bfloat16),
        torch.zeros(MAX_ROWS + 1, 128, dtype=torch.bfloat16),
        torch.zeros(128, 2, dtype=torch.bfloat16).T,
        torch.zeros(2, 128, dtype=torch.bfloat16, device="meta"),
        torch.zeros(2, 128, dtype=torch.bfloat16).to_sparse(),
    ],
    ids=["type", "inputs", "one dimension", "scalar", "no rows", "too many rows", "strides", "device", "sparse"],
)
def test_rows_that_c_would_misread_are_refused(x: Tensor) -> None:
    kernels = row_kernels()
    assert kernels is not None
    made = quantize(_draw(3, 128), bits=8, group=128, name="w")
    with pytest.raises(ValueError):
        kernels.bf16(_draw(3, 128), x)
    with pytest.raises(ValueError):
        kernels.int8(made.values, made.scales, x)


@pytest.mark.parametrize(
    "scales",
    [
        torch.ones(3, 2),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(3, 3, dtype=torch.bfloat16),
        torch.ones(3, 8, dtype=torch.bfloat16),
        torch.ones(3, 0, dtype=torch.bfloat16),
        torch.ones(6, dtype=torch.bfloat16),
        torch.ones(2, 3, dtype=torch.bfloat16).T,
    ],
    ids=["type", "outputs", "odd group", "group of 32", "no groups", "one dimension", "strides"],
)
def test_scales_that_do_not_fit_are_refused(scales: Tensor) -> None:
    kernels = row_kernels()
    assert kernels is not None
    int8, int4 = torch.zeros(3, 256, dtype=torch.int8), torch.zeros(3, 128, dtype=torch.uint8)
    for call, values in ((kernels.int8, int8), (kernels.int4, int4)):
        with pytest.raises(ValueError):
            call(values, scales, _draw(1, 256))
        with pytest.raises(ValueError):
            kernels.expand(values, scales, 0, 1)
    good = torch.ones(3, 2, dtype=torch.bfloat16)
    for wrong in (int8.float(), int8[:, ::2], int8[0], int4):
        with pytest.raises(ValueError):
            kernels.int8(wrong, good, _draw(1, 256))
    for first, count in ((-1, 2), (2, 2), (4, 0), (1, -1)):
        with pytest.raises(ValueError):
            kernels.expand(int8, good, first, count)


# --- in place of nn.Linear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [96, 256])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_few_and_many_rows_agree(bits: int, inputs: int, has_kernels: bool) -> None:
    """Relative to the largest output: 1 % for eight bits (both round to bfloat16), 3 % for four (activations too)."""
    made = quantize(_draw(9, inputs), bits=bits, group=64, name="w")
    layer = QuantizedLinear(made)
    if not has_kernels:
        layer._kernels = None
    x = _draw(2, 20, inputs).to(torch.float32 if inputs == 96 else torch.bfloat16)
    many = layer(x)
    assert (many.dtype, tuple(many.shape)) == (x.dtype, (2, 20, 9))
    few = torch.stack([torch.cat([layer(row[i : i + 5]) for i in range(0, 20, 5)]) for row in x])
    tolerance = (0.01 if bits == 8 else 0.03) * float(many.abs().max())
    assert float((few - many).abs().max()) <= tolerance
    plain = dequantize(made.values, made.scales)[:, :inputs].float()
    assert float((many.float() - x.float() @ plain.T).abs().max()) <= tolerance
    assert tuple(layer(x[:, :0]).shape) == (2, 0, 9)


def test_expanding_goes_by_blocks_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantize(_draw(9, 128), bits=4, group=64, name="w")
    x = _draw(20, 128)
    whole = QuantizedLinear(made)(x)
    monkeypatch.setattr("mistral_runtime.linear_rows.EXPANDED_OUTPUTS", 4)
    assert torch.allclose(QuantizedLinear(made)(x), whole, rtol=0.01)


def test_a_matrix_as_published_agrees_with_linear() -> None:
    kernels = row_kernels()
    assert kernels is not None
    layer, x = RowLinear(_draw(7, 96), kernels), _draw(2, 3, 96)
    expected = torch.nn.functional.linear(x.float(), layer.weight.float())
    assert torch.allclose(layer(x).float(), expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    assert torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), layer(x))
