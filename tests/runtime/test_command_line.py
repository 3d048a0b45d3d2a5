"""`python -m mistral_runtime` as a script sees it: standard streams, exit codes, signals."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import pty
import signal
import struct
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mistral_runtime
from mistral_runtime import generate
from mistral_runtime.__main__ import main
from mistral_runtime.prompt import ChatTemplate, Message

WriteSnapshot = Callable[..., dict[str, Tensor]]
RUNTIME = Path(mistral_runtime.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(RUNTIME.parent), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "mistral_runtime"]


def _run(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=ENVIRONMENT | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "snapshot"
    write_snapshot(directory)
    return directory


@pytest.fixture(autouse=True)
def _one_thread_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- generate ---------------------------------------------------------------------------------------------------------


def test_stdout_is_the_answer_and_a_newline_and_stderr_the_rest(
    snapshot: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(snapshot), "the hill", "--max-tokens", "9"]) == 0
    out, err = capfd.readouterr()
    assert out.endswith("\n")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["compute", "memory", "done"]


def test_json_is_one_object_with_the_same_text(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["generate", str(snapshot), "the hill", "--max-tokens", "9", "--quiet"])
    text, err = capfd.readouterr()
    assert err == ""
    assert main(["generate", str(snapshot), "the hill", "--max-tokens", "9", "--json"]) == 0
    out, _ = capfd.readouterr()
    result = json.loads(out)
    assert result["text"] == text.removesuffix("\n")
    assert result["generated_tokens"] == 9
    assert result["prompt_tokens"] > 1
    assert result["finish_reason"] == "length"
    assert set(result["seconds"]) == {"load", "prefill", "decode", "total"}
    assert result["tokens_per_second"] > 0
    assert (result["device"], result["dtype"], result["layout"]) == ("cpu", "float32", "consolidated.pth")
    assert result["peak_rss_bytes"] > 10**7


def test_every_layout_gives_the_same_answer(
    tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for layout in ("pth", "consolidated", "huggingface"):
        write_snapshot(tmp_path / layout, layout, dtype=torch.bfloat16)
        assert main(["generate", str(tmp_path / layout), "the hill", "--max-tokens", "20", "--quiet"]) == 0
        answers.append(capfd.readouterr().out)
    assert len(set(answers)) == 1


def test_prompt_comes_from_stdin_when_piped_or_asked_for(snapshot: Path) -> None:
    as_argument = _run("generate", snapshot, "the hill", "--max-tokens", 5, "--quiet")
    piped = _run("generate", snapshot, "--max-tokens", 5, "--quiet", stdin=b"the hill\n")
    dash = _run("generate", snapshot, "-", "--max-tokens", 5, "--quiet", stdin=b"the hill")
    assert as_argument.returncode == 0
    assert as_argument.stdout == piped.stdout == dash.stdout


def test_output_is_utf8_whatever_the_locale(snapshot: Path) -> None:
    done = _run("generate", snapshot, "é 日", "--max-tokens", 30, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.decode("utf-8").endswith("\n")
    assert b"compute: cpu" in done.stderr


def test_stop_string_ends_the_answer_before_it(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["generate", str(snapshot), "the hill", "--max-tokens", "20", "--json", "--quiet"])
    text = json.loads(capfd.readouterr().out)["text"]
    stop = text[4:6]
    main(
        [
            "generate",
            str(snapshot),
            "the hill",
            "--max-tokens",
            "20",
            "--json",
            "--quiet",
            "--stop",
            stop,
        ]
    )
    result = json.loads(capfd.readouterr().out)
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"
    assert result["generated_tokens"] < 20


@pytest.mark.parametrize("prompt", ["-", "--", "--help", "--x=--", "", "-1"])
def test_prompt_option_takes_any_text_and_wins(prompt: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _asked(monkeypatch)
    assert main(["generate", f"--prompt={prompt}", "--", str(snapshot), "not this"]) == 0
    assert [(options.prompt, options.directory) for options in asked] == [(prompt, snapshot)]


def test_double_dash_is_a_text_where_it_is_a_prompt_or_a_value(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _asked(monkeypatch)
    assert main(["generate", "--stop=--", "--system=--", "--", str(snapshot), "--"]) == 0
    assert [(options.prompt, options.stops, options.system) for options in asked] == [("--", ("--",), "--")]


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[generate.GenerateOptions]:
    """Return the list to which every call of `generate` adds its options instead of running."""
    asked: list[generate.GenerateOptions] = []

    def record(options: generate.GenerateOptions, _interrupts: object) -> int:
        asked.append(options)
        return 0

    monkeypatch.setattr(generate, "run_generate", record)
    return asked


HOSTILE_TEXT = "a\tb\x1b[31m\x07\x9b\x7f\r\u00e9\n"


def test_terminal_is_shown_control_characters_and_a_pipe_is_handed_them() -> None:
    program = f"from mistral_runtime.terminal import write_out; write_out({HOSTILE_TEXT!r})"
    ours, theirs = pty.openpty()
    try:
        tty.setraw(theirs)
        subprocess.run([sys.executable, "-c", program], stdout=theirs, env=ENVIRONMENT, timeout=60, check=True)
        shown = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown.decode() == "a\tb\\u001b[31m\\u0007\\u009b\\u007f\\u000d\u00e9\n"
    piped = subprocess.run([sys.executable, "-c", program], stdout=-1, env=ENVIRONMENT, timeout=60, check=True)
    assert piped.stdout.decode() == HOSTILE_TEXT


def test_seed_repeats_a_sampled_answer(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def sample(seed: str) -> str:
        flags = ["--temperature", "5", "--top-p", "0.9", "--seed", seed]
        assert main(["generate", str(snapshot), "the hill", "--max-tokens", "20", "--quiet", *flags]) == 0
        return capfd.readouterr().out

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")


def _encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[Message]]:
    """Record the conversations that reach the template."""
    conversations: list[list[Message]] = []
    encode = ChatTemplate.encode

    def recording(self: ChatTemplate, messages: list[Message]) -> list[int]:
        conversations.append(list(messages))
        return encode(self, messages)

    monkeypatch.setattr(ChatTemplate, "encode", recording)
    return conversations


def test_instruct_prompt_is_wrapped_unless_raw(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conversations = _encoded(monkeypatch)
    arguments = ["generate", str(snapshot), "Why?", "--chat-template", "v1", "--max-tokens", "2"]
    assert main([*arguments, "--system", "Be brief."]) == 0
    assert conversations == [[Message("system", "Be brief."), Message("user", "Why?")]]
    assert main([*arguments, "--raw"]) == 0
    assert len(conversations) == 1


def test_a_base_model_continues_the_text_as_it_is(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conversations = _encoded(monkeypatch)
    assert main(["generate", str(snapshot), "Why?", "--max-tokens", "2"]) == 0
    assert conversations == []


# --- chat -------------------------------------------------------------------------------------------------------------


def _chat(monkeypatch: pytest.MonkeyPatch, snapshot: Path, lines: bytes, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return main(["chat", str(snapshot), "--chat-template", "v1", "--max-tokens", "3", *flags])


def test_chat_keeps_history_until_reset(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conversations = _encoded(monkeypatch)
    assert _chat(monkeypatch, snapshot, b"one\n\ntwo\n/reset\nthree\n/quit\nfour\n", "--system", "S") == 0
    contents = [[(m.role, m.content) for m in turns if m.role != "assistant"] for turns in conversations]
    assert contents == [
        [("system", "S"), ("user", "one")],
        [("system", "S"), ("user", "one"), ("user", "two")],
        [("system", "S"), ("user", "three")],
    ]
    assert [m.role for m in conversations[1]] == ["system", "user", "assistant", "user"]
    assert capfd.readouterr().out.count("\n") >= 3


def test_chat_ends_with_the_input(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _chat(monkeypatch, snapshot, b"one") == 0
    assert capfd.readouterr().out.endswith("\n")


def test_a_bad_question_does_not_end_the_chat(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conversations = _encoded(monkeypatch)
    long_line = b"word " * 200 + b"\n"
    assert _chat(monkeypatch, snapshot, b"caf\xe9\n" + long_line + b"ok\n", "--context", "60") == 0
    assert conversations[-1] == [Message("user", "ok")]
    err = capfd.readouterr().err
    assert "not valid UTF-8" in err
    assert "expected at most 60 together" in err


def test_chat_with_a_base_model_is_refused_before_loading(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (snapshot / "consolidated.00.pth").rename(snapshot / "aside")
    (snapshot / "consolidated.00.pth").write_bytes(b"not looked at")
    try:
        assert main(["chat", str(snapshot)]) == 2
    finally:
        (snapshot / "aside").rename(snapshot / "consolidated.00.pth")
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert "no chat template" in err


# --- signals and pipes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, write_snapshot: WriteSnapshot) -> Path:
    """A model that never says EOS: its logit is always 0, and among 299 others one is always above."""
    directory = tmp_path_factory.mktemp("cli") / "endless"
    weights = write_snapshot(directory)
    weights["output.weight"][2] = 0
    torch.save(weights, directory / "consolidated.00.pth")
    return directory


@contextmanager
def _started(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        bufsize=0,  # what a test has not read must still be there for communicate()
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


ENDLESS = ("--max-tokens", 1_000_000, "--quiet")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_answer_cleanly(number: signal.Signals, endless: Path) -> None:
    with _started("generate", endless, "the hill", *ENDLESS) as process:
        assert process.stdout is not None
        first = process.stdout.read(20)
        process.send_signal(number)
        rest, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert (first + rest).decode("utf-8").endswith("\n")
        assert err.decode() == "interrupted\n"


def test_an_interrupted_json_run_still_prints_its_result(endless: Path) -> None:
    with _started("generate", endless, "the hill", "--json", "--max-tokens", 1_000_000) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith(b"memory:"):
            assert process.poll() is None
        # The plan is printed before loading; give the answer a moment to begin.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert json.loads(out)["finish_reason"] == "interrupted"


def test_a_signal_during_a_long_prompt_ends_it_within_a_chunk(tmp_path: Path, write_snapshot: WriteSnapshot) -> None:
    # Without a window every chunk looks at all before it: a prompt of 200,000 tokens would take minutes.
    write_snapshot(tmp_path, sliding_window=None)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"max_seq_len": 1 << 20}))
    with _started("generate", tmp_path, "--json", "--max-tokens", 5, "--ignore-memory-plan") as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"the hill " * 100_000)
        process.stdin.close()
        process.stdin = None
        while not process.stderr.readline().startswith(b"memory:"):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        assert process.returncode == 130
        result = json.loads(out)
        assert (result["finish_reason"], result["generated_tokens"], result["text"]) == ("interrupted", 0, "")
        assert result["prompt_tokens"] > 100_000


def test_lookup_changes_the_time_and_not_the_answer(snapshot: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = {}
    for mode in ("auto", "on", "off"):
        arguments = ["generate", str(snapshot), "the hill the hill the hill", "--max-tokens", "60", "--json", "--quiet"]
        assert main([*arguments, "--lookup", mode]) == 0
        results[mode] = json.loads(capfd.readouterr().out)
    assert results["auto"]["text"] == results["on"]["text"] == results["off"]["text"]
    assert results["off"]["lookup"] == {"mode": "off", "drafted": 0, "accepted": 0}
    assert results["on"]["lookup"]["drafted"] >= results["on"]["lookup"]["accepted"] > 0


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(endless: Path) -> None:
    with _started("chat", endless, "--chat-template", "v1", *ENDLESS) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"(stopped)\n"
        _out, err = process.communicate(b"/reset\n/quit\n", timeout=30)
        assert process.returncode == 0
        assert err.decode() == "the conversation starts over\n"


def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    with _started("generate", endless, "the hill", *ENDLESS) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == b""


# --- errors: three lines and the code ---------------------------------------------------------------------------------


class _RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran-by-pickle",)


def _pickle_attack(d: Path) -> None:
    torch.save({"norm.weight": _RunsCode()}, d / "consolidated.00.pth")


def _bare_pickle(d: Path) -> None:
    (d / "consolidated.00.pth").write_bytes(pickle.dumps(_RunsCode()))


def _safetensors(d: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    prefix = struct.pack("<Q", len(header) if length is None else length)
    (d / "consolidated.safetensors").write_bytes(prefix + header + data)


def _two_tensors(*spans: list[int]) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
        for name, (a, b) in zip("xy", spans, strict=True)
    }
    return json.dumps(entries).encode()


def _param(d: Path, **changes: object) -> None:
    values = json.loads((d / "params.json").read_text())
    (d / "params.json").write_text(json.dumps(values | changes))


def _truncate(d: Path) -> None:
    path = d / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:5000])


def _norm_weight(d: Path, tensor: Tensor) -> None:
    weights = torch.load(d / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"norm.weight": tensor}, d / "consolidated.00.pth")


BAD_SNAPSHOTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle that runs code": (_pickle_attack, "posix.system"),
    "bare pickle": (_bare_pickle, "consolidated.00.pth"),
    "truncated pth": (_truncate, "not a readable .pth"),
    "header of 2 GB": (lambda d: _safetensors(d, b"{}", b"", length=2 << 30), "2147483648"),
    "overlapping tensors": (lambda d: _safetensors(d, _two_tensors([0, 8], [4, 12]), bytes(12)), "overlaps"),
    "hole": (lambda d: _safetensors(d, _two_tensors([0, 4], [8, 12]), bytes(12)), "hole"),
    "unknown key": (lambda d: _param(d, surprise=1), "surprise"),
    "half a mixture": (lambda d: _param(d, moe={"num_experts": 8}), "num_experts_per_tok"),
    "no experts": (lambda d: _param(d, moe={"num_experts": 8, "num_experts_per_tok": 2}), "experts.0.w1.weight"),
    "wrong shape": (lambda d: _param(d, hidden_dim=97), "another shape"),
    "one layer too many": (lambda d: _param(d, n_layers=3), "layers.2."),
    "one layer too few": (lambda d: _param(d, n_layers=1), "layers.1."),
    "mixed dtypes": (lambda d: _norm_weight(d, torch.ones(64).half()), "float16"),
    "not a number": (lambda d: _norm_weight(d, torch.full((64,), float("nan"))), "finite logits"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer"),
    "damaged tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"x"), "not a sentencepiece model"),
    "tekken only": (lambda d: (d / "tokenizer.model").rename(d / "tekken.json"), "tekken"),
    "no configuration": (lambda d: (d / "params.json").unlink(), "params.json or config.json"),
    "no weights": (lambda d: (d / "consolidated.00.pth").unlink(), "no weights"),
    "name with escapes": (lambda d: _param(d, **{"\x1b[2J\nevil": 1}), "\\x1b[2J\\nevil"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SNAPSHOTS)
def test_bad_snapshot_is_three_lines_and_exit_code_40(
    name: str,
    tmp_path: Path,
    write_snapshot: WriteSnapshot,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil, mention = BAD_SNAPSHOTS[name]
    write_snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path)
    assert main(["generate", str(tmp_path), "the hill", "--max-tokens", "3", "--quiet"]) == 40
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert mention in err
    assert not (tmp_path / "ran-by-pickle").exists()


def test_missing_shard_and_escaping_index_are_told(
    tmp_path: Path, write_snapshot: WriteSnapshot, capfd: pytest.CaptureFixture[str]
) -> None:
    write_snapshot(tmp_path, "huggingface")
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "aside")
    assert main(["generate", str(tmp_path), "x", "--quiet"]) == 40
    assert "model-00001-of-00002.safetensors is missing" in capfd.readouterr().err
    index.write_text(index.read_text().replace("model-00001-of-00002", "../aside"))
    assert main(["generate", str(tmp_path), "x", "--quiet"]) == 40
    assert "unsafe shard" in capfd.readouterr().err


def test_memory_plan_that_does_not_fit_refuses_until_overridden(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mistral_runtime.device.available_memory", lambda: 100 << 20)
    arguments = ["generate", str(snapshot), "the hill", "--max-tokens", "3"]
    assert main([*arguments, "--quiet"]) == 40
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert "100.00 MiB" in err or "0.10 GiB" in err
    assert main([*arguments, "--ignore-memory-plan"]) == 0


USAGE: dict[str, tuple[list[str], str]] = {
    "no command": ([], "required"),
    "unknown flag": (["generate", "D", "x", "--frobnicate"], "--frobnicate"),
    "not a number": (["generate", "D", "x", "--max-tokens", "many"], "many"),
    "zero tokens": (["generate", "D", "x", "--max-tokens", "0"], "--max-tokens"),
    "negative context": (["generate", "D", "x", "--context", "-5"], "--context"),
    "too many threads": (["generate", "D", "x", "--threads", "99999999999"], "--threads"),
    "empty stop": (["generate", "D", "x", "--stop", ""], "--stop"),
    "hot": (["generate", "D", "x", "--temperature", "99"], "temperature"),
    "nan": (["generate", "D", "x", "--top-p", "nan"], "top_p"),
    "unknown device": (["generate", "D", "x", "--device", "abacus"], "abacus"),
    "system prompt for a base model": (["generate", "D", "x", "--system", "s"], "system prompt"),
    "longer than the context": (["generate", "D", "the hill " * 50, "--context", "20"], "at most 20"),
    "prompt that is not UTF-8": (["generate", "D", "caf\udce9"], "UTF-8"),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_request_is_three_lines_and_exit_code_2(
    name: str, snapshot: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, mention = USAGE[name]
    assert main([str(snapshot) if argument == "D" else argument for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert mention in err


def test_a_bug_keeps_its_traceback_and_exits_with_1(snapshot: Path) -> None:
    code = (
        "import sys, mistral_runtime.generate as g\n"
        "def boom(*a): raise ZeroDivisionError('a bug')\n"
        "g.run_generate = boom\n"
        "from mistral_runtime.__main__ import main\n"
        f"sys.exit(main(['generate', {str(snapshot)!r}, 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"ZeroDivisionError: a bug" in done.stderr


def test_missing_torch_is_told_with_what_to_install(snapshot: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mistral_runtime.__main__ import main\n"
        f"sys.exit(main(['generate', {str(snapshot)!r}, 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 40
    assert len(done.stderr.splitlines()) == 3
    assert b"mistral-fetch[runtime]" in done.stderr


# --- the house --------------------------------------------------------------------------------------------------------


def test_help_is_fast_because_torch_stays_out() -> None:
    code = (
        "import sys\n"
        "from mistral_runtime.__main__ import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'sentencepiece', 'mistral_common'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert b"exit codes" in done.stdout


def test_the_runtime_has_no_network_code_and_does_not_know_the_fetcher() -> None:
    forbidden = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "asyncio", "mistral_fetch"}
    for path in RUNTIME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            allowed = {"asyncio", "socket"} if path.parent.name == "serve" else set()
            assert not {name.partition(".")[0] for name in names} & forbidden - allowed, path
