"""LoRA adapters: merged and apart against the reference, both formats against each other, and files that lie."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mistral_runtime import lora
from mistral_runtime.__main__ import main
from mistral_runtime.adapter import Adapter, open_adapter
from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request
from mistral_runtime.errors import (
    CheckpointError,
    DtypeMismatch,
    MalformedCheckpoint,
    MalformedConfig,
    MissingFile,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
    UnknownConfigKey,
    UnsafePickle,
    UnsupportedModel,
)
from mistral_runtime.reference import reference_generate, reference_logits
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]
Pairs = dict[str, tuple[Tensor, Tensor]]
RANK = 3
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def _draw_pairs(config: ModelConfig, *, rank: int = RANK) -> Pairs:
    """Return A (r, in) and B (out, r) for every matrix of the layers, in Mistral's order."""
    generator = torch.Generator().manual_seed(7)
    pairs = {}
    for name, shape in config.tensor_shapes().items():
        if name.startswith("layers.") and len(shape) == 2:
            a = torch.randn(rank, shape[1], generator=generator) * 0.1
            pairs[name.removesuffix(".weight")] = (a, torch.randn(shape[0], rank, generator=generator) * 0.1)
    return pairs


def _merged_by_hand(weights: dict[str, Tensor], pairs: Pairs, scale: float) -> dict[str, Tensor]:
    changed = {f"{name}.weight": weights[f"{name}.weight"].float() + scale * (b @ a) for name, (a, b) in pairs.items()}
    return weights | changed


def _write_finetune(directory: Path, pairs: Pairs, **params: object) -> Path:
    directory.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, directory / "lora.safetensors")
    if params:
        (directory / "params.json").write_text(json.dumps(params))
    return directory


def _rows_as_huggingface(b: Tensor, head_dim: int) -> Tensor:
    """Row 2i + p of each head goes to p·D/2 + i."""
    order = [
        head * head_dim + 2 * i + part
        for head in range(len(b) // head_dim)
        for part in range(2)
        for i in range(head_dim // 2)
    ]
    return b[order].contiguous()


PEFT_CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "someone/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "lora_alpha": 4.5,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "mlp.up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}  # as PEFT 0.21 writes it, with the scale 1.5


def _write_peft(directory: Path, pairs: Pairs, head_dim: int, **changes: object) -> Path:
    directory.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        _, layer, inner = name.split(".", 2)
        module = f"base_model.model.model.layers.{layer}.{HF_NAMES[inner]}"
        if inner in ("attention.wq", "attention.wk"):
            b = _rows_as_huggingface(b, head_dim)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | changes))
    return directory


def _load(directory: Path, adapter: Adapter | None = None, *, apart: bool = False, **options: Any) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    checkpoint = open_checkpoint(files, config)
    dtype = options.get("dtype") or checkpoint.dtype
    transforms = [lora.merging(adapter, dtype=dtype)] if adapter and not apart else []
    model = load_model(checkpoint, config, transforms=transforms, **options)
    if adapter and apart:
        lora.set_apart(model, adapter)
    return model


def _tokens(count: int, config: ModelConfig) -> list[int]:
    drawn = torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
    return [int(token) for token in drawn]


@torch.inference_mode()
def _logits(model: Transformer, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens]), model.new_cache(len(tokens)))[0]


# --- the same numbers, whichever way -----------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_logits_and_greedy_tokens_equal_the_reference(
    apart: bool, layout: str, tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path / "model", layout)
    pairs = _draw_pairs(tiny_config)
    adapter = open_adapter(_write_finetune(tmp_path / "adapter", pairs), tiny_config)
    model = _load(tmp_path / "model", adapter, apart=apart)
    tokens, expected = _tokens(20, tiny_config), _merged_by_hand(weights, pairs, 2.0)
    reference = reference_logits(expected, tiny_config, tokens)
    assert float((_logits(model, tokens) - reference).abs().max()) < 3e-5
    assert float((reference_logits(weights, tiny_config, tokens) - reference).abs().max()) > 0.1
    answer = list(Engine(model).generate(Request(tokens, 8)))
    assert answer == reference_generate(expected, tiny_config, tokens, 8)


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_experts_and_their_gate_are_changed_too(
    apart: bool, tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path / "model", config=moe_config)
    pairs = _draw_pairs(moe_config)
    assert "layers.1.feed_forward.experts.4.w2" in pairs
    assert "layers.0.feed_forward.gate" in pairs
    adapter = open_adapter(_write_finetune(tmp_path / "adapter", pairs), moe_config)
    tokens = _tokens(20, moe_config)
    reference = reference_logits(_merged_by_hand(weights, pairs, 2.0), moe_config, tokens)
    logits = _logits(_load(tmp_path / "model", adapter, apart=apart), tokens)
    assert float((logits - reference).abs().max()) < 3e-5


