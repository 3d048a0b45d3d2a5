"""Where steps are static ones, and what is said of it. A device that gains from them is played by the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.__main__ import main
from mistral_runtime.config import MoeConfig
from mistral_runtime.gpu import choose
from mistral_runtime.gpu.choose import device_engine, gains_from_static_steps, serving_steps
from mistral_runtime.gpu.device_engine import DeviceEngine
from mistral_runtime.transformer import Transformer
from tests.runtime.gpu.models import CONFIG, make_model


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the CPU a device that gains from static steps."""
    monkeypatch.setattr(choose, "gains_from_static_steps", lambda _device: True)


def _engine(model: Transformer, said: list[str]) -> DeviceEngine | None:
    return device_engine(model, positions=40, context=None, slack=2, lookup="auto", report=said.append)


def test_only_cuda_gains() -> None:
    assert gains_from_static_steps(torch.device("cuda"))
    assert not any(gains_from_static_steps(torch.device(name)) for name in ("cpu", "mps", "xpu"))
    assert _engine(make_model(), []) is None


@pytest.mark.usefixtures("gaining")
def test_models_whose_steps_have_no_static_shape_are_named() -> None:
    mixture = make_model(replace(CONFIG, moe=MoeConfig(num_experts=4, num_experts_per_tok=2)))
    rounded = make_model()
    rounded.kv = "int8"
    said: list[str] = []
    assert _engine(mixture, said) is None
    assert _engine(rounded, said) is None
    assert [line.partition(" for ")[2] for line in said] == [
        "experts are chosen on the host",
        "keys and values are kept as int8",
    ]
    engine = _engine(make_model(), said)
    assert engine is not None
    assert (engine.static.pool.slots, engine.static.pool.context, engine.static.pool.slack) == (1, 40, 2)


@pytest.mark.usefixtures("gaining")
def test_a_server_has_slots_only_where_all_its_sequences_fit() -> None:
    model = make_model()
    for positions, has_slots in ((5 * 40, True), (5 * 40 - 1, False)):
        steps = serving_steps(model, slots=4, context=40, positions=positions, slack=0, report=print)
        assert (steps is not None) == has_slots


@pytest.mark.parametrize("flags", [[], ["--no-graphs"]])
@pytest.mark.usefixtures("gaining")
def test_generate_says_which_steps_it_used(
    flags: list[str],
    tmp_path: Path,
    write_snapshot: Callable[..., dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_snapshot(tmp_path)
    texts = []
    for extra in (flags, ["--no-graphs"]):
        arguments = ["generate", str(tmp_path), "the wind", "--max-tokens=12", "--json", "--quiet", "--device=cpu"]
        assert main([*arguments, *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["steps"] == ("eager" if flags else "static")
    assert texts[0]["text"] == texts[1]["text"] != ""
