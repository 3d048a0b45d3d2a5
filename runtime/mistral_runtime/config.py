"""The model's hyper-parameters, from Mistral's `params.json` or Hugging Face's `config.json`.

Owns the names (Mistral's, unchanged), the defaults and the ranges. A key that is not known is refused rather than
ignored: it may change the maths, and a model that is quietly a little wrong is the worst outcome. Knows
nothing of weights or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.errors import CheckpointError, MalformedConfig, UnknownConfigKey, UnsupportedModel
from mistral_runtime.strict_json import MAX_CONFIG_BYTES, load_object

ROPE_THETA_WITH_WINDOW = 1e4  # Mistral 7B v0.1 was trained with this and its params.json does not say so
ROPE_THETA_WITHOUT_WINDOW = 1e6  # v0.2 and later
DEFAULT_MAX_POSITIONS = 32768  # what config.json says for every Mistral 7B; params.json is silent

# config.json leaves out what equals the defaults of transformers' MistralConfig, so an absent key means exactly those.
HF_SLIDING_WINDOW = 4096
HF_ROPE_THETA = 1e4
HF_KEY_VALUE_HEADS = 8
HF_MAX_POSITIONS = 131072
# MixtralConfig's defaults where they differ: no window, another theta, and the experts.
HF_MIXTRAL_ROPE_THETA = 1e6
HF_MIXTRAL_EXPERTS = 8
HF_MIXTRAL_EXPERTS_PER_TOKEN = 2

_HINT = "check the file against its publisher's copy, or fetch the model again"

# Size caps are far above any published model, and low enough that no product of them overflows a size.
_CAPS = {
    "dim": 1 << 17,
    "n_layers": 1024,
    "head_dim": 4096,
    "hidden_dim": 1 << 20,
    "n_heads": 4096,
    "n_kv_heads": 4096,
    "vocab_size": 1 << 22,
    "sliding_window": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "num_experts": 256,
}


@dataclass(frozen=True)
class MoeConfig:
    """How many feed-forward networks a layer has, and how many of them each token goes through.

    Field names are those of the object `moe` in `params.json`.
    """

    num_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. Field names are those of `params.json`.

    `sliding_window` is W in "query i sees the keys j with i−W < j ≤ i", or None for plain causal attention.
    `max_position_embeddings` is the longest context the model is said to handle. It is a hard limit only without a
    window: with one, attention never looks further back than W whatever the position.
    `moe` is None for a dense model such as Mistral 7B, and the layers' mixture of experts for Mixtral.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    sliding_window: int | None = None
    max_position_embeddings: int = DEFAULT_MAX_POSITIONS
    moe: MoeConfig | None = None

    @property
    def context_limit(self) -> int | None:
        """The most positions one sequence may take, or None where the rolling cache makes it unbounded."""
        return None if self.sliding_window is not None else self.max_position_embeddings

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the checkpoint by Mistral's name, in reading order."""
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["norm.weight"] = (self.dim,)
        shapes["output.weight"] = (self.vocab_size, self.dim)
        return shapes

    def parameter_count(self) -> int:
        """Return the number of weights: 7,241,732,096 for Mistral 7B v0.1."""
        per_layer = sum(math.prod(shape) for shape in self._layer_shapes().values())
        return per_layer * self.n_layers + self.dim + 2 * self.vocab_size * self.dim

    def active_parameter_count(self) -> int:
        """Return the number of weights that take part in one token: all, less the experts it is not sent to.

        12.9 billion of Mixtral 8x7B's 46.7 (arXiv 2401.04088, section 2.1). As there, the whole embedding table counts,
        of which one token reads a single row.
        """
        if self.moe is None:
            return self.parameter_count()
        idle = self.moe.num_experts - self.moe.num_experts_per_tok
        return self.parameter_count() - self.n_layers * idle * 3 * self.hidden_dim * self.dim

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._attention_shapes() | self._feed_forward_shapes()

    def _feed_forward_shapes(self) -> dict[str, tuple[int, ...]]:
        network = {
            "w1.weight": (self.hidden_dim, self.dim),
            "w2.weight": (self.dim, self.hidden_dim),
            "w3.weight": (self.hidden_dim, self.dim),
        }
        if self.moe is None:
            return {f"feed_forward.{name}": shape for name, shape in network.items()}
        shapes: dict[str, tuple[int, ...]] = {"feed_forward.gate.weight": (self.moe.num_experts, self.dim)}
        for expert in range(self.moe.num_experts):
            shapes |= {f"feed_forward.experts.{expert}.{name}": shape for name, shape in network.items()}
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "attention_norm.weight": (self.dim,),
            "attention.wq.weight": (self.n_heads * self.head_dim, self.dim),
            "attention.wk.weight": (self.n_kv_heads * self.head_dim, self.dim),
            "attention.wv.weight": (self.n_kv_heads * self.head_dim, self.dim),
            "attention.wo.weight": (self.dim, self.n_heads * self.head_dim),
            "ffn_norm.weight": (self.dim,),
        }


