"""Mixtral: the routed layers against the reference and against transformers, and what a step reads of the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mistral_runtime.config import ModelConfig, MoeConfig
from mistral_runtime.device import choose_compute, plan_memory
from mistral_runtime.digest import digest_snapshot
from mistral_runtime.engine import Engine, Request
from mistral_runtime.errors import CheckpointError, MissingTensor, ShapeMismatch, UnexpectedTensor, UnsupportedModel
from mistral_runtime.mixture import MixtureOfExperts
from mistral_runtime.reference import reference_generate, reference_logits
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

WriteSnapshot = Callable[..., dict[str, Tensor]]


def _load(directory: Path) -> Transformer:
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


def _tokens(count: int, config: ModelConfig) -> list[int]:
    drawn = torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
    return [int(token) for token in drawn]


@torch.inference_mode()
def _logits(model: Transformer, tokens: list[int], chunk: int) -> Tensor:
    cache = model.new_cache(len(tokens))
    parts = [model(torch.tensor([tokens[i : i + chunk]]), cache) for i in range(0, len(tokens), chunk)]
    return torch.cat(parts, dim=1)[0]  # (T, V)


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("moe", [MoeConfig(5, 2), MoeConfig(4, 1), MoeConfig(3, 3)], ids=str)
def test_logits_equal_the_reference(
    moe: MoeConfig, chunk: int, tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    config = replace(moe_config, moe=moe)
    weights = write_snapshot(tmp_path, "consolidated", config=config)
    tokens = _tokens(24, config)
    difference = _logits(_load(tmp_path), tokens, chunk) - reference_logits(weights, config, tokens)
    assert float(difference.abs().max()) < 2e-5


def test_greedy_tokens_equal_the_reference(
    layout: str, tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    weights = write_snapshot(tmp_path, layout, config=moe_config)
    prompt = _tokens(20, moe_config)
    model = _load(tmp_path)
    assert model.config.moe == moe_config.moe
    answer = list(Engine(model, prefill_chunk=6).generate(Request(prompt, 12)))
    assert answer == reference_generate(weights, moe_config, prompt, 12)


def test_all_layouts_hold_the_same_bits(tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot) -> None:
    tokens, logits, digests = _tokens(24, moe_config), [], []
    for layout in ("pth", "consolidated", "huggingface"):
        write_snapshot(tmp_path / layout, layout, config=moe_config, dtype=torch.bfloat16)
        logits.append(_logits(_load(tmp_path / layout), tokens, 9))
        digests.append(digest_snapshot(tmp_path / layout).sha256)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert len(set(digests)) == 1


def test_bfloat16_stays_near_the_reference(
    tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    # All experts are used, so that rounding cannot choose another one; the shares still come from rounded scores.
    config = replace(moe_config, moe=MoeConfig(3, 3))
    weights = write_snapshot(tmp_path, config=config, dtype=torch.bfloat16)
    tokens = _tokens(24, config)
    expected = reference_logits(weights, config, tokens)
    assert float((_logits(_load(tmp_path), tokens, 24) - expected).norm() / expected.norm()) < 0.03


class _Constant(nn.Module):
    """An expert that answers with its own number and remembers how many tokens it was given each time."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.counts: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append(len(x))
        return torch.full_like(x, self.number)


def test_shares_are_a_softmax_over_the_chosen_scores_alone() -> None:
    layer = MixtureOfExperts(MoeConfig(4, 2), dim=4, experts=[_Constant(number) for number in range(4)])
    layer.gate.weight.data = torch.eye(4)  # scores are the token itself
    mixed = layer(torch.tensor([[[0.0, 2.0, 1.0, -5.0], [3.0, 0.0, 0.0, 3.0]]]))
    first = torch.tensor([2.0, 1.0]).softmax(0) @ torch.tensor([1.0, 2.0])
    assert mixed.shape == (1, 2, 4)
    assert torch.allclose(mixed[0, :, 0], torch.stack([first, torch.tensor(1.5)]))


