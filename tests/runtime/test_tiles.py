"""The compiled product with quantised weights: what it computes on every kind of processor, and what it refuses."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.kernels import build
from mistral_runtime.kernels.tiles import TILE, TileKernels, tile_kernels, tiles_reason
from mistral_runtime.linear_rows import QuantizedLinear
from mistral_runtime.quantized import QuantizedWeight, dequantize, quantize

# Kernels that were built and found wrong are no reason to skip what tells how.
pytestmark = pytest.mark.skipif(
    tiles_reason() in ("no C compiler", "only on Linux"), reason="nothing compiles kernels here"
)

NO_AVX512 = ("-mno-avx512bf16", "-mno-avx512vnni", "-mno-avx512bw")
INSTRUCTIONS = {
    "all that this processor has": (),
    "no VNNI": ("-mno-avx512bf16", "-mno-avx512vnni"),
    "no AVX-512": NO_AVX512,
    "no AVX2": (*NO_AVX512, "-mno-avx512f", "-mno-avx2"),
}
KINDS = [(8, 64), (8, 128), (4, 64), (4, 128)]
SHAPES = [(1, 128), (15, 256), (16, 128), (17, 384), (64, 128), (79, 256), (130, 1024)]
ROUNDED_TO = {8: 32767, 4: 127}  # the largest integer that stands for an activation beside weights of so many bits
MOST_ROWS = 130


@pytest.fixture(scope="module", params=list(INSTRUCTIONS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TileKernels]:
    flags = INSTRUCTIONS[request.param]
    if not flags:
        native = tile_kernels()
        assert native is not None
        yield native
        return
    if platform.machine() != "x86_64":
        pytest.skip("these branches are for x86")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_OPTIONS", (*build._OPTIONS, *flags))
        patch.setenv(build.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        made = TileKernels(build.load_library(build.TILES_SOURCE))
        assert made.max_rows is not None
        yield made


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _made(bits: int, group: int, outputs: int, inputs: int) -> QuantizedWeight:
    return quantize(_draw(outputs, inputs, seed=1), bits=bits, group=group, name="w")


def _exact(made: QuantizedWeight) -> Tensor:
    """Return the weights that integers and scales stand for in float64, (N, K)."""
    integers = dequantize(replace(made, scales=torch.ones_like(made.scales))).double()
    group = made.padded_inputs // made.scales.shape[1]
    scales = made.scales.double().transpose(1, 2).flatten(0, 1).repeat_interleave(group, dim=1)
    return (integers * scales)[: made.outputs]


def _product(kernels: TileKernels, made: QuantizedWeight, x: Tensor, *, wide: bool = True) -> Tensor:
    return kernels.multiply(made.values, made.scales, x, bits=made.bits, outputs=made.outputs, wide=wide)


def _most_error(made: QuantizedWeight, x: Tensor) -> Tensor:
    """Return how far a float32 sum over rounded activations may be from the product, by output.

    Half a step of each group's activations times its weights, and 1e-6 of all magnitudes for the sum itself.
    """
    groups = made.scales.shape[1]
    weights, rows = _exact(made).abs(), x.double().abs()
    steps = rows.unflatten(1, (groups, -1)).amax(-1) / ROUNDED_TO[made.bits]
    return 1e-6 * (rows @ weights.T) + 0.501 * steps @ weights.unflatten(1, (groups, -1)).sum(-1).T


def _some_rows(kernels: TileKernels) -> list[int]:
    return [rows for rows in (*range(1, 14), 23, 24, 25, 64, MOST_ROWS) if rows <= (kernels.max_rows or rows)]


@pytest.mark.parametrize("bits, group", KINDS)
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_the_product_is_that_of_float64(kernels: TileKernels, bits: int, group: int, outputs: int, inputs: int) -> None:
    made = _made(bits, group, outputs, inputs)
    for rows in _some_rows(kernels):
        x = _draw(rows, inputs, seed=rows)
        wide = _product(kernels, made, x)
        assert (wide.dtype, tuple(wide.shape)) == (torch.float32, (rows, outputs))
        assert bool(((wide.double() - x.double() @ _exact(made).T).abs() <= _most_error(made, x)).all())
        assert torch.equal(_product(kernels, made, x, wide=False), wide.to(torch.bfloat16))


@pytest.mark.parametrize("bits, group", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: TileKernels, bits: int, group: int) -> None:
    """Bit for bit, also beside a row of NaN, at any place, in a step or a prompt, and with any number of threads."""
    made = _made(bits, group, 85, 384)
    x = _draw(MOST_ROWS, 384)
    alone = torch.cat([_product(kernels, made, row[None]) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in range(1, (kernels.max_rows or MOST_ROWS) + 1):
                order = torch.arange(MOST_ROWS).roll(rows)[:rows]
                assert torch.equal(_product(kernels, made, x[order]), alone[order])
            broken = x[:20].clone()
            broken[3] = torch.nan
            others = [row for row in range(20) if row != 3]
            assert torch.equal(_product(kernels, made, broken)[others], alone[others])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits, group", KINDS)
def test_the_largest_sums_there_can_be_are_right(kernels: TileKernels, bits: int, group: int) -> None:
    """All weights and activations at an end of their range: nothing overflows or saturates."""
    scales = torch.ones(1, 128 // group, TILE, dtype=torch.bfloat16)
    for integer in (0, (1 << bits) - 1):
        values = torch.full((1, 4 * bits, TILE, 4), integer if bits == 8 else integer * 17, dtype=torch.uint8)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), sign, dtype=torch.bfloat16)
            found = kernels.multiply(values, scales, x, bits=bits, outputs=TILE, wide=True)
            expected = torch.full_like(found, sign * 128 * (integer - (1 << (bits - 1))))
            assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("bits, group", KINDS)
def test_zeros_give_zeros(kernels: TileKernels, bits: int, group: int) -> None:
    assert not _product(kernels, _made(bits, group, 21, 256), torch.zeros(7, 256, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30, 1e-36, 1e-40])
@pytest.mark.parametrize("bits, group", KINDS)
def test_activations_of_any_size_are_rounded_in_their_own_group_only(
    kernels: TileKernels, bits: int, group: int, size: float
) -> None:
    made = _made(bits, group, 21, 256)
    x = _draw(5, 256)
    x[2, 70] = size
    x[3] *= size
    product = _product(kernels, made, x).double()
    # Below the least normal number the hardware may take a value for zero.
    assert bool(((product - x.double() @ _exact(made).T).abs() <= _most_error(made, x) + 1e-28).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits, group", KINDS)
def test_what_is_not_finite_is_not_hidden(kernels: TileKernels, bits: int, group: int, bad: float) -> None:
    made = _made(bits, group, 70, 256)
    for rows in (1, 7, 20):
        x = _draw(rows, 256)
        x[-1, 131] = bad
        product = _product(kernels, made, x, wide=False)
        assert not torch.isfinite(product[-1]).any()
        assert torch.isfinite(product[:-1]).all()


@pytest.mark.parametrize("bits, group", KINDS)
def test_expanding_is_dequantizing(kernels: TileKernels, bits: int, group: int) -> None:
    made = _made(bits, group, 45, 384)
    assert torch.equal(kernels.expand(made.values, made.scales, bits=bits), dequantize(made))
    last = kernels.expand(made.values[1:], made.scales[1:], bits=bits)
    assert torch.equal(last, dequantize(made)[TILE:])
    assert torch.equal(last[TILE:], dequantize(made, 2, 5))


# --- what never reaches the C -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 128),
        torch.zeros(2, 127, dtype=torch.bfloat16),
        torch.zeros(2, 256, dtype=torch.bfloat16),
        torch.zeros(128, dtype=torch.bfloat16),
        torch.zeros(0, 128, dtype=torch.bfloat16),
        torch.zeros(128, 2, dtype=torch.bfloat16).T,
        torch.zeros(2, 128, dtype=torch.bfloat16, device="meta"),
        torch.zeros(2, 128, dtype=torch.bfloat16).to_sparse(),
    ],
    ids=["type", "inputs", "more inputs", "one dimension", "no rows", "strides", "device", "sparse"],
)
def test_rows_that_c_would_misread_are_refused(kernels: TileKernels, x: Tensor) -> None:
    for bits in (8, 4):
        with pytest.raises(ValueError):
            _product(kernels, _made(bits, 128, 3, 128), x)


def test_more_rows_than_are_worth_it_are_refused(kernels: TileKernels) -> None:
    if kernels.max_rows is None:
        assert _product(kernels, _made(8, 128, 3, 128), _draw(300, 128)).shape == (300, 3)
        return
    with pytest.raises(ValueError, match="rows"):
        _product(kernels, _made(8, 128, 3, 128), _draw(kernels.max_rows + 1, 128))


@pytest.mark.parametrize(
    "scales",
    [
        torch.ones(1, 2, TILE),
        torch.ones(2, 2, TILE, dtype=torch.bfloat16),
        torch.ones(1, 3, TILE, dtype=torch.bfloat16),
        torch.ones(1, 8, TILE, dtype=torch.bfloat16),
        torch.ones(1, 0, TILE, dtype=torch.bfloat16),
        torch.ones(1, 2, TILE - 1, dtype=torch.bfloat16),
        torch.ones(2, TILE, dtype=torch.bfloat16),
        torch.ones(1, TILE, 2, dtype=torch.bfloat16).transpose(1, 2),
    ],
    ids=["type", "tiles", "odd group", "group of 32", "no groups", "lanes", "two dimensions", "strides"],
)
def test_scales_that_do_not_fit_are_refused(kernels: TileKernels, scales: Tensor) -> None:
    for bits in (8, 4):
        values = _made(bits, 128, TILE, 256).values
        with pytest.raises(ValueError):
            kernels.multiply(values, scales, _draw(1, 256), bits=bits, outputs=TILE)
        with pytest.raises(ValueError):
            kernels.expand(values, scales, bits=bits)


def test_values_that_do_not_fit_are_refused(kernels: TileKernels) -> None:
    made, x = _made(8, 128, 20, 256), _draw(1, 256)
    for wrong in (made.values.char(), made.values[:, ::2], made.values[0], made.values[:1], made.values[..., :2]):
        with pytest.raises(ValueError):
            kernels.multiply(wrong, made.scales, x, bits=8, outputs=20)
        with pytest.raises(ValueError):
            kernels.expand(wrong, made.scales, bits=8)
    for bits in (4, 16, 0):
        with pytest.raises(ValueError):
            kernels.multiply(made.values, made.scales, x, bits=bits, outputs=20)
    for outputs in (-1, 16, 33):
        with pytest.raises(ValueError, match="outputs"):
            kernels.multiply(made.values, made.scales, x, bits=8, outputs=outputs)


# --- in place of nn.Linear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [96, 256])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("way", ["as integers", "many rows expanded", "without kernels"])
def test_a_layer_multiplies_by_what_its_weights_stand_for(bits: int, inputs: int, way: str) -> None:
    """Relative to the largest output: 1 % for eight bits (both round to bfloat16), 3 % for four (activations too)."""
    made = quantize(_draw(9, inputs), bits=bits, group=64, name="w")
    layer = QuantizedLinear(made)
    if way == "without kernels":
        layer._kernels = None
    elif way == "many rows expanded":
        assert layer._kernels is not None
        layer._kernels = type("", (), {"max_rows": 24, "expand": layer._kernels.expand})()
    x = _draw(2, 20, inputs).to(torch.float32 if inputs == 96 else torch.bfloat16)
    product = layer(x)
    assert (product.dtype, tuple(product.shape)) == (x.dtype, (2, 20, 9))
    expected = x.float() @ dequantize(made)[:9, :inputs].float().T
    assert float((product.float() - expected).abs().max()) <= (0.01 if bits == 8 else 0.03) * float(expected.max())
    assert tuple(layer(x[:, :0]).shape) == (2, 0, 9)


def test_expanding_goes_by_blocks_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = QuantizedLinear(quantize(_draw(41, 128), bits=4, group=64, name="w")), _draw(30, 128)
    layer._kernels = None
    whole = layer(x)
    monkeypatch.setattr("mistral_runtime.linear_rows.EXPANDED_TILES", 1)
    assert torch.allclose(layer(x), whole, rtol=0.01)
