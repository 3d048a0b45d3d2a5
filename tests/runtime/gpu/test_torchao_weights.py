"""What torchao is asked for on CUDA, and the errors where that cannot be. A stand-in takes the place of torchao."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mistral_runtime.config import ModelConfig, MoeConfig
from mistral_runtime.device import Compute
from mistral_runtime.errors import BadRequest, DeviceUnavailable, MissingDependency, MistralRuntimeError
from mistral_runtime.gpu.torchao_weights import KINDS, quantize_on_device, require_kind
from mistral_runtime.loading import choose_for, open_weights
from mistral_runtime.snapshot import find_weights
from tests.runtime.gpu.models import CONFIG, make_model

CUDA = torch.device("cuda", 0)


class StandIn(ModuleType):
    """Notes which matrices were to be quantised, and how."""

    def __init__(self) -> None:
        super().__init__("torchao.quantization")
        self.done: dict[str, SimpleNamespace] = {}
        for kind, name in (("int8", "Int8"), ("int4", "Int4"), ("fp8", "Float8")):
            setattr(self, f"{name}WeightOnlyConfig", lambda kind=kind, **given: SimpleNamespace(kind=kind, **given))

    def quantize_(self, model: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        chosen = [name for name, module in model.named_modules() if filter_fn(module, name)]
        assert not set(chosen) & set(self.done)
        self.done |= dict.fromkeys(chosen, config)


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Install the stand-in."""
    module = StandIn()
    package = ModuleType("torchao")
    package.quantization = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    return module


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)


def _check_lines(error: MistralRuntimeError, *parts: str) -> None:
    assert "expected" in error.detail
    assert "found" in error.detail
    assert all(part in str(error) for part in parts), str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moe", [None, MoeConfig(num_experts=3, num_experts_per_tok=2)])
def test_every_matrix_is_quantised_but_embeddings_and_routers(
    kind: str, moe: MoeConfig | None, torchao: StandIn
) -> None:
    model = make_model(replace(CONFIG, moe=moe), torch.bfloat16)
    quantize_on_device(model, kind)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(torchao.done) == {name for name in linear if not name.endswith(".gate")}
    kinds = {name: config.kind for name, config in torchao.done.items()}
    assert kinds.pop("output") == ("fp8" if kind == "fp8" else "int8")
    assert set(kinds.values()) == {kind}
    # torchao must not change the settings of a compiler that others use.
    assert not any(config.set_inductor_config for config in torchao.done.values())


@pytest.mark.parametrize(
    ("kind", "capability", "hint"),
    [("fp8", (8, 6), "int8, int4"), ("int4", (7, 5), "int8"), ("int8", (7, 0), "none fits")],
)
@pytest.mark.usefixtures("torchao")
def test_a_gpu_that_is_too_old_is_refused_with_both_numbers(
    kind: str, capability: tuple[int, int], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, capability)
    with pytest.raises(DeviceUnavailable) as caught:
        require_kind(kind, CUDA)
    _check_lines(caught.value, kind, f"found {capability[0]}.{capability[1]}", hint)
    _gpu(monkeypatch, (9, 0))
    require_kind(kind, CUDA)


@pytest.mark.parametrize("attribute", [None, "Float8WeightOnlyConfig"])
def test_torchao_that_is_missing_or_too_old_is_named_with_the_extra(
    attribute: str | None, torchao: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpu(monkeypatch, (9, 0))
    if attribute is None:
        monkeypatch.setitem(sys.modules, "torchao", None)
    else:
        delattr(torchao, attribute)
    with pytest.raises(MissingDependency) as caught:
        require_kind("int8", CUDA)
    _check_lines(caught.value, "torchao", "mistral-fetch[runtime,gpu]", attribute or "none")


def test_fp8_on_the_cpu_is_refused_and_int8_named(
    tmp_path: Path, write_snapshot: Callable[..., dict[str, Tensor]], tiny_config: ModelConfig
) -> None:
    write_snapshot(tmp_path)
    weights = open_weights(find_weights(tmp_path), tiny_config, quantize="fp8")
    with pytest.raises(BadRequest) as caught:
        choose_for(weights, device="cpu", dtype="auto", threads=1)
    _check_lines(caught.value, "fp8", "--quantize int8")


@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda_weights_are_quantised_after_loading(
    kind: str,
    tmp_path: Path,
    write_snapshot: Callable[..., dict[str, Tensor]],
    tiny_config: ModelConfig,
    torchao: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_snapshot(tmp_path)
    on_cuda = Compute(CUDA, "found by torch", torch.float32, "as stored", 1, "as asked")
    monkeypatch.setattr("mistral_runtime.loading.choose_compute", lambda **_wanted: on_cuda)
    _gpu(monkeypatch, (9, 0))
    opened = open_weights(find_weights(tmp_path), tiny_config, quantize=kind)
    weights, compute = choose_for(opened, device="auto", dtype="auto", threads=1)
    assert (compute.dtype, compute.dtype_reason) == (torch.bfloat16, f"between matrices of {kind}")
    # The peak is what counts: matrices are quantised where they were loaded to.
    assert weights.resident_bytes(compute) == tiny_config.parameter_count() * 2
    weights.load(replace(compute, device=torch.device("cpu")), has_row_kernels=False)
    assert torchao.done["layers.0.attention.wq"].kind == kind
    with pytest.raises(BadRequest, match="expected bfloat16"):
        choose_for(opened, device="auto", dtype="float32", threads=1)
