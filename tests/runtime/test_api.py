"""`from mistral_runtime import load`: the documented example, and that it says what the command line says."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mistral_runtime
from mistral_runtime import load
from mistral_runtime.__main__ import main
from mistral_runtime.errors import BadRequest, BadSampling, NoChatTemplate, PromptTooLong
from mistral_runtime.reference import reference_logits

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "mistral_fetch/demo_model"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, write_snapshot: Callable[..., Any]) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("api")
    return directory, write_snapshot(directory)


@pytest.fixture(scope="module")
def model(snapshot: tuple[Path, Any]) -> Any:
    return load(snapshot[0], device="cpu", threads=1)


def test_the_page_runs() -> None:
    """The demo model is shipped without the paper that a pull writes beside it, so its template is named here."""

    def load_demo(directory: Path) -> Any:
        return load(directory, device="cpu", dtype="float32", threads=1, chat_template="demo")

    text = (ROOT / "docs/python-api.md").read_text().replace(">>> from mistral_runtime import load\n", "", 1)
    names = {"load": load_demo, "directory": DEMO_MODEL}
    example = doctest.DocTestParser().get_doctest(text, names, "python-api.md", "docs/python-api.md", 0)
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert result.attempted >= 6
    assert result.failed == 0, "".join(told)


def test_it_generates_what_the_command_line_does(
    snapshot: tuple[Path, Any], model: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(["generate", str(snapshot[0]), "the hill", "--max-tokens", "20", "--json", "--quiet"])
    text = json.loads(capfd.readouterr().out)["text"]
    pieces = list(model.generate("the hill", max_tokens=20))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    stop = text[4:6]
    assert "".join(model.generate("the hill", max_tokens=20, stop=[stop])) == text[: text.index(stop)]


def test_a_seed_repeats_and_temperature_counts(model: Any) -> None:
    def sample(seed: int) -> str:
        return "".join(model.generate("the hill", max_tokens=20, temperature=5.0, seed=seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_logits_are_the_references(snapshot: tuple[Path, dict[str, Tensor]], model: Any) -> None:
    ids = model.tokenizer.encode("the wind goes over the hill")
    expected = reference_logits(snapshot[1], model.config, ids)
    torch.testing.assert_close(model.logits(ids), expected, atol=2e-4, rtol=1e-4)


def test_requests_are_refused_when_they_are_made(snapshot: tuple[Path, Any], model: Any) -> None:
    with pytest.raises(NoChatTemplate):
        model.chat([{"role": "user", "content": "Why?"}])
    with pytest.raises(BadSampling):
        model.generate("the hill", temperature=-1)
    with pytest.raises(BadRequest):
        model.generate("the hill", stop="end")
    with pytest.raises(BadRequest):
        model.logits([])
    short = load(snapshot[0], device="cpu", threads=1, context=8, chat_template="v1")
    with pytest.raises(PromptTooLong):
        short.generate("the hill " * 20)
    assert short.logits([1] * 8).shape == (8, 300)
    with pytest.raises(PromptTooLong):
        short.logits([1] * 9)
    for message in ({"role": "robot", "content": "x"}, {"role": "user"}, {"role": "user", "content": 3}):
        with pytest.raises(BadRequest):
            short.chat([message])


def test_importing_the_package_does_not_import_torch() -> None:
    program = (
        "import sys, mistral_runtime\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(mistral_runtime, 'lod')\n"
        "from mistral_runtime import load\n"
        "assert 'torch' in sys.modules and load.__name__ == 'load'"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)
