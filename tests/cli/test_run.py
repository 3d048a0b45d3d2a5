"""``run`` and ``chat``: what reaches the runtime, and what its end means. The runtime here is a stub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for a Python with PyTorch: says that nothing is missing when asked, then records how it was started.
STUB = """#!{python} -IS
import json, os, signal, sys, time
if "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
reads = sys.argv[-1] == "-"
told = {{"argv": sys.argv[4:], "stdin": sys.stdin.read() if reads else None, "threads": os.environ["OMP_NUM_THREADS"]}}
open({record!r}, "w").write(json.dumps(told))
word = os.environ.get("STUB", "0")
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    print("ready", flush=True)
    time.sleep(30)
if word == "0":
    print('{{"text": "an answer"}}' if "--json" in sys.argv else "an answer")
sys.exit(int(word))
"""


class Stub:
    """The interpreter, and what it was last started with."""

    def __init__(self, folder):
        self.path = folder / "stub-python"
        self._record = folder / "record.json"
        self.path.write_text(STUB.format(python=sys.executable, record=str(self._record)))
        self.path.chmod(0o755)

    @property
    def was_started(self):
        return self._record.exists()

    @property
    def told(self):
        return json.loads(self._record.read_text())


@pytest.fixture
def runtime(tmp_path, environment):
    stub = Stub(tmp_path)
    environment.setenv("MISTRAL_FETCH_PYTHON", str(stub.path))
    return stub


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    return "./model"


def test_run_fetches_what_is_missing_and_hands_over_the_snapshot(program, runtime, manifest):
    shown = program("run", "tiny.meta4", "hello")
    directory = program("path", "tiny.meta4").out.strip()
    assert (shown.code, shown.out) == (0, "an answer\n")
    assert runtime.told["argv"] == ["generate", "--prompt=hello", "--", directory]
    assert "complete and verified (sha256)" in shown.err


def test_a_directory_is_run_as_it_is(program, runtime, model):
    shown = program("run", model, "hello")
    assert (shown.code, shown.out, shown.err) == (0, "an answer\n", "")
    assert runtime.told["argv"] == ["generate", "--prompt=hello", "--", "model"]
    assert not program.home.exists()


def test_every_option_arrives_as_one_argument(program, runtime, model):
    options = {
        "--max-tokens": "16",
        "--temperature": "0.5",
        "--top-p": "0.9",
        "--top-k": "40",
        "--min-p": "0.05",
        "--repetition-penalty": "1.1",
        "--seed": "-7",
        "--system": "-s x",
        "--chat-template": "v3",
        "--device": "cpu",
        "--dtype": "float32",
        "--context": "512",
        "--threads": "2",
        "--lora": "an adapter",
        "--lora-scale": "1.5",
        "--tp": "4",
        "--lookup": "off",
        "--kv": "int8",
    }
    given = [word for pair in options.items() for word in pair]
    program(
        "run",
        model,
        "--raw",
        "--quiet",
        "--lora-apart",
        "--compile",
        "--stop",
        "\n",
        "--stop",
        "--",
        *given,
        "--",
        "--not an option",
    )
    command, *arguments = runtime.told["argv"]
    separator = arguments.index("--")
    assert command == "generate"
    assert sorted(arguments[:separator]) == sorted(
        [
            *(f"{name}={value}" for name, value in options.items()),
            "--stop=\n",
            "--stop=--",
            "--lora-apart",
            "--compile",
            "--raw",
            "--quiet",
            "--prompt=--not an option",
        ]
    )
    assert arguments[separator:] == ["--", "model"]


@pytest.mark.parametrize("prompt", ["--", "---", "", "-x", "--help"])
def test_a_prompt_arrives_whatever_it_looks_like(program, runtime, model, prompt):
    assert program("run", model, "--", prompt).code == 0
    assert runtime.told["argv"] == ["generate", f"--prompt={prompt}", "--", "model"]


NAMES = {"an unknown user": "~nosuchuser/model", "a long name": "./" + "x" * 300}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_directory_that_cannot_be_is_explained(program, runtime, command, name):
    shown = program(command, name, *["hello"] * (command == "run"))
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith(f"error: there is no directory {name}\n")
    assert len(shown.err.splitlines()) == 3


@pytest.mark.parametrize("command", ["pull", "path", "show", "rm"])
def test_a_manifest_of_an_unknown_user_is_explained(program, command):
    shown = program(command, "~nosuchuser/x.meta4")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith("error: cannot read ~nosuchuser/x.meta4\n")
    assert len(shown.err.splitlines()) == 3


def test_a_program_that_is_no_python_is_refused(program, model, environment):
    environment.setenv("MISTRAL_FETCH_PYTHON", "/bin/true")
    shown = program("run", model, "hello")
    assert (shown.code, shown.out) == (40, "")
    assert shown.err.startswith("error: the interpreter /bin/true does not answer\n")


def run_in_shell(arguments, env, **options):
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "mistral_fetch", *arguments]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize("prompt", [["-"], []], ids=["a dash", "nothing"])
def test_a_piped_prompt_reaches_the_runtime(runtime, model, prompt):
    done = run_in_shell(["run", model, *prompt], {}, input="from a pipe é\n")
    assert (done.returncode, done.stdout) == (0, "an answer\n"), done.stderr
    assert runtime.told["argv"][-1] == "-"
    assert runtime.told["stdin"] == "from a pipe é\n"


def test_chat_starts_the_chat(program, runtime, model):
    shown = program("chat", model, "--system", "Be brief.", "--temperature", "0")
    assert shown.code == 0
    assert runtime.told["argv"] == ["chat", "--system=Be brief.", "--temperature=0.0", "--", "model"]


def test_chat_passes_an_adapter_on(program, runtime, model):
    program("chat", model, "--lora", "an adapter", "--lora-scale", "1.5", "--lora-apart")
    options = ["--lora=an adapter", "--lora-scale=1.5", "--lora-apart"]
    assert runtime.told["argv"] == ["chat", *options, "--", "model"]


@pytest.mark.parametrize("code", [0, 2, 40, 130])
def test_exit_codes_pass_through(program, runtime, model, environment, code):
    environment.setenv("STUB", str(code))
    shown = program("run", model, "hello")
    assert (shown.code, shown.err) == (code, "")


def test_a_crash_is_a_failed_runtime(program, runtime, model, environment):
    environment.setenv("STUB", "1")
    shown = program("run", model, "hello")
    assert shown.code == 40
    assert shown.err.splitlines()[0] == "error: the runtime crashed with exit code 1"


def test_a_killed_runtime_is_explained(program, runtime, model, environment):
    environment.setenv("STUB", "kill")
    shown = program("run", model, "hello")
    assert shown.code == 40
    assert shown.err == (
        "error: the runtime was ended by SIGKILL\n"
        "  expected it to finish, but the system may have run out of memory\n"
        "  mistral-fetch doctor shows the memory; a smaller --context needs less of it\n"
    )


def test_json_is_the_runtimes_own_result(program, runtime, model):
    shown = program("run", model, "hello", "--json")
    assert (shown.code, shown.json) == (0, {"text": "an answer"})
    assert "--json" in runtime.told["argv"]


@pytest.mark.parametrize("word, code", [("40", 40), ("2", 2), ("1", 40), ("kill", 40)])
def test_json_of_a_failed_runtime_is_an_error(program, runtime, model, environment, word, code):
    environment.setenv("STUB", word)
    shown = program("run", model, "hello", "--json")
    assert (shown.code, shown.json["error"]["exit_code"], shown.json["error"]["kind"]) == (code, code, "runtime-failed")


def test_a_missing_runtime_is_known_before_anything_is_fetched(program, manifest, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_PYTHON", str(tmp_path / "no-such-python"))
    shown = program("run", "tiny.meta4", "hello")
    assert (shown.code, shown.out) == (40, "")
    assert "no-such-python does not answer" in shown.err
    assert "pip install 'mistral-fetch[runtime]'" in shown.err
    assert not program.home.exists()


def test_a_directory_that_is_not_there(program, runtime):
    shown = program("run", "./nowhere", "hello")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith("error: there is no directory ./nowhere\n")
    assert not runtime.was_started


def test_sigterm_reaches_the_runtime(runtime, model):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STUB": "wait"}
    argv = [sys.executable, "-m", "mistral_fetch", "run", model, "hello"]
    launcher = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 130


def test_threads_are_settled_before_the_runtime_starts(program, runtime, model, environment):
    environment.delenv("OMP_NUM_THREADS", raising=False)
    environment.setattr("mistral_fetch.launch.process.usable_threads", lambda: 5)
    program("run", model, "hello")
    assert runtime.told["threads"] == "5"
