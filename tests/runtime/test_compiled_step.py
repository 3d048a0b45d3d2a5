"""Compiling in the background: eager until it can be trusted, eager for ever if it cannot, and never a wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mistral_runtime
from mistral_runtime.compiled_step import BackgroundCompiledStep, check_step
from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request, Step, eager_step
from mistral_runtime.inductor_decode import block_step, compile_decode, decode_with
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.transformer import Transformer

PROMPT = [1, 17, 42, 5]
PATIENCE_SECONDS = 20


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]) -> Transformer:
    return _model(tiny_config, make_weights(tiny_config))


def _model(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


@dataclass
class StandInCompiler:
    """Compiles nothing: hands out a step that counts its calls, when it is let to, and notes in which thread it was."""

    step: Step = field(default_factory=lambda: decode_with(block_step))
    may_finish: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    thread: threading.Thread | None = None
    calls: list[int] = field(default_factory=list)

    def __call__(self, _model: Transformer) -> Step:
        self.thread = threading.current_thread()
        assert self.may_finish.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error

        def counted(model: Transformer, ids: Sequence[int], cache: RollingKVCache) -> Tensor:
            self.calls.append(len(ids))
            return self.step(model, ids, cache)

        return counted


class Notices:
    """What was reported, and a way to wait for it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._came = threading.Event()

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self._came.set()

    def wait(self) -> str:
        assert self._came.wait(PATIENCE_SECONDS)
        return self.texts[0]


@pytest.fixture
def compiler() -> Iterator[StandInCompiler]:
    stand_in = StandInCompiler()
    yield stand_in
    stand_in.may_finish.set()


# --- the step that a compiler starts from -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_by_tensors_has_the_bits_of_the_eager_one(
    window: int | None,
    dtype: torch.dtype,
    tiny_config: ModelConfig,
    make_weights: Callable[..., dict[str, Tensor]],
) -> None:
    config = replace(tiny_config, sliding_window=window)
    model = _model(config, make_weights(config, dtype=dtype))
    step, caches = decode_with(block_step), [model.new_cache(40) for _ in range(2)]
    for cache in caches:
        eager_step(model, PROMPT, cache)
    for token in range(3, 30):
        assert torch.equal(step(model, [token], caches[0]), eager_step(model, [token], caches[1]))


