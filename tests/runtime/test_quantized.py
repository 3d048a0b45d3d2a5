"""Weights of 8 and 4 bits: how far from the published ones they may be, and what is not made at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.errors import BadRequest, NonFiniteWeights
from mistral_runtime.quantized import QuantizedWeight, dequantize, quantize, stored_shapes

KINDS = [(8, 64), (8, 128), (4, 64), (4, 128)]


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _quantize(weight: Tensor, bits: int, group: int) -> QuantizedWeight:
    return quantize(weight, bits=bits, group=group, name="w")


def _exact(made: QuantizedWeight, group: int) -> Tensor:
    """Return what the integers and scales stand for, without the rounding to bfloat16; as wide as the source."""
    scales = made.scales.double().transpose(1, 2).flatten(0, 1).repeat_interleave(group, dim=1)
    return (_integers(made) * scales)[: made.outputs, : made.inputs]


def _integers(made: QuantizedWeight) -> Tensor:
    return dequantize(replace(made, scales=torch.ones_like(made.scales))).double()


def _restored(made: QuantizedWeight) -> Tensor:
    return dequantize(made)[: made.outputs]


def _largest(weight: Tensor, group: int) -> Tensor:
    """Return the largest magnitude of each weight's group, in the shape of the weights."""
    padded = torch.nn.functional.pad(weight.double().abs(), (0, -weight.shape[1] % 128))
    groups = padded.unflatten(1, (-1, group)).amax(-1)
    return groups.repeat_interleave(group, dim=1)[:, : weight.shape[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [64, 96, 128, 130, 512])
@pytest.mark.parametrize("bits, group", KINDS)
def test_no_weight_is_further_off_than_its_bits_allow(bits: int, group: int, inputs: int, dtype: torch.dtype) -> None:
    """Eight bits: half a step of 1/127, and 1/256 for the scale in bfloat16.

    Four bits: a fifth of the largest, where clipping it served the rest; half a step is a fourteenth.
    """
    weight = _draw(9, inputs, dtype=dtype)
    made = _quantize(weight, bits, group)
    assert (made.bits, made.outputs, made.inputs, made.padded_inputs) == (bits, 9, inputs, -(-inputs // 128) * 128)
    assert (made.values.shape, made.scales.shape) == stored_shapes(9, inputs, bits=bits, group=group)
    error = (_exact(made, group) - weight.double()).abs() / _largest(weight, group)
    assert float(error.max()) <= (0.5 / 127 + 1 / 256 if bits == 8 else 0.21)
    root = float(((_exact(made, group) - weight.double()).square().mean() / weight.double().square().mean()).sqrt())
    assert root <= (0.01 if bits == 8 else 0.12)


def test_four_bits_are_at_least_as_good_as_leaving_every_largest_weight_whole() -> None:
    weight = _draw(64, 512)
    groups = weight.float().unflatten(1, (-1, 64))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8).to(torch.bfloat16).float()
    plain = (groups / scales).round().clamp(-8, 7) * scales - groups
    found = _exact(_quantize(weight, 4, 64), 64).unflatten(1, (-1, 64)) - groups
    assert bool((found.square().sum(-1) <= plain.square().sum(-1) * (1 + 1e-6)).all())
    assert float(found.square().sum()) < 0.97 * float(plain.square().sum())


@pytest.mark.parametrize("bits, group", KINDS)
def test_what_lies_on_the_grid_stays(bits: int, group: int) -> None:
    most = 127 if bits == 8 else 7
    least = -127 if bits == 8 else -8
    integers = torch.randint(least, most + 1, (5, 256), generator=torch.Generator().manual_seed(0))
    integers[:, ::64] = least  # every group has its largest, as a positive number in every other row
    signs = torch.tensor([1, -1, 1, -1, 1])[:, None]
    weight = (integers * signs * 0.25).float()
    made = _quantize(weight, bits, group)
    assert torch.equal(_exact(made, group), weight.double())
    assert torch.equal(_restored(made), weight.to(torch.bfloat16))


@pytest.mark.parametrize("bits, group", KINDS)
def test_a_group_of_zeros_stays_zero_beside_others(bits: int, group: int) -> None:
    weight = _draw(3, 256)
    weight[1, :128] = 0
    made = _quantize(weight, bits, group)
    restored = _restored(made)
    assert not restored[1, :128].any()
    assert restored[1, 128:].any()
    assert not dequantize(_quantize(torch.zeros(2, 128), bits, group)).any()


@pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-32, 1e4, 1e22, 3e38])
@pytest.mark.parametrize("bits, group", KINDS)
def test_weights_of_any_size_are_numbers(bits: int, group: int, size: float) -> None:
    """An outlier is kept to within its bits, and neither the smallest nor the largest floats make a NaN."""
    weight = _draw(3, 256, dtype=torch.float32).clamp(-1, 1) * 0.9
    weight[2] *= size
    weight[1, 5] = size
    made = _quantize(weight, bits, group)
    exact = _exact(made, group)
    assert torch.isfinite(made.scales).all()
    assert torch.isfinite(exact).all()
    bound = (0.5 / 127 + 1 / 256 if bits == 8 else 0.21) * _largest(weight, group)
    assert bool(((exact - weight.double()).abs() <= bound + 2.0**-112).all())
    assert torch.equal(exact[0], _exact(_quantize(weight[:1], bits, group), group)[0])


@pytest.mark.parametrize("bits, group", KINDS)
def test_tiles_are_laid_out_as_said_and_padding_is_zero(bits: int, group: int) -> None:
    most = 127.0 if bits == 8 else -8.0  # so that the scale is 1
    weight = torch.zeros(19, 130)
    weight[18, 0], weight[18, 13], weight[18, 128] = most, -5, most
    made = _quantize(weight, bits, group)
    assert made.values.shape == (2, 8 * bits, 16, 4)
    restored = dequantize(made)
    assert torch.equal(restored[:19, :130].float(), weight)
    assert not restored[19:].any()
    assert not restored[:, 130:].any()
    # Input 13 is byte 1 of the line that begins at input 12, or the high half of byte 1 of that which begins at 8.
    naught, line, half = (128, 3, 0) if bits == 8 else (8, 1, 4)
    assert (int(made.values[1, line, 2, 1]) >> half) % (1 << bits) == naught - 5
    assert int((made.values != naught * (1 if bits == 8 else 17)).sum()) == 3


@pytest.mark.parametrize("bits, group", KINDS)
def test_blocks_of_rows_make_no_difference(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _draw(37, 130)
    whole = _quantize(weight, bits, group)
    monkeypatch.setattr("mistral_runtime.quantized._VALUES_AT_ONCE", 300)
    assert all(map(torch.equal, _parts(_quantize(weight, bits, group)), _parts(whole)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_is_no_number_is_an_error_that_names_it(bits: int, bad: float) -> None:
    weight = _draw(3, 130)
    weight[2, 129] = bad
    with pytest.raises(NonFiniteWeights) as caught:
        quantize(weight, bits=bits, group=64, name="layers.0.feed_forward.w1.weight")
    assert "layers.0.feed_forward.w1.weight" in caught.value.what
    assert "found 1" in caught.value.detail


@pytest.mark.parametrize("group", [0, -64, 32, 100, 256])
def test_other_groups_are_refused(group: int) -> None:
    with pytest.raises(BadRequest, match="64, 128"):
        _quantize(_draw(2, 256), 8, group)


def _parts(made: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return made.values, made.scales
