"""``serve``: what reaches the runtime, or vLLM. Both are stubs here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

STUB = """#!{python} -IS
import json, os, sys
if len(sys.argv) > 2 and "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
told = {{"argv": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "token": os.environ.get("HF_TOKEN")}}
open({record!r}, "w").write(json.dumps(told))
"""


@pytest.fixture
def stub(tmp_path):
    """Return a function that writes a program which records how it was started, and a function that reads that."""

    def make(name):
        path, record = tmp_path / name, tmp_path / f"{name}.json"
        path.write_text(STUB.format(python=sys.executable, record=str(record)))
        path.chmod(0o755)
        return path, lambda: json.loads(record.read_text())

    return make


@pytest.fixture
def runtime(stub, environment):
    path, told = stub("stub-python")
    environment.setenv("MISTRAL_FETCH_PYTHON", str(path))
    return lambda: told()["argv"][3:]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"")
    (tmp_path / "model" / "params.json").write_text('{"sliding_window": 4096}')
    return "./model"


def test_serve_fetches_what_is_missing_and_hands_over_the_snapshot(program, runtime, manifest):
    shown = program("serve", "tiny.meta4")
    directory = program("path", "tiny.meta4").out.strip()
    assert shown.code == 0
    assert runtime() == ["serve", "--host=127.0.0.1", "--port=8000", "--model-name=tiny", "--", directory]


def test_every_option_arrives(program, runtime, model):
    options = {
        "--host": "::1",
        "--port": "0",
        "--api-key-file": "keys",
        "--context": "512",
        "--dtype": "float32",
        "--uds": "socket",
        "--max-body": "4096",
        "--drain-timeout": "2.5",
        "--max-running": "3",
        "--max-queue": "4",
        "--chat-template": "v3",
        "--device": "cpu",
        "--threads": "2",
        "--lora": "adapter",
        "--lora-scale": "1.5",
        "--model-name": "a",
        "--allowed-host": "b",
        "--allow-origin": "https://c",
        "--quantize": "int8",
    }
    given = [word for pair in options.items() for word in pair]
    program("serve", model, "--deterministic", "--lora-apart", "--quiet", *given)
    command, *arguments = runtime()
    assert command == "serve"
    assert arguments[-2:] == ["--", "model"]
    expected = {f"{name}={value}" for name, value in options.items()} | {"--deterministic", "--lora-apart", "--quiet"}
    assert set(arguments[:-2]) == expected


def test_the_runtime_understands_them(program, runtime, model):
    from mistral_runtime.arguments import build_parser

    program("serve", model, "--deterministic", "--max-running", "3", "--quantize", "int8", "--allow-origin", "null")
    args = build_parser().parse_args(runtime())
    assert (args.command, args.max_running, args.deterministic, args.quantize) == ("serve", 3, True, "int8")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--json"], "no single result"),
        (["--tp", "2"], "the engine built-in takes no --tp"),
        (["--engine", "vllm", "--uds", "x"], "the engine vllm takes no --uds"),
        (["--engine", "vllm", "--quantize", "int8"], "the engine vllm takes no --quantize"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(program, runtime, model, flags, words):
    shown = program("serve", model, *flags)
    assert shown.code == 2
    assert words in shown.err + shown.out


def run_vllm(model, *flags):
    """Run in a process of its own: it becomes vLLM."""
    argv = [sys.executable, "-m", "mistral_fetch", "serve", model, "--engine", "vllm", *flags]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def vllm(stub, environment, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    path, told = stub("vllm")
    path.rename(folder / "vllm")
    environment.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    environment.setenv("HF_TOKEN", "a-token")
    return told


def test_vllm_is_started_on_the_directory(vllm, model, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o600)
    done = run_vllm(model, "--host", "0.0.0.0", "--api-key-file", str(key), "--vllm-arg=--x=1", "--model-name", "m")
    assert (done.returncode, done.stderr) == (0, "")
    told = vllm()
    assert (told["key"], told["token"]) == ("secret", None)
    assert told["argv"] == [
        "serve",
        "model",
        "--host=0.0.0.0",
        "--port=8000",
        "--served-model-name",
        "m",
        "--tokenizer-mode=auto",
        "--config-format=mistral",
        "--load-format=mistral",
        '--hf-overrides={"rope_theta": 10000.0, "sliding_window": 4096}',
        "--x=1",
    ]


def test_vllm_serves_no_network_without_a_key(vllm, model):
    done = run_vllm(model, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "could use this server" in done.stderr


def test_a_missing_vllm_is_told_before_anything_is_fetched(program, environment, tmp_path, manifest):
    environment.setenv("PATH", str(tmp_path / "nothing"))
    shown = program("serve", "tiny.meta4", "--engine", "vllm")
    assert shown.code == 40
    assert "vLLM is not installed" in shown.err
    assert not program.home.exists()
