"""The compiled product with bfloat16 weights: on every kind of processor, and what it refuses."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mistral_runtime.kernels import build
from mistral_runtime.kernels.rows import MAX_ROWS, RowKernels, kernels_reason, row_kernels
from mistral_runtime.linear_rows import RowLinear

# Kernels that were built and found wrong are no reason to skip what tells how.
pytestmark = pytest.mark.skipif(
    kernels_reason() in ("no C compiler", "only on Linux"), reason="nothing compiles kernels here"
)

INSTRUCTIONS = {
    "all that this processor has": (),
    "no bfloat16": ("-mno-avx512bf16",),
    "no AVX-512": ("-mno-avx512bf16", "-mno-avx512vnni", "-mno-avx512bw"),
}


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


@pytest.mark.parametrize(
    "outputs, inputs", [(1, 128), (2, 256), (3, 1), (5, 15), (7, 33), (4, 50), (9, 97), (5, 130), (13, 1024)]
)
def test_the_product_is_that_of_float64(kernels: RowKernels, outputs: int, inputs: int) -> None:
    """To within 1e-6 of all magnitudes that are summed in float32."""
    weight = _draw(outputs, inputs, seed=1)
    for rows in range(1, MAX_ROWS + 1):
        x = _draw(rows, inputs, seed=rows)
        wide = kernels.bf16(weight, x, wide=True)
        assert wide.dtype == torch.float32
        bound = 1e-6 * (x.double().abs() @ weight.double().abs().T)
        assert bool(((wide.double() - x.double() @ weight.double().T).abs() <= bound).all())
        assert torch.equal(kernels.bf16(weight, x), wide.to(torch.bfloat16))


def test_a_row_does_not_depend_on_the_rows_beside_it(kernels: RowKernels) -> None:
    """Bit for bit, also beside a row of NaN, at any place, and with any number of threads."""
    weight, x = _draw(15, 421, seed=1), _draw(MAX_ROWS, 421)
    alone = torch.cat([kernels.bf16(weight, row[None], wide=True) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in range(1, MAX_ROWS + 1):
                order = torch.arange(MAX_ROWS).roll(rows)[:rows]
                assert torch.equal(kernels.bf16(weight, x[order], wide=True), alone[order])
            broken = x.clone()
            broken[3] = torch.nan
            others = [0, 1, 2, 4, 5, 6, 7]
            assert torch.equal(kernels.bf16(weight, broken, wide=True)[others], alone[others])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(kernels: RowKernels, bad: float) -> None:
    for rows in (1, 6):
        x = _draw(rows, 256)
        x[-1, 131] = bad
        product = kernels.bf16(_draw(7, 256, seed=1), x)
        assert not torch.isfinite(product[-1]).any()
        assert torch.isfinite(product[:-1]).all()


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
    with pytest.raises(ValueError):
        kernels.bf16(_draw(3, 128), x)


def test_a_matrix_as_published_agrees_with_linear() -> None:
    kernels = row_kernels()
    assert kernels is not None
    layer, x = RowLinear(_draw(7, 96), kernels), _draw(2, 3, 96)
    expected = torch.nn.functional.linear(x.float(), layer.weight.float())
    assert torch.allclose(layer(x).float(), expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    assert torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), layer(x))