def test_steps_of_both_kinds_can_follow_each_other(model: Transformer) -> None:
    by_tensors = decode_with(block_step)
    turns = iter(range(1000))

    def mixed(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        one = by_tensors if len(ids) == 1 and next(turns) % 3 else eager_step
        return one(model, ids, cache, last_only=last_only)

    expected = list(Engine(model, slack=0).generate(Request(PROMPT, 30)))
    assert list(Engine(model, step=mixed, slack=0).generate(Request(PROMPT, 30))) == expected


# --- when which step is used ------------------------------------------------------------------------------------------


def test_answers_do_not_wait_and_later_tokens_are_compiled(model: Transformer, compiler: StandInCompiler) -> None:
    notices = Notices()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    expected = list(Engine(model, slack=0).generate(Request(PROMPT, 30)))
    answer = iter(Engine(model, step=step, slack=0).generate(Request(PROMPT, 30)))
    tokens = [next(answer) for _ in range(10)]
    assert not step.is_compiled
    assert notices.texts == []
    compiler.may_finish.set()
    assert notices.wait().startswith("compile: decode steps are compiled now, after ")
    assert step.is_compiled
    compiler.calls.clear()
    assert [*tokens, *answer] == expected  # swapped in the middle of an answer
    assert compiler.calls == [1] * 20
    assert compiler.thread is not threading.main_thread()
    assert len(notices.texts) == 1


def test_first_position_and_prompts_stay_eager(model: Transformer, compiler: StandInCompiler) -> None:
    notices = Notices()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    compiler.may_finish.set()
    notices.wait()
    compiler.calls.clear()
    cache = model.new_cache(20)
    for ids, calls in (([5], []), ([6], [1]), ([7, 8], [1])):
        step(model, ids, cache)
        assert compiler.calls == calls


@pytest.mark.parametrize("error", [RuntimeError("no C++ compiler\nlong story"), KeyError("x"), NotImplementedError()])
def test_failure_is_one_notice_and_answers_go_on(
    error: Exception, model: Transformer, compiler: StandInCompiler
) -> None:
    notices = Notices()
    compiler.error = error
    compiler.may_finish.set()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    assert notices.wait().startswith(f"compile: steps stay eager ({type(error).__name__}")
    assert "\n" not in notices.texts[0]
    expected = list(Engine(model, slack=0).generate(Request(PROMPT, 9)))
    assert list(Engine(model, step=step, slack=0).generate(Request(PROMPT, 9))) == expected
    assert len(notices.texts) == 1


@pytest.mark.parametrize("spoil", ["a little", "nan", "likeliest"])
def test_step_that_computes_something_else_is_not_used(
    spoil: str, model: Transformer, compiler: StandInCompiler
) -> None:
    right, notices = compiler.step, Notices()

    def wrong(model: Transformer, ids: Sequence[int], cache: RollingKVCache) -> Tensor:
        logits = right(model, ids, cache)
        if spoil == "likeliest":
            return logits.roll(1)
        return logits * (1.01 if spoil == "a little" else float("nan"))

    compiler.step = wrong
    compiler.may_finish.set()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    assert "compute something else" in notices.wait()
    assert not step.is_compiled


def test_check_passes_the_eager_step_itself(model: Transformer) -> None:
    assert check_step(model, eager_step) is None


def test_step_that_fails_later_is_given_up_and_its_token_is_not_lost(
    model: Transformer, compiler: StandInCompiler
) -> None:
    right, notices, broken = compiler.step, Notices(), threading.Event()

    def fragile(model: Transformer, ids: Sequence[int], cache: RollingKVCache) -> Tensor:
        if broken.is_set():
            raise RuntimeError("no more")
        return right(model, ids, cache)

    compiler.step = fragile
    compiler.may_finish.set()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    notices.wait()
    expected = list(Engine(model, slack=0).generate(Request(PROMPT, 20)))
    answer = iter(Engine(model, step=step, slack=0).generate(Request(PROMPT, 20)))
    tokens = [next(answer) for _ in range(6)]
    broken.set()
    assert [*tokens, *answer] == expected
    assert notices.texts[1:] == ["compile: a compiled step failed, steps are eager again (RuntimeError: no more)"]


def test_closed_step_says_nothing(model: Transformer, compiler: StandInCompiler) -> None:
    notices = Notices()
    step = BackgroundCompiledStep(model, compiler, report=notices)
    step.close()
    compiler.may_finish.set()
    step._thread.join(PATIENCE_SECONDS)
    assert step.is_compiled
    assert notices.texts == []


# --- Inductor itself --------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on the CPU")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@needs_compiler
def test_process_ends_at_once_and_quietly_while_compiling(
    tmp_path: Path, write_snapshot: Callable[..., dict[str, Tensor]]
) -> None:
    write_snapshot(tmp_path)
    command = [sys.executable, "-m", "mistral_runtime", "generate", str(tmp_path), "the hill", "--max-tokens", "5"]
    # An empty cache of compiled code: with a full one there would be nothing to leave behind.
    environment = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    plain = subprocess.run([*command, "--quiet"], capture_output=True, env=environment, timeout=60, check=True)
    compiling = subprocess.run([*command, "--compile"], capture_output=True, env=environment, timeout=60, check=True)
    assert compiling.stdout == plain.stdout
    assert [line.partition(b":")[0] for line in compiling.stderr.splitlines()] == [b"compute", b"memory", b"done"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is torch's affair
def test_inductor_compiles_once_for_every_position_and_answers_the_same(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    step = compile_decode(model)
    assert check_step(model, step) is None

    def decode(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        if len(ids) > 1:
            return eager_step(model, ids, cache, last_only=last_only)
        with torch.compiler.set_stance("fail_on_recompile"):
            return step(model, ids, cache, last_only=last_only)

    for length in (3, 50):
        expected = list(Engine(model, slack=0).generate(Request(PROMPT, length)))
        assert list(Engine(model, step=decode, slack=0).generate(Request(PROMPT, length))) == expected
    assert counters["stats"]["unique_graphs"] == 1
