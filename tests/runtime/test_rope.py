"""The angles, wherever a range of positions begins and ends, against the definition in complex numbers."""

from __future__ import annotations

import pytest
import torch

from mistral_runtime.rope import apply_rope, rope_cos_sin

THETA, DIM = 1e4, 16


@pytest.mark.parametrize(
    "positions", [range(1), range(511, 512), range(512, 513), range(500, 530), range(100, 1600), range(32767, 32769)]
)
def test_pairs_are_turned_as_complex_numbers_are(positions: range) -> None:
    x = torch.randn(2, len(positions), 3, DIM, generator=torch.Generator().manual_seed(0))
    exponents = -torch.arange(0, DIM, 2, dtype=torch.float64) / DIM
    angles = torch.tensor(list(positions), dtype=torch.float64)[:, None, None] * THETA**exponents  # (T, 1, D/2)
    numbers = torch.view_as_complex(x.double().reshape(2, len(positions), 3, -1, 2))
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    turned = torch.cat(apply_rope(x[:, :, :2], x[:, :, 2:], *rope_cos_sin(positions, head_dim=DIM, theta=THETA)), dim=2)
    assert float((turned - expected).abs().max()) < 1e-6  # float32 arithmetic; float32 angles would be off by 2e-3


def test_angles_made_in_inference_mode_can_be_used_outside_of_it() -> None:
    with torch.inference_mode():
        rope_cos_sin(range(70_000, 70_001), head_dim=DIM, theta=THETA)
    x = torch.ones(1, 1, 1, DIM, requires_grad=True)
    turned, _ = apply_rope(x, x, *rope_cos_sin(range(70_000, 70_001), head_dim=DIM, theta=THETA))
    turned.sum().backward()
    assert x.grad is not None