# params.json: keys that carry nothing for one-sequence inference, and keys accepted at the value that means "plain".
_PARAMS_IGNORED = {"max_batch_size"}
_PARAMS_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "use_biases": (False, None),
    "tied_embeddings": (False, None),
    "causal": (True, None),
    "model_type": ("transformer", None),
}
_PARAMS_KEYS = {
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta",
    "sliding_window", "max_seq_len", "max_position_embeddings", "moe",
}  # fmt: skip


def load_params_json(path: Path) -> ModelConfig:
    """Read Mistral's own `params.json`."""
    return parse_params(_load(path), source=str(path))


def load_config_json(path: Path) -> ModelConfig:
    """Read Hugging Face's `config.json`."""
    return parse_hf_config(_load(path), source=str(path))


def _load(path: Path) -> dict[str, Any]:
    return load_object(path, max_bytes=MAX_CONFIG_BYTES, error_class=MalformedConfig, hint=_HINT)


def parse_params(params: dict[str, Any], *, source: str) -> ModelConfig:
    """Turn the object in `params.json` into a ModelConfig.

    Raises:
        UnsupportedModel: It describes biases or tied embeddings.
        UnknownConfigKey: A key that is not known here.
        MalformedConfig: A value missing or out of range.
    """
    _refuse_unknown(params, _PARAMS_KEYS | _PARAMS_IGNORED | set(_PARAMS_PLAIN_VALUES), source)
    _require_plain(params, _PARAMS_PLAIN_VALUES, source)
    fields = _Fields(params, source)
    window = fields.optional_size("sliding_window", cap="sliding_window")
    dim, n_heads = fields.size("dim"), fields.size("n_heads")
    return _checked(
        ModelConfig(
            dim=dim,
            n_layers=fields.size("n_layers"),
            head_dim=fields.optional_size("head_dim", cap="head_dim") or _default_head_dim(dim, n_heads, source),
            hidden_dim=fields.size("hidden_dim"),
            n_heads=n_heads,
            n_kv_heads=fields.optional_size("n_kv_heads", cap="n_kv_heads") or n_heads,
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("norm_eps", at_most=1.0),
            rope_theta=fields.optional_positive("rope_theta", at_most=1e12) or _default_theta(window),
            sliding_window=window,
            max_position_embeddings=fields.optional_size("max_position_embeddings", cap="max_position_embeddings")
            or fields.optional_size("max_seq_len", cap="max_position_embeddings")
            or DEFAULT_MAX_POSITIONS,
            moe=_params_moe(params.get("moe"), source),
        ),
        source,
    )


def _params_moe(moe: Any, source: str) -> MoeConfig | None:
    """Read the object `moe`: absent or null for a dense model. Both its numbers must be there."""
    if moe is None:
        return None
    if not isinstance(moe, dict):
        raise _bad_value(source, "moe", "an object", moe)
    _refuse_unknown(moe, {"num_experts", "num_experts_per_tok"}, f"{source}, under moe,")
    fields = _Fields(moe, f"{source}, under moe,")
    return _moe(fields, "num_experts")


def _moe(fields: _Fields, count_key: str) -> MoeConfig:
    return MoeConfig(fields.size(count_key, cap="num_experts"), fields.size("num_experts_per_tok", cap="num_experts"))


