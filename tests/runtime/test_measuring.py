"""`bench`, `ppl` and `logits`: their figures against the float32 oracle, their JSON, their errors, Ctrl-C."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mistral_runtime.bench
import mistral_runtime.engine
from mistral_runtime.__main__ import main
from mistral_runtime.bandwidth_plot import bandwidth_svg
from mistral_runtime.errors import BadRequest, NonFiniteLogits
from mistral_runtime.memory_speed import bytes_read_per_token
from mistral_runtime.perplexity import window_sizes, windows
from mistral_runtime.reference import reference_logits
from mistral_runtime.scoring import all_logits, logits_by_chunk, require_ids, token_logprobs
from mistral_runtime.session import ComputeOptions, load_session, open_snapshot
from mistral_runtime.startup import StartClock, process_age
from mistral_runtime.tokenizer import Tokenizer

WriteSnapshot = Callable[..., dict[str, Tensor]]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mistral_runtime.bench.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
TEXT = "the wind goes over the hill and the hill stays\na question and an answer é\n"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Path:
    directory = tmp_path_factory.mktemp("measuring") / "snapshot"
    write_snapshot(directory)
    return directory


@pytest.fixture(scope="module")
def weights(write_snapshot: WriteSnapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return write_snapshot(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def model(snapshot: Path) -> Any:
    opened = open_snapshot(snapshot, chat_template="none")
    options = ComputeOptions(device="cpu", threads=1)
    return load_session(opened, options, positions=64, context=None, report=lambda _: None).engine.model


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("mistral_runtime.scoring.SCORE_CHUNK", 7)


def _json(capfd: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capfd.readouterr().out.splitlines()[-1])


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 6, 7, 8, 20, 29])
def test_logits_of_every_chunk_are_the_references(first: int, model: Any, weights: dict[str, Tensor]) -> None:
    ids = torch.randint(300, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    found = torch.cat(list(logits_by_chunk(model, ids, first=first)))
    torch.testing.assert_close(found, reference_logits(weights, model.config, ids)[first:], atol=2e-4, rtol=1e-4)


def test_log_probabilities_are_the_references(model: Any, weights: dict[str, Tensor]) -> None:
    ids = torch.randint(300, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = reference_logits(weights, model.config, ids).double().log_softmax(1)
    for first in (1, 2, 9, 19):
        wanted = torch.stack([expected[i - 1, ids[i]] for i in range(first, 20)])
        torch.testing.assert_close(token_logprobs(model, ids, first=first), wanted, atol=2e-4, rtol=0)


def test_logits_that_are_no_numbers_are_refused(model: Any) -> None:
    model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteLogits):
        all_logits(model, [1, 2, 3])


@pytest.mark.parametrize("ids", [[], [-1], [5, 300]])
def test_ids_that_are_none_are_refused(ids: list[int]) -> None:
    with pytest.raises(BadRequest):
        require_ids(ids, 300)


# --- ppl --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, context, stride", [(10, 6, 3), (10, 6, 5), (3, 8, 4), (30, 4, 1), (17, 5, 4), (2, 2, 1)]
)
def test_windows_score_every_token_but_the_first_once(count: int, context: int, stride: int) -> None:
    scored = []
    for window in windows(count, context=context, stride=stride):
        assert window.begin < window.first < window.end <= window.begin + context
        scored += range(window.first, window.end)
    assert scored == list(range(1, count))


def test_perplexity_is_that_of_the_strided_method(
    snapshot: Path, weights: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["ppl", str(snapshot), str(tmp_path / "text"), "--context", "12", "--stride", "5", "--json"]
    assert main(arguments) == 0
    told = _json(capfd)
    opened = open_snapshot(snapshot, chat_template="none")
    ids = opened.tokenizer.encode(TEXT)
    # The loop as Hugging Face's page has it, with the oracle for a model.
    total, previous_end = 0.0, 1
    for begin in range(0, len(ids), 5):
        end = min(begin + 12, len(ids))
        logprobs = reference_logits(weights, opened.config, ids[begin:end]).double().log_softmax(1)
        total -= sum(float(logprobs[i - begin - 1, ids[i]]) for i in range(previous_end, end))
        previous_end = end
        if end == len(ids):
            break
    mean = total / (len(ids) - 1)
    assert told["tokens"] == len(ids) - 1
    assert told["bytes"] == len(TEXT.encode())
    assert told["nats_per_token"] == pytest.approx(mean, abs=1e-4)
    assert told["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert told["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode()), abs=1e-4)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(
    tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = write_snapshot(tmp_path)
    torch.save(weights | {"output.weight": torch.zeros(300, 64)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "text").write_text(TEXT)
    assert main(["ppl", str(tmp_path), str(tmp_path / "text"), "--quiet"]) == 0
    assert capfd.readouterr().out.startswith("perplexity 300.000")


BAD_TEXTS: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "is empty"),
    "not UTF-8": (b"abc\xff", "0xff at offset 3"),
    "one token": (b"a", "too little text"),
    "absent": (None, "cannot read"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_measured_is_refused(
    name: str, snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, mention = BAD_TEXTS[name]
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert main(["ppl", str(snapshot), str(tmp_path / "text")]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert mention in err
    assert main(["ppl", str(snapshot), str(tmp_path / "text"), "--json"]) == 2
    assert mention in json.dumps(_json(capfd)["error"])


@pytest.mark.parametrize("context, stride", [(1, None), (8, 8), (40_000, None)])
def test_windows_that_make_no_sense_are_refused(context: int, stride: int | None, tiny_config: Any) -> None:
    with pytest.raises(BadRequest):
        window_sizes(replace(tiny_config, sliding_window=None), context=context, stride=stride)


# --- logits -----------------------------------------------------------------------------------------------------------


def test_logits_are_the_references_for_every_position(
    snapshot: Path, weights: dict[str, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["logits", str(snapshot), "the hill stays", "--top", "4", "--all", "--quiet"]) == 0
    told = _json(capfd)
    opened = open_snapshot(snapshot, chat_template="none")
    ids = opened.tokenizer.encode("the hill stays")
    expected = reference_logits(weights, opened.config, ids).double().log_softmax(1)
    assert [entry["id"] for entry in told["positions"]] == ids
    assert told["positions"][0]["logprob"] is None
    for position, entry in enumerate(told["positions"]):
        values, best = expected[position].topk(4)
        assert [token["id"] for token in entry["next"]] == best.tolist()
        assert [token["logprob"] for token in entry["next"]] == pytest.approx(values.tolist(), abs=2e-4)
        if position:
            assert entry["logprob"] == pytest.approx(float(expected[position - 1, ids[position]]), abs=2e-4)
    assert told["next"] == told["positions"][-1]["next"]


def test_the_last_position_alone_says_the_same(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["logits", str(snapshot), "the hill stays", "--all", "--quiet"])
    every = _json(capfd)
    main(["logits", str(snapshot), "--prompt=the hill stays", "--quiet"])
    last = _json(capfd)
    assert "positions" not in last
    assert [token["id"] for token in last["next"]] == [token["id"] for token in every["next"]]
    tokenizer = Tokenizer(snapshot / "tokenizer.model")
    assert all(token["piece"] == tokenizer.piece(token["id"]) for token in last["next"])
    assert len(last["next"]) == 10


# --- bench ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_runtime.memory_speed._LARGEST_BYTES", 1 << 20)
    monkeypatch.setattr("mistral_runtime.memory_speed._SMALLEST_BYTES", 1 << 20)


BENCH = ["--prompt-tokens", "20", "--decode-tokens", "4", "--rounds", "2"]


@pytest.mark.usefixtures("_small_probe")
def test_bench_ends_with_one_json_object_that_adds_up(
    snapshot: Path, weights: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(snapshot), *BENCH, "--plot", str(tmp_path / "a.svg"), "--timings"]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    begins = [line.partition(":")[0] for line in err.splitlines()]
    assert begins == ["compute", "memory", "first pass", "start", "round 1", "round 2", "median"]
    read = sum(t.nbytes for name, t in weights.items() if name != "tok_embeddings.weight") + 64 * 4
    assert told["weight_bytes_per_token"] == read
    assert told["decode_bytes_per_second"] == pytest.approx(told["decode_tokens_per_second"] * read, rel=1e-3)
    shares = [r["decode_tokens_per_second"] * read / r["memory_bytes_per_second"] for r in told["rounds"]]
    assert told["share_of_memory"] == pytest.approx(sum(shares) / 2, abs=2e-4)
    assert told["first_token_seconds"]["from_start"] == told["timings"]["first_token"]
    assert told["first_token_seconds"]["from_load"] < told["first_token_seconds"]["from_start"]
    picture = ElementTree.parse(tmp_path / "a.svg")
    assert "round 2" in "".join(picture.getroot().itertext())


@pytest.mark.usefixtures("_small_probe")
def test_bench_decodes_as_many_tokens_as_it_counts(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = mistral_runtime.engine.eager_step

    def counted(model: Any, ids: list[int], cache: Any, *, last_only: bool = True) -> Tensor:
        steps.append(len(ids))
        return real(model, ids, cache, last_only=last_only)

    monkeypatch.setattr("mistral_runtime.session.eager_step", counted)
    assert main(["bench", str(snapshot), *BENCH, "--quiet"]) == 0
    assert steps == [20, 1, 1, 1, 1] * 3


def test_embeddings_count_as_one_row(model: Any) -> None:
    rows = bytes_read_per_token(model)
    model.tok_embeddings.weight.data = torch.zeros(600, 64)
    assert bytes_read_per_token(model) == rows


@pytest.mark.parametrize("place", [".", "nowhere/a.svg"])
def test_a_picture_without_a_place_is_refused_before_measuring(
    place: str, snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(snapshot), "--plot", str(tmp_path / place)]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)


@pytest.mark.parametrize("flag", ["--prompt-tokens", "--decode-tokens", "--rounds"])
def test_bench_of_nothing_is_refused(flag: str, snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(snapshot), flag, "0"]) == 2
    assert flag in capfd.readouterr().err


def test_a_picture_escapes_what_it_is_told() -> None:
    picture = ElementTree.fromstring(bandwidth_svg("<a&b>", "c<d", [(1e9, 2e9)]))
    assert "<a&b>" in "".join(picture.itertext())
    bars = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert [float(bar.attrib["width"]) for bar in bars] == [520.0, 260.0]


# --- Ctrl-C and the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["bench", "D", "--rounds", "9999999"], ["ppl", "D", "TEXT", "--context", "512", "--stride", "1"]]
)
def test_a_signal_ends_a_measurement_at_once(arguments: list[str], snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 5000)
    names = {"D": str(snapshot), "TEXT": str(tmp_path / "text")}
    command = [sys.executable, "-m", "mistral_runtime", *(names.get(word, word) for word in arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        while not process.stderr.readline().startswith(b"memory:"):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (130, b"")
    assert err.endswith(b"interrupted\n")


def test_the_start_is_told_from_the_process_own_beginning(snapshot: Path) -> None:
    program = (
        "import time; time.sleep(0.5)\n"
        "import runpy; runpy.run_module('mistral_runtime', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, "generate", str(snapshot), "the hill", "--max-tokens", "2", "--json"]
    done = subprocess.run([*command, "--timings"], capture_output=True, env=ENVIRONMENT, timeout=60, check=True)
    timings = json.loads(done.stdout)["timings"]
    assert timings["since"] == "process"
    assert timings["interpreter"] >= 0.49
    parts = ["interpreter", "arguments", "torch", "imports", "snapshot", "prompt", "weights_opened", "device"]
    assert list(timings) == ["since", *parts, "model_built", "prefill", "first_token"]
    seconds = [value for name, value in timings.items() if name not in {"since", "first_token"}]
    assert timings["first_token"] == pytest.approx(sum(seconds), abs=0.002)
    assert b"start: interpreter" in done.stderr


def test_age_is_read_past_any_program_name(tmp_path: Path) -> None:
    fields = ["0"] * 18 + [str(round(5 * os.sysconf("SC_CLK_TCK")))] + ["0"] * 30
    (tmp_path / "stat").write_text("42 (a ) R 1) S " + " ".join(fields))
    age = process_age(tmp_path / "stat")
    assert age is not None
    assert age == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME) - 5, abs=0.5)
    (tmp_path / "stat").write_text("42 (x) S 1")
    assert process_age(tmp_path / "stat") is None
    assert process_age(tmp_path / "absent") is None


def test_waiting_is_left_out_and_only_the_first_token_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mistral_runtime.startup.time.perf_counter", lambda: now[0])
    clock = StartClock(age_seconds=2.0)
    clock.mark("interpreter")
    now[0] += 50
    clock.leave_out()

    def tokens() -> Any:
        for _ in range(3):
            now[0] += 1
            yield 7

    assert list(clock.watch(tokens())) == [7, 7, 7]
    assert clock.fields() == {"since": "process", "interpreter": 2.0, "prefill": 1.0, "first_token": 3.0}


def test_a_chat_tells_its_start_once(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert main(["chat", str(snapshot), "--chat-template", "v1", "--max-tokens", "2", "--timings"]) == 0
    assert capfd.readouterr().err.count("start: ") == 1
