"""Tiny models for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.tokenizer import Tokenizer
from mistral_runtime.transformer import Transformer

DEMO = Path(__file__).parents[3] / "mistral_fetch/demo_model"


def build(config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a model with these weights."""
    model = Transformer(config)
    model.load_state_dict(weights)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session", params=["window", "plain"])
def model(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]
) -> Transformer:
    """A tiny model, with a window of 8 and without."""
    config = tiny_config if request.param == "window" else replace(tiny_config, sliding_window=None)
    return build(config, make_weights(config))


@pytest.fixture(scope="session")
def plain_model(tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]) -> Transformer:
    """A tiny model without a window."""
    config = replace(tiny_config, sliding_window=None)
    return build(config, make_weights(config))


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """The demo's snapshot."""
    return DEMO


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    """The demo's vocabulary."""
    return Tokenizer(DEMO / "tokenizer.model")
