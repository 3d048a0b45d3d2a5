"""params.json and config.json: what is accepted, what it means, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mistral_runtime.config import ModelConfig, MoeConfig, load_params_json, parse_hf_config, parse_params
from mistral_runtime.errors import MalformedConfig, UnknownConfigKey, UnsupportedModel

# As published for Mistral 7B v0.1 in the torrent; it has no rope_theta.
V01_PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
# As published on Hugging Face.
V01_CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def _params(**changes: Any) -> ModelConfig:
    return parse_params(V01_PARAMS | changes, source="params.json")


def _hf(**changes: Any) -> ModelConfig:
    return parse_hf_config(V01_CONFIG | changes, source="config.json")


def test_both_files_of_v01_mean_the_same_model() -> None:
    assert _params() == _hf()
    assert _params().parameter_count() == 7_241_732_096


def test_tensor_shapes_add_up_to_the_parameter_count() -> None:
    shapes = _params().tensor_shapes()
    assert len(shapes) == 291
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_241_732_096


def test_v03_has_a_larger_vocabulary_and_no_window() -> None:
    config = _hf(vocab_size=32768, sliding_window=None, rope_theta=1e6)
    assert config.parameter_count() == 7_248_023_552
    assert config.context_limit == 32768


@pytest.mark.parametrize("window, theta", [(4096, 1e4), (None, 1e6)])
def test_theta_absent_from_params_depends_on_the_window(window: int | None, theta: float) -> None:
    assert _params(sliding_window=window).rope_theta == theta


def _hf_without(*absent: str, **changes: Any) -> ModelConfig:
    values = {key: value for key, value in (V01_CONFIG | changes).items() if key not in absent}
    return parse_hf_config(values, source="config.json")


def test_keys_absent_from_config_json_mean_what_they_mean_to_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the outside oracle of this test")
    theirs = transformers.MistralConfig()
    config = _hf_without("sliding_window", "rope_theta", "num_key_value_heads", "max_position_embeddings")
    assert config.sliding_window == theirs.sliding_window == 4096
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] == 1e4
    assert config.n_kv_heads == theirs.num_key_value_heads == 8
    assert config.max_position_embeddings == theirs.max_position_embeddings == 131072


def test_null_in_config_json_is_not_absent() -> None:
    config = _hf(sliding_window=None, num_key_value_heads=None)
    assert config.sliding_window is None
    assert config.n_kv_heads == 32


def test_the_rule_of_window_and_theta_is_not_for_config_json() -> None:
    assert _hf_without("rope_theta", sliding_window=None).rope_theta == 1e4


def test_written_theta_wins_over_the_default() -> None:
    assert _params(rope_theta=5e5).rope_theta == 5e5
    assert _params(rope_theta=1000000, sliding_window=None).rope_theta == 1e6


def test_head_dim_defaults_to_dim_over_heads() -> None:
    assert _params(head_dim=None).head_dim == 128


def test_transformers_5_spelling_of_theta_is_accepted() -> None:
    changes = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"}
    assert _hf(**changes).rope_theta == 5e5


@pytest.mark.parametrize("key", ["surprise", "quantization", "lora", "vision_encoder"])
def test_unknown_params_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnknownConfigKey, match=key):
        _params(**{key: 1})


def test_unknown_config_key_is_refused_by_name() -> None:
    with pytest.raises(UnknownConfigKey, match="logit_softcap"):
        _hf(logit_softcap=30.0)


def test_both_files_of_mixtral_8x7b_mean_the_same_model() -> None:
    ours = _params(moe={"num_experts_per_tok": 2, "num_experts": 8}, rope_theta=1e6, sliding_window=None)
    keys = {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "router_jitter_noise": 0.0}
    assert ours == _hf(model_type="mixtral", rope_theta=1e6, sliding_window=None, router_aux_loss_coef=0.02, **keys)
    # The figures of arXiv 2401.04088, table 1 ("47B" and "13B"), and of the published index: 93,405,585,408 bytes.
    assert ours.parameter_count() == sum(math.prod(shape) for shape in ours.tensor_shapes().values())
    assert ours.parameter_count() * 2 == 93_405_585_408
    assert round(ours.active_parameter_count() / 1e9, 1) == 12.9


def test_every_weight_of_a_dense_model_is_active() -> None:
    assert _params().active_parameter_count() == _params().parameter_count()


def test_moe_null_is_a_dense_model() -> None:
    assert _params(moe=None) == _params()


def test_keys_absent_from_mixtrals_config_json_mean_what_they_mean_to_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the outside oracle of this test")
    theirs = transformers.MixtralConfig()
    absent = ("sliding_window", "rope_theta", "num_key_value_heads", "max_position_embeddings")
    config = _hf_without(*absent, model_type="mixtral")
    assert config.sliding_window is theirs.sliding_window is None
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] == 1e6
    assert config.n_kv_heads == theirs.num_key_value_heads == 8
    assert config.max_position_embeddings == theirs.max_position_embeddings == 131072
    assert config.moe == MoeConfig(theirs.num_local_experts, theirs.num_experts_per_tok) == MoeConfig(8, 2)


@pytest.mark.parametrize(
    "moe, error, mention",
    [
        ({"num_experts": 8, "num_experts_per_tok": 9}, MalformedConfig, "up to 8, found 9"),
        ({"num_experts": 8}, MalformedConfig, "num_experts_per_tok"),
        ({"num_experts": 8, "num_experts_per_tok": 0}, MalformedConfig, "num_experts_per_tok"),
        ({"num_experts": 100_000, "num_experts_per_tok": 2}, MalformedConfig, "num_experts"),
        ({"num_experts": True, "num_experts_per_tok": 1}, MalformedConfig, "num_experts"),
        ([8, 2], MalformedConfig, "moe"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "route_scale": 1.0}, UnknownConfigKey, "route_scale"),
    ],
    ids=str,
)
def test_bad_mixture_is_refused(moe: object, error: type[Exception], mention: str) -> None:
    with pytest.raises(error, match=mention):
        _params(moe=moe)


def test_experts_at_the_top_of_params_are_refused_by_name() -> None:
    with pytest.raises(UnknownConfigKey, match="num_experts"):
        _params(num_experts=8)


@pytest.mark.parametrize("key", ["num_local_experts", "router_aux_loss_coef"])
def test_a_dense_config_json_has_no_experts(key: str) -> None:
    with pytest.raises(UnknownConfigKey, match=key):
        _hf(**{key: 8})


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral2"},
        {"model_type": "llama"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"quantization_config": {"bits": 4}},
        {"layer_types": ["full_attention"] * 32},
    ],
    ids=str,
)
def test_settings_that_change_the_maths_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        _hf(**changes)


@pytest.mark.parametrize("changes", [{"use_biases": True}, {"tied_embeddings": True}, {"causal": False}, {"causal": 1}])
def test_params_that_change_the_maths_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        _params(**changes)


def test_two_thetas_that_disagree_are_refused() -> None:
    with pytest.raises(MalformedConfig, match="two values"):
        _hf(rope_parameters={"rope_theta": 2e4})


BAD_VALUES: list[tuple[str, Any]] = [
    ("dim", 0),
    ("dim", -1),
    ("dim", 4096.0),
    ("dim", "4096"),
    ("dim", True),
    ("dim", None),
    ("dim", 10**30),
    ("n_layers", 10**6),
    ("head_dim", 127),
    ("n_kv_heads", 5),
    ("norm_eps", float("nan")),
    ("norm_eps", 0),
    ("norm_eps", -1e-5),
    ("norm_eps", 2.0),
    ("rope_theta", float("inf")),
    ("rope_theta", float("nan")),
    ("rope_theta", 0),
    ("rope_theta", "1e4"),
    ("sliding_window", 0),
    ("sliding_window", 1.5),
    ("sliding_window", "4096"),
    ("vocab_size", 1 << 40),
]


@pytest.mark.parametrize("key, value", BAD_VALUES, ids=str)
def test_value_out_of_range_is_refused(key: str, value: Any) -> None:
    with pytest.raises(MalformedConfig):
        _params(**{key: value})


@pytest.mark.parametrize("key", ["dim", "n_layers", "hidden_dim", "n_heads", "vocab_size", "norm_eps"])
def test_missing_value_is_refused_by_name(key: str) -> None:
    with pytest.raises(MalformedConfig, match=key):
        parse_params({k: v for k, v in V01_PARAMS.items() if k != key}, source="params.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe{}",
        b'{"dim": 1, "dim": 2}',
        b'{"norm_eps": NaN}',
        b"[" * 100_000,
        b'{"dim": ' + b"9" * 10_000 + b"}",
        b" " * (2 << 20),
    ],
    ids=["empty", "cut", "array", "utf16", "duplicate", "nan", "deep", "huge-number", "huge-file"],
)
def test_file_that_is_not_one_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_bytes(content)
    with pytest.raises(MalformedConfig) as caught:
        load_params_json(path)
    assert str(path) in caught.value.what
    assert str(caught.value).count("\n") == 2


def test_a_key_given_twice_is_refused_though_either_value_would_do(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(V01_PARAMS)[:-1] + ', "sliding_window": 8}')
    with pytest.raises(MalformedConfig, match="'sliding_window' appears twice"):
        load_params_json(path)


def test_real_params_json_loads_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(V01_PARAMS))
    assert load_params_json(tmp_path / "params.json") == _params()