def test_an_expert_is_given_only_the_tokens_that_were_sent_to_it() -> None:
    experts = [_Constant(number) for number in range(4)]
    layer = MixtureOfExperts(MoeConfig(4, 2), dim=4, experts=experts)
    layer.gate.weight.data = torch.eye(4)
    layer(torch.tensor([[[9.0, 8.0, 0.0, 0.0], [9.0, 0.0, 8.0, 0.0], [9.0, 8.0, 0.0, 0.0]]]))
    assert [expert.counts for expert in experts] == [[3], [2], [1], []]


def test_a_decoding_step_calls_no_other_experts(
    tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path, config=moe_config)
    model = _load(tmp_path)
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "w1", None), nn.Module):
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    _logits(model, _tokens(1, moe_config), 1)
    assert len(called) == len(set(called)) == moe_config.n_layers * 2


def test_experts_stay_in_the_file(tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot) -> None:
    write_snapshot(tmp_path, "huggingface", config=moe_config, dtype=torch.bfloat16)
    model = _load(tmp_path)
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters() if "feed_forward" in name}
    assert len(addresses) == moe_config.n_layers * (1 + 5 * 3)
    assert all(any(begin <= address < end for begin, end in spans) for address in addresses.values())


def test_the_memory_plan_counts_every_expert(moe_config: ModelConfig) -> None:
    compute = choose_compute(device="cpu", dtype="float32", threads=1, stored=torch.float32)
    plan = plan_memory(moe_config, compute, context=8, prefill_chunk=8)
    assert plan.weights == 4 * sum(torch.Size(shape).numel() for shape in moe_config.tensor_shapes().values())


# --- files that are not what they claim -------------------------------------------------------------------------


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


BAD_EXPERTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], type[CheckpointError], str]] = {
    "missing expert": (_drop("layers.1.feed_forward.experts.4.w2.weight"), MissingTensor, "layers.1.feed_forward.exp"),
    "missing gate": (_drop("layers.0.feed_forward.gate.weight"), MissingTensor, "gate.weight"),
    "one expert too many": (_put("layers.0.feed_forward.experts.5.w1.weight", 96, 64), UnexpectedTensor, "experts.5"),
    "gate of another shape": (_put("layers.0.feed_forward.gate.weight", 4, 64), ShapeMismatch, "(5, 64)"),
    "expert of another shape": (_put("layers.0.feed_forward.experts.0.w2.weight", 96, 64), ShapeMismatch, "(64, 96)"),
    "stacked experts": (_put("layers.0.block_sparse_moe.w1", 480, 64), UnsupportedModel, "block_sparse_moe.w1"),
    "fused experts": (_put("model.layers.0.mlp.experts.gate_up_proj", 5, 192, 64), UnsupportedModel, "gate_up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EXPERTS)
def test_bad_experts_are_refused(
    name: str, tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    change, error, mention = BAD_EXPERTS[name]
    write_snapshot(tmp_path, "consolidated", config=moe_config)
    path = tmp_path / "consolidated.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(error) as caught:
        _load(tmp_path)
    assert type(caught.value) is error
    assert mention in str(caught.value)


# --- transformers -----------------------------------------------------------------------------------------------


def _oracle(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is the outside oracle of these tests")
    return transformers.MixtralForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.interop
@pytest.mark.parametrize("window", [None, 8])
def test_logits_and_greedy_tokens_equal_those_of_transformers(
    window: int | None, tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    config = replace(moe_config, sliding_window=window)
    write_snapshot(tmp_path, "huggingface", config=config)
    oracle, model, prompt = _oracle(tmp_path), _load(tmp_path), _tokens(30, config)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    for chunk in (1, 7, 30):
        assert float((_logits(model, prompt, chunk) - expected).abs().max()) < 1e-5
    ours = list(Engine(model).generate(Request(prompt, 16)))
    theirs = oracle.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.interop
def test_a_directory_written_by_save_pretrained_loads(
    tmp_path: Path, moe_config: ModelConfig, write_snapshot: WriteSnapshot
) -> None:
    write_snapshot(tmp_path / "published", "huggingface", config=moe_config)
    oracle = _oracle(tmp_path / "published")
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    prompt = _tokens(20, moe_config)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    assert float((_logits(_load(tmp_path / "saved"), prompt, 20) - expected).abs().max()) < 1e-5
