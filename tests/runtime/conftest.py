"""Tiny checkpoints with fixed seeds, written in every published layout, and a small real tokenizer.

The weights are drawn wide enough that attention is sharp: a wrong window, theta or row order changes logits by far
more than any rounding.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_runtime.config import ModelConfig, MoeConfig

TINY = ModelConfig(
    dim=64,
    n_layers=2,
    head_dim=16,
    hidden_dim=96,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=300,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=8,
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices gain nothing from a second thread, and on a busy machine two wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Grouped heads 4:1 and a window of 8."""
    return TINY


@pytest.fixture(scope="session")
def moe_config() -> ModelConfig:
    """Two of five experts a token, and no window, as Mixtral."""
    return replace(TINY, sliding_window=None, rope_theta=1e6, moe=MoeConfig(num_experts=5, num_experts_per_tok=2))


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., dict[str, Tensor]]:
    """Return a function that draws a consolidated state dict for a configuration."""

    def make(config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in config.tensor_shapes().items():
            drawn = torch.randn(shape, generator=generator) * 0.15
            weights[name] = (1 + drawn if len(shape) == 1 else drawn).to(dtype)
        return weights

    return make


def params_object(config: ModelConfig) -> dict[str, object]:
    """Return `params.json` as Mistral writes it."""
    keys = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    params: dict[str, object] = {key: getattr(config, key) for key in keys}
    if config.moe is not None:
        params["moe"] = asdict(config.moe)
    return params | {"rope_theta": config.rope_theta, "sliding_window": config.sliding_window}


def config_object(config: ModelConfig) -> dict[str, object]:
    """Return `config.json` as transformers 4 wrote it for Mistral 7B and Mixtral 8x7B."""
    moe: dict[str, object] = {}
    if config.moe is not None:
        moe = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "num_local_experts": config.moe.num_experts,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
        }
    return {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "mistral",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    } | moe


_HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}


def to_huggingface(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename, and permute wq and wk row by row: row h·D + 2i + p goes to h·D + p·D/2 + i."""
    half = config.head_dim // 2
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if rest in ("attention.wq.weight", "attention.wk.weight"):
                order = [
                    head * config.head_dim + 2 * i + part
                    for head in range(len(tensor) // config.head_dim)
                    for part in range(2)
                    for i in range(half)
                ]
                tensor = tensor[order]
            inner = _HF_NAMES.get(rest) or rest.replace("feed_forward.", "block_sparse_moe.")
            renamed[f"model.layers.{layer}.{inner}"] = tensor
        else:
            renamed[_HF_NAMES[name]] = tensor
    return renamed


def write_pth(directory: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Write the torrent's layout."""
    torch.save(weights, directory / "consolidated.00.pth")
    (directory / "params.json").write_text(json.dumps(params_object(config)))


def write_consolidated_safetensors(directory: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Write the layout of v0.3's `consolidated.safetensors`."""
    save_file(weights, directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps(params_object(config)))


def write_huggingface(directory: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Write two shards and their index."""
    renamed = to_huggingface(weights, config)
    names = sorted(renamed)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: renamed[name].contiguous() for name in half}, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config_object(config)))


LAYOUTS = {
    "pth": write_pth,
    "consolidated": write_consolidated_safetensors,
    "huggingface": write_huggingface,
}


@pytest.fixture(scope="session", params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    """Run the test once per published layout."""
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    """Train a sentencepiece model as Mistral's are made: BPE, byte fallback, dummy prefix, 300 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the wind goes over the hill and the hill stays", "a question and an answer"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=TINY.vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def write_snapshot(
    make_weights: Callable[..., dict[str, Tensor]], tokenizer_bytes: bytes
) -> Callable[..., dict[str, Tensor]]:
    """Return a function that writes a complete tiny snapshot into a directory and returns its weights."""

    def write(
        directory: Path,
        layout: str = "pth",
        *,
        config: ModelConfig = TINY,
        dtype: torch.dtype = torch.float32,
        **changes: object,
    ) -> dict[str, Tensor]:
        directory.mkdir(parents=True, exist_ok=True)
        config = replace(config, **changes)  # type: ignore[arg-type]
        weights = make_weights(config, dtype=dtype)
        LAYOUTS[layout](directory, weights, config)
        (directory / "tokenizer.model").write_bytes(tokenizer_bytes)
        return weights

    return write
