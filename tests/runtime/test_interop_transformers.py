"""Our logits against those of transformers' MistralForCausalLM, an implementation that shares nothing with ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is the outside oracle of these tests")
pytestmark = pytest.mark.interop

TOLERANCE = 1e-5
PROMPT_LENGTHS = (7, 8, 9, 40)  # below, at and above the window of 8, and five times it


@pytest.fixture(scope="module")
def snapshot_helpers() -> Any:
    """The writers beside the fixtures, which the importlib import mode does not let us import by name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("runtime_conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _oracle(config: ModelConfig, weights: dict[str, Tensor], helpers: Any) -> Any:
    hf_config = transformers.MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        sliding_window=config.sliding_window,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    model = transformers.MistralForCausalLM(hf_config).eval()
    model.load_state_dict(helpers.to_huggingface(weights, config), strict=True)
    return model


def _load(directory: Path) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


def _prompt(length: int, config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def _largest_difference(model: Transformer, oracle: Any, config: ModelConfig) -> float:
    """Return the largest logit difference over all prompts, for prefill, chunked prefill and single steps."""
    worst = 0.0
    for length in PROMPT_LENGTHS:
        tokens = _prompt(length, config)
        expected = oracle(tokens).logits
        for chunk in (length, 5, 1):
            cache = model.new_cache(length)
            logits = torch.cat([model(part, cache) for part in torch.split(tokens, chunk, dim=1)], dim=1)
            worst = max(worst, float((logits - expected).abs().max()))
    return worst


# (rope_theta written to the file, window, theta that it must come to mean)
THETAS = [
    pytest.param(None, 8, 1e4, id="absent-with-window"),
    pytest.param(None, None, 1e6, id="absent-without-window"),
    pytest.param(1e4, 8, 1e4, id="1e4-with-window"),
    pytest.param(1e6, 8, 1e6, id="1e6-with-window"),
    pytest.param(1e6, None, 1e6, id="1e6-without-window"),
]


@pytest.mark.parametrize("written, window, meant", THETAS)
def test_logits_equal_those_of_transformers(
    written: float | None,
    window: int | None,
    meant: float,
    layout: str,
    tmp_path: Path,
    tiny_config: ModelConfig,
    write_snapshot: Callable[..., dict[str, Tensor]],
    snapshot_helpers: Any,
) -> None:
    if written is None and layout == "huggingface":
        meant = 1e4  # transformers' own default: the rule of window and theta is for params.json
    config = replace(tiny_config, sliding_window=window, rope_theta=meant)
    weights = write_snapshot(tmp_path, layout, config=config)
    if written is None:
        _drop_key(tmp_path / ("config.json" if layout == "huggingface" else "params.json"), "rope_theta")
    oracle = _oracle(config, weights, snapshot_helpers)
    assert _largest_difference(_load(tmp_path), oracle, config) < TOLERANCE


def _drop_key(path: Path, key: str) -> None:
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "wrong",
    [{"sliding_window": 7}, {"sliding_window": 9}, {"rope_theta": 1e6}, {"rope_theta": 9e3}, {"norm_eps": 1e-2}],
    ids=str,
)
def test_the_comparison_would_notice_a_wrong_setting(
    wrong: dict[str, Any],
    tmp_path: Path,
    tiny_config: ModelConfig,
    write_snapshot: Callable[..., dict[str, Tensor]],
    snapshot_helpers: Any,
) -> None:
    weights = write_snapshot(tmp_path, "pth", config=replace(tiny_config, **wrong))
    oracle = _oracle(tiny_config, weights, snapshot_helpers)
    assert _largest_difference(_load(tmp_path), oracle, tiny_config) > 1e-3


def test_the_comparison_would_notice_rows_left_in_the_other_order(
    tmp_path: Path,
    tiny_config: ModelConfig,
    write_snapshot: Callable[..., dict[str, Tensor]],
    snapshot_helpers: Any,
) -> None:
    weights = write_snapshot(tmp_path, "pth")
    oracle = _oracle(tiny_config, weights, snapshot_helpers)
    renamed = snapshot_helpers.to_huggingface(weights, tiny_config)
    for ours, theirs in (("wq", "q_proj"), ("wk", "k_proj")):
        permuted = renamed[f"model.layers.1.self_attn.{theirs}.weight"]
        weights[f"layers.1.attention.{ours}.weight"] = permuted
    torch.save(weights, tmp_path / "consolidated.00.pth")
    assert _largest_difference(_load(tmp_path), oracle, tiny_config) > 1e-3


def test_a_directory_written_by_save_pretrained_loads(
    tmp_path: Path,
    tiny_config: ModelConfig,
    make_weights: Callable[..., dict[str, Tensor]],
    snapshot_helpers: Any,
) -> None:
    oracle = _oracle(tiny_config, make_weights(tiny_config), snapshot_helpers)
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert _largest_difference(_load(tmp_path), oracle, tiny_config) < TOLERANCE