# config.json: keys that never reach the maths of greedy or sampled decoding of one sequence.
_HF_IGNORED = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache", "torchscript", "return_dict_in_generate", "_attn_implementation_autoset",
}  # fmt: skip
_HF_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("mistral", "mixtral"),
    "hidden_act": ("silu", None),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
}
_HF_KEYS = {
    "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "rope_theta", "rope_parameters", "sliding_window", "max_position_embeddings",
    "layer_types",
}  # fmt: skip
_HF_MIXTRAL_KEYS = {"num_local_experts", "num_experts_per_tok"}
# The loss that balances the experts and the noise that shakes the router belong to training, the logits to its logs.
_HF_MIXTRAL_IGNORED = {"router_aux_loss_coef", "router_jitter_noise", "output_router_logits"}


def parse_hf_config(config: dict[str, Any], *, source: str) -> ModelConfig:
    """Turn the object in Hugging Face's `config.json`, of Mistral or of Mixtral, into a ModelConfig.

    Accepts `rope_theta` at the top (transformers 4) or inside `rope_parameters` (transformers 5). An absent key means
    transformers' default, which for `sliding_window` and `num_key_value_heads` is not what null means.

    Raises:
        UnsupportedModel: Another architecture, or a setting that changes the maths.
        UnknownConfigKey: A key that is not known here.
        MalformedConfig: A value missing or out of range.
    """
    if config.get("model_type") not in ("mistral", "mixtral"):
        raise UnsupportedModel(
            f"{source} describes another architecture",
            detail=f"expected model_type 'mistral' or 'mixtral', found {str(config.get('model_type'))[:120]!r}",
            hint="run this snapshot with an engine made for that architecture",
        )
    is_mixtral = config["model_type"] == "mixtral"
    moe_keys = _HF_MIXTRAL_KEYS | _HF_MIXTRAL_IGNORED if is_mixtral else set()
    _refuse_unknown(config, _HF_KEYS | _HF_IGNORED | set(_HF_PLAIN_VALUES) | moe_keys, source)
    _require_plain(config, _HF_PLAIN_VALUES, source)
    defaults = {
        "sliding_window": None if is_mixtral else HF_SLIDING_WINDOW,
        "num_key_value_heads": HF_KEY_VALUE_HEADS,
        "num_local_experts": HF_MIXTRAL_EXPERTS,
        "num_experts_per_tok": HF_MIXTRAL_EXPERTS_PER_TOKEN,
    }
    fields = _Fields(defaults | config, source)
    window = fields.optional_size("sliding_window", cap="sliding_window")
    _require_uniform_layers(config.get("layer_types"), window, source)
    dim, n_heads = fields.size("hidden_size", cap="dim"), fields.size("num_attention_heads", cap="n_heads")
    return _checked(
        ModelConfig(
            dim=dim,
            n_layers=fields.size("num_hidden_layers", cap="n_layers"),
            head_dim=fields.optional_size("head_dim", cap="head_dim") or _default_head_dim(dim, n_heads, source),
            hidden_dim=fields.size("intermediate_size", cap="hidden_dim"),
            n_heads=n_heads,
            n_kv_heads=fields.optional_size("num_key_value_heads", cap="n_kv_heads") or n_heads,
            vocab_size=fields.size("vocab_size"),
            norm_eps=fields.positive("rms_norm_eps", at_most=1.0),
            rope_theta=_hf_rope_theta(config, source) or (HF_MIXTRAL_ROPE_THETA if is_mixtral else HF_ROPE_THETA),
            sliding_window=window,
            max_position_embeddings=fields.optional_size("max_position_embeddings", cap="max_position_embeddings")
            or HF_MAX_POSITIONS,
            moe=_moe(fields, "num_local_experts") if is_mixtral else None,
        ),
        source,
    )


def _hf_rope_theta(config: dict[str, Any], source: str) -> float | None:
    top = _Fields(config, source).optional_positive("rope_theta", at_most=1e12)
    nested = config.get("rope_parameters")
    if nested is None:
        return top
    if not isinstance(nested, dict):
        raise _bad_value(source, "rope_parameters", "an object", nested)
    _refuse_unknown(nested, {"rope_theta", "rope_type", "partial_rotary_factor"}, source)
    _require_plain(nested, {"rope_type": ("default", None), "partial_rotary_factor": (1, None)}, source)
    inner = _Fields(nested, source).optional_positive("rope_theta", at_most=1e12)
    if top is not None and inner is not None and top != inner:
        raise MalformedConfig(
            f"{source} gives two values for rope_theta", detail=f"expected one, found {top} and {inner}", hint=_HINT
        )
    return top if inner is None else inner