def test_both_formats_of_one_adapter_are_the_same_bits(tmp_path: Path, tiny_config: ModelConfig) -> None:
    pairs = _draw_pairs(tiny_config)
    scaled = {"lora": {"enable": True, "rank": RANK, "dropout": 0.0, "scaling": 1.5}}
    ours = open_adapter(_write_finetune(tmp_path / "ours", pairs, **scaled), tiny_config)
    theirs = open_adapter(_write_peft(tmp_path / "theirs", pairs, tiny_config.head_dim), tiny_config)
    assert (ours.layout, theirs.layout) == ("mistral-finetune", "peft")
    assert ours.scale.value == theirs.scale.value == 1.5
    assert ours.pairs.keys() == theirs.pairs.keys() == pairs.keys()
    for name, pair in ours.pairs.items():
        assert torch.equal(pair.a, theirs.pairs[name].a), name
        assert torch.equal(pair.b, theirs.pairs[name].b), name


@pytest.mark.interop
@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_a_peft_adapter_equals_transformers_with_its_weights_merged(
    apart: bool, tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the outside oracle of this test")
    write_snapshot(tmp_path / "model", "huggingface")
    directory = _write_peft(tmp_path / "adapter", _draw_pairs(tiny_config), tiny_config.head_dim)
    oracle = transformers.MistralForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = load_file(directory / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                oracle.get_submodule(module).weight += 1.5 * (b @ a)
    tokens = _tokens(20, tiny_config)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    model = _load(tmp_path / "model", open_adapter(directory, tiny_config), apart=apart)
    assert float((_logits(model, tokens) - expected).abs().max()) < 2e-5
    theirs = oracle.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert list(Engine(model).generate(Request(tokens, 8))) == theirs[0, 20:].tolist()


def test_merging_rounds_once_and_whatever_the_block(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_ROWS", 7)
    weights = write_snapshot(tmp_path / "model", dtype=torch.bfloat16)
    pairs = _draw_pairs(tiny_config)
    adapter = open_adapter(_write_finetune(tmp_path / "adapter", pairs), tiny_config)
    expected = _merged_by_hand(weights, pairs, 2.0)
    wide = _load(tmp_path / "model", adapter, dtype=torch.float32).state_dict()
    narrow = _load(tmp_path / "model", adapter).state_dict()
    for name, weight in expected.items():
        assert torch.allclose(wide[name], weight.float(), atol=1e-6), name
        assert torch.equal(narrow[name], wide[name].bfloat16()), name


def test_apart_leaves_the_weights_and_wraps_whatever_computes_them(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    class Ones(nn.Module):
        """No weight to reach for, as a quantised matrix has none."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(*x.shape[:-1], 300)

    write_snapshot(tmp_path / "model")
    b = torch.arange(300.0)[:, None]
    adapter = open_adapter(_write_finetune(tmp_path / "adapter", {"output": (torch.ones(1, 64), b)}), tiny_config)
    model = _load(tmp_path / "model")
    model.output = Ones()  # type: ignore[assignment]
    lora.set_apart(model, adapter)
    # 1 of the matrix itself, and scale 2 · B · (A · 1) with A · 1 = 64.
    assert torch.equal(model.output(torch.ones(2, 3, 64)), (1 + 2 * b[:, 0] * 64).expand(2, 3, 300))


def test_weights_that_an_adapter_does_not_change_stay_in_the_file(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path / "model")
    pairs = _draw_pairs(tiny_config)
    some = {name: pair for name, pair in pairs.items() if name.endswith("attention.wv")}
    model = _load(tmp_path / "model", open_adapter(_write_finetune(tmp_path / "adapter", some), tiny_config))
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
    copied = {
        name
        for name, weight in model.named_parameters()
        if not any(begin <= weight.data_ptr() < end for begin, end in spans)
    }
    assert copied == {"layers.0.attention.wv.weight", "layers.1.attention.wv.weight"}


# --- the scale ---------------------------------------------------------------------------------------------------


def test_the_scale_is_asked_for_or_told_or_the_default(tmp_path: Path, tiny_config: ModelConfig) -> None:
    pairs = _draw_pairs(tiny_config)
    plain = _write_finetune(tmp_path / "plain", pairs)
    beside_a_model = _write_finetune(tmp_path / "model", pairs, dim=64)
    told = _write_finetune(tmp_path / "told", pairs, lora={"rank": RANK, "scaling": 0.5})
    assert open_adapter(plain, tiny_config).scale.value == 2.0
    assert open_adapter(plain / "lora.safetensors", tiny_config).scale.value == 2.0
    assert open_adapter(beside_a_model, tiny_config).scale.value == 2.0
    assert open_adapter(told, tiny_config).scale.value == 0.5
    assert open_adapter(told, tiny_config, scale=3.0).scale.value == 3.0


def test_rank_stabilised_adapters_divide_by_the_root(tmp_path: Path, tiny_config: ModelConfig) -> None:
    directory = _write_peft(tmp_path / "a", _draw_pairs(tiny_config), tiny_config.head_dim, use_rslora=True)
    assert open_adapter(directory, tiny_config).scale.value == pytest.approx(4.5 / math.sqrt(RANK))


def test_a_pattern_of_modules_is_told_by_the_tensors(tmp_path: Path, tiny_config: ModelConfig) -> None:
    some = {name: pair for name, pair in _draw_pairs(tiny_config).items() if name == "layers.1.attention.wv"}
    directory = _write_peft(tmp_path / "a", some, tiny_config.head_dim, target_modules="all-linear")
    assert list(open_adapter(directory, tiny_config).pairs) == ["layers.1.attention.wv"]


# --- files that are not what they claim --------------------------------------------------------------------------

WQ_A, WQ_B = "layers.0.attention.wq.lora_A.weight", "layers.0.attention.wq.lora_B.weight"
BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], type[CheckpointError], str]] = {
    "unknown target": ({"layers.0.attention.wz.lora_A.weight": torch.ones(3, 64),
                        "layers.0.attention.wz.lora_B.weight": torch.ones(64, 3)}, UnexpectedTensor, "attention.wz"),
    "embeddings": ({"tok_embeddings.lora_A.weight": torch.ones(3, 64),
                    "tok_embeddings.lora_B.weight": torch.ones(300, 3)}, UnexpectedTensor, "tok_embeddings"),
    "a norm": ({"norm.lora_A.weight": torch.ones(3, 64), "norm.lora_B.weight": torch.ones(64, 3)},
               UnexpectedTensor, "norm"),
    "deeper model": ({"layers.2.attention.wq.lora_A.weight": torch.ones(3, 64),
                      "layers.2.attention.wq.lora_B.weight": torch.ones(128, 3)}, UnexpectedTensor, "layers.2"),
    "shallower model": ({WQ_A: None, WQ_B: None}, MissingTensor, "layers.0.attention.wq"),
    "wider model": ({WQ_A: torch.ones(3, 128)}, ShapeMismatch, "(r, 64)"),
    "rows of another model": ({WQ_B: torch.ones(64, 3)}, ShapeMismatch, "(128, r)"),
    "ranks of a pair differ": ({WQ_B: torch.ones(128, 4)}, ShapeMismatch, "(128, 4)"),
    "ranks of two pairs differ": ({WQ_A: torch.ones(4, 64), WQ_B: torch.ones(128, 4)}, ShapeMismatch, "[3, 4]"),
    "rank of nothing": ({WQ_A: torch.ones(0, 64), WQ_B: torch.ones(128, 0)}, ShapeMismatch, "(0, 64)"),
    "a vector": ({WQ_A: torch.ones(64)}, ShapeMismatch, "(64,)"),
    "half a pair": ({WQ_B: None}, MissingTensor, "lora_B"),
    "a whole weight": ({"layers.0.attention.wq.weight": torch.ones(128, 64)}, UnexpectedTensor, "wq.weight"),
    "not a number": ({WQ_A: torch.full((3, 64), math.nan)}, MalformedCheckpoint, "not finite"),
    "infinite": ({WQ_B: torch.full((128, 3), math.inf)}, MalformedCheckpoint, "not finite"),
    "integers": ({WQ_A: torch.ones(3, 64, dtype=torch.int32)}, DtypeMismatch, "I32"),
}  # fmt: skip


def _refused(path: Path, config: ModelConfig, error: type[CheckpointError], mention: str) -> None:
    with pytest.raises(error) as caught:
        open_adapter(path, config)
    assert type(caught.value) is error
    assert str(caught.value).count("\n") == 2
    assert mention in str(caught.value)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name: str, tmp_path: Path, tiny_config: ModelConfig) -> None:
    changes, error, mention = BAD_TENSORS[name]
    directory = _write_finetune(tmp_path / "adapter", _draw_pairs(tiny_config))
    tensors = load_file(directory / "lora.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, directory / "lora.safetensors")
    _refused(directory, tiny_config, error, mention)


BAD_PEFT: dict[str, tuple[dict[str, object], type[CheckpointError], str]] = {
    "another method": ({"peft_type": "IA3"}, UnsupportedModel, "peft_type"),
    "trained biases": ({"bias": "all"}, UnsupportedModel, "bias"),
    "a changed base": ({"init_lora_weights": "pissa"}, UnsupportedModel, "pissa"),
    "DoRA": ({"use_dora": True}, UnknownConfigKey, "use_dora"),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 8}}, UnknownConfigKey, "rank_pattern"),
    "a setting of tomorrow": ({"use_tomorrow": 1}, UnknownConfigKey, "use_tomorrow"),
    "another rank": ({"r": 4}, ShapeMismatch, "expected 3"),
    "no rank": ({"r": None}, ShapeMismatch, "expected 3"),
    "no alpha": ({"lora_alpha": None}, MalformedConfig, "lora_alpha"),
    "negative alpha": ({"lora_alpha": -16}, MalformedConfig, "lora_alpha"),
    "endless alpha": ({"lora_alpha": 1e9}, MalformedConfig, "lora_alpha"),
    "a flag that is none": ({"use_rslora": "yes"}, MalformedConfig, "use_rslora"),
    "a target of another model": ({"target_modules": [*PEFT_CONFIG["target_modules"], "c_attn"]},
                                  UnexpectedTensor, "c_attn"),
    "more tensors than targets": ({"target_modules": ["q_proj"]}, UnexpectedTensor, "down_proj as well"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PEFT)
def test_bad_peft_configurations_are_refused(name: str, tmp_path: Path, tiny_config: ModelConfig) -> None:
    changes, error, mention = BAD_PEFT[name]
    directory = _write_peft(tmp_path / "adapter", _draw_pairs(tiny_config), tiny_config.head_dim, **changes)
    _refused(directory, tiny_config, error, mention)


@pytest.mark.parametrize("told", [{"scaling": 0}, {"scaling": True}, {"scaling": "2"}, {"scaling": 1e4}, []], ids=str)
def test_a_bad_scale_beside_the_adapter_is_refused(told: object, tmp_path: Path, tiny_config: ModelConfig) -> None:
    directory = _write_finetune(tmp_path / "adapter", _draw_pairs(tiny_config), lora=told)
    _refused(directory, tiny_config, MalformedConfig, "lora")


def test_another_rank_in_params_is_refused(tmp_path: Path, tiny_config: ModelConfig) -> None:
    directory = _write_finetune(tmp_path / "adapter", _draw_pairs(tiny_config), lora={"rank": 64, "scaling": 2.0})
    _refused(directory, tiny_config, ShapeMismatch, "found 64")


def test_a_peft_adapter_needs_its_configuration(tmp_path: Path, tiny_config: ModelConfig) -> None:
    directory = _write_peft(tmp_path / "adapter", _draw_pairs(tiny_config), tiny_config.head_dim)
    (directory / "adapter_config.json").unlink()
    _refused(directory, tiny_config, MissingFile, "adapter_config.json")


@pytest.mark.parametrize("name", ["lora.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("kind", ["archive", "bare pickle"])
def test_a_pickle_is_refused_unread(kind: str, name: str, tmp_path: Path, tiny_config: ModelConfig) -> None:
    tensors = {WQ_A: torch.ones(3, 64)}
    if kind == "archive":
        torch.save(tensors, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    _refused(tmp_path, tiny_config, UnsafePickle, name)
    _refused(tmp_path / name, tiny_config, UnsafePickle, name)


def test_damage_and_absence_are_told(tmp_path: Path, tiny_config: ModelConfig) -> None:
    _refused(tmp_path, tiny_config, MissingFile, "adapter_model.safetensors")
    _refused(tmp_path / "absent", tiny_config, MissingFile, "absent")
    directory = _write_finetune(tmp_path / "adapter", _draw_pairs(tiny_config))
    path = directory / "lora.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    _refused(directory, tiny_config, MalformedCheckpoint, "not a valid safetensors file")
    save_file({}, path)
    _refused(directory, tiny_config, MissingTensor, "changes nothing")


# --- the command line --------------------------------------------------------------------------------------------


def _generate(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, arguments), "--prompt=the hill", "--max-tokens=8", "--threads=1"])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_command_adds_an_adapter_and_says_so(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    write_snapshot(tmp_path / "model")
    adapter = _write_finetune(tmp_path / "adapter", _draw_pairs(tiny_config))
    _, plain, _ = _generate(capfd, tmp_path / "model", "--json")
    code, merged, err = _generate(capfd, tmp_path / "model", "--json", "--lora", adapter)
    _, apart, _ = _generate(capfd, tmp_path / "model", "--json", "--lora", adapter, "--lora-apart", "--lora-scale=2")
    assert code == 0
    assert f"lora: {adapter / 'lora.safetensors'} · rank 3 · scale 2 " in err
    assert json.loads(plain)["lora"] is None
    assert json.loads(merged)["lora"] == {
        "path": str(adapter / "lora.safetensors"),
        "layout": "mistral-finetune",
        "rank": 3,
        "scale": 2.0,
        "matrices": 14,
        "merged": True,
    }
    assert json.loads(apart)["lora"]["merged"] is False
    assert json.loads(apart)["text"] == json.loads(merged)["text"] != json.loads(plain)["text"]


def test_the_memory_plan_counts_the_adapter(
    tmp_path: Path, tiny_config: ModelConfig, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny_config, hidden_dim=2048)  # a few MiB, which are shown to two decimals
    write_snapshot(tmp_path / "model", config=config)
    adapter = _write_finetune(tmp_path / "adapter", _draw_pairs(config, rank=64))
    lines = [_generate(capfd, tmp_path / "model", *more)[2] for more in ([], ["--lora", adapter])]
    plain, more = (line.partition("weights ")[2].partition(" MiB")[0] for line in lines)
    added = sum(a.nbytes + b.nbytes for a, b in _draw_pairs(config, rank=64).values()) / 2**20
    assert float(more) - float(plain) == pytest.approx(added, abs=0.02)


@pytest.mark.parametrize(
    "flags, code, mention",
    [
        (["--lora-scale=2"], 2, "--lora PATH"),
        (["--lora-apart"], 2, "--lora PATH"),
        (["--lora=absent"], 40, "absent"),
        (["--lora=absent", "--lora-scale=nan"], 2, "--lora-scale"),
        (["--lora=absent", "--lora-scale=0"], 2, "--lora-scale"),
    ],
    ids=str,
)
def test_bad_flags_are_three_lines(
    flags: list[str],
    code: int,
    mention: str,
    tmp_path: Path,
    write_snapshot: WriteSnapshot,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_snapshot(tmp_path)
    found, out, err = _generate(capfd, tmp_path, "--quiet", *flags)
    assert (found, out, err.count("\n")) == (code, "", 3)
    assert mention in err