def _require_uniform_layers(layer_types: Any, window: int | None, source: str) -> None:
    """Refuse models that mix windowed and full layers; transformers writes `layer_types` for some versions."""
    expected = "full_attention" if window is None else "sliding_attention"
    if layer_types is not None and (not isinstance(layer_types, list) or any(kind != expected for kind in layer_types)):
        raise UnsupportedModel(
            f"{source} mixes kinds of attention",
            detail=f"expected every entry of layer_types to be {expected!r}, found {str(layer_types)[:80]}",
            hint="run this snapshot with an engine made for that architecture",
        )


def _default_theta(window: int | None) -> float:
    return ROPE_THETA_WITHOUT_WINDOW if window is None else ROPE_THETA_WITH_WINDOW


def _default_head_dim(dim: int, n_heads: int, source: str) -> int:
    if dim % n_heads:
        raise MalformedConfig(
            f"{source} gives no head_dim and dim does not divide by the heads",
            detail=f"expected dim to be a multiple of n_heads, found {dim} and {n_heads}",
            hint=_HINT,
        )
    return dim // n_heads


def _checked(config: ModelConfig, source: str) -> ModelConfig:
    if config.n_heads % config.n_kv_heads:
        raise MalformedConfig(
            f"{source}: the key heads do not divide the query heads",
            detail=f"expected n_heads to be a multiple of n_kv_heads, found {config.n_heads} and {config.n_kv_heads}",
            hint=_HINT,
        )
    moe = config.moe
    if moe is not None and moe.num_experts_per_tok > moe.num_experts:
        raise MalformedConfig(
            f"{source} sends each token to more experts than there are",
            detail=f"expected num_experts_per_tok up to {moe.num_experts}, found {moe.num_experts_per_tok}",
            hint=_HINT,
        )
    if config.head_dim % 2:
        raise _bad_value(source, "head_dim", "an even number (rotary pairs)", config.head_dim)
    return config


def _refuse_unknown(keys: dict[str, Any], known: set[str], source: str) -> None:
    unknown = sorted(set(keys) - known)
    if unknown:
        raise UnknownConfigKey(
            f"{source} has an unknown key: {', '.join(unknown[:5])}",
            detail="expected only keys whose effect is known here, found "
            f"{len(unknown)} that may change what the model computes",
            hint="this runtime is too old for the file, or the file is not the publisher's; it will not guess",
        )


def _require_plain(keys: dict[str, Any], plain: dict[str, tuple[Any, ...]], source: str) -> None:
    for key, accepted in plain.items():
        # `1 == True` in Python; types are compared too so that {"causal": 1} does not slip through.
        if key in keys and not any(keys[key] == value and type(keys[key]) is type(value) for value in accepted):
            raise UnsupportedModel(
                f"{source} sets {key} to something this runtime does not compute",
                detail=f"expected {accepted[0]!r}, found {str(keys[key])[:120]}",
                hint="run this snapshot with an engine that supports it",
            )


def _bad_value(source: str, key: str, expected: str, found: object) -> CheckpointError:
    return MalformedConfig(
        f"{source} has a bad value for {key}", detail=f"expected {expected}, found {str(found)[:120]}", hint=_HINT
    )


class _Fields:
    """Typed reads from one JSON object; each failure names the file and the key."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def size(self, key: str, *, cap: str | None = None) -> int:
        """Return a required positive integer within the cap registered under `cap` (default: under `key`)."""
        largest = _CAPS[cap or key]
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise _bad_value(self._source, key, f"an integer from 1 to {largest}", value)
        return value

    def optional_size(self, key: str, *, cap: str) -> int | None:
        """Return a positive integer, or None when the key is absent or null."""
        return None if self._values.get(key) is None else self.size(key, cap=cap)

    def positive(self, key: str, *, at_most: float) -> float:
        """Return a required number in (0, at_most]."""
        value = self._values.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= at_most:  # type: ignore[operator]  # NaN fails both comparisons
            raise _bad_value(self._source, key, f"a number above 0 and up to {at_most:g}", value)
        return float(value)  # type: ignore[arg-type]

    def optional_positive(self, key: str, *, at_most: float) -> float | None:
        """Return a number in (0, at_most], or None when the key is absent or null."""
        return None if self._values.get(key) is None else self.positive(key, at_most=at_most)
