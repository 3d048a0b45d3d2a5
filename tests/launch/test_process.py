"""Running the runtime: its environment, its arguments, signals passed on, and how it ended explained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_fetch.errors import ExitCode, RuntimeFailed
from mistral_fetch.launch import process
from mistral_fetch.launch.locate import Interpreter
from mistral_fetch.launch.process import capture_runtime, run_runtime, runtime_environment

ROOT = Path(__file__).parents[2]

# A runtime that tells what it was given, or misbehaves as its first argument says.
STUB = """
import json, os, signal, sys, time
from mistral_runtime import helper
word = sys.argv[1]
if word == "tell":
    print(json.dumps({"argv": sys.argv[1:], "path": sys.path, "threads": os.environ["OMP_NUM_THREADS"],
                      "helper": helper.VALUE, "name": __name__, "modules": sorted(sys.modules)}))
elif word == "code":
    sys.exit(int(sys.argv[2]))
elif word == "kill":
    os.kill(os.getpid(), int(sys.argv[2]))
elif word == "wait":
    def stop(number, frame):
        print("heard", number, flush=True)
        sys.exit(130)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def interpreter(tmp_path):
    package = tmp_path / "elsewhere" / "mistral_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("VALUE = 7")
    (package / "__main__.py").write_text(STUB)
    return Interpreter(sys.executable, package)


def tell(interpreter, *options, positionals=()):
    code, output = capture_runtime(interpreter, "tell", options, positionals)
    assert code == 0
    return json.loads(output)


def test_arguments_arrive_whole(interpreter):
    told = tell(interpreter, "--stop=-x y", "--system=", positionals=["/snap shot", "--raw\n$HOME 'é'"])
    assert told["argv"] == ["tell", "--stop=-x y", "--system=", "--", "/snap shot", "--raw\n$HOME 'é'"]
    assert (told["name"], told["helper"]) == ("__main__", 7)


def test_the_current_directory_is_no_place_to_import_from(interpreter, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "runpy", "importlib", "mistral_runtime", "json", "sitecustomize"):
        (here / f"{name}.py").write_text(f"open({str(here / 'was-run')!r}, 'w').close(); raise SystemExit(99)")
    monkeypatch.chdir(here)
    told = tell(interpreter)
    assert str(here) not in told["path"]
    assert "" not in told["path"]
    assert not (here / "was-run").exists()


def test_the_runtime_of_another_interpreter_sees_its_own_folder_only(interpreter):
    """Our site-packages hold builds for our interpreter; on another one's path they would break it."""
    assert str(interpreter.runtime_package.parent) not in tell(interpreter)["path"]


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.USAGE, ExitCode.RUNTIME, ExitCode.INTERRUPTED])
def test_exit_codes_that_the_runtime_explains_itself_pass_through(interpreter, code):
    assert run_runtime(interpreter, "code", [str(int(code))], []) == code


@pytest.mark.parametrize("code", [1, 3, 77])
def test_other_exit_codes_are_a_crash(interpreter, code):
    with pytest.raises(RuntimeFailed, match=f"crashed with exit code {code}") as caught:
        run_runtime(interpreter, "code", [str(code)], [])
    assert caught.value.exit_code is ExitCode.RUNTIME


def test_a_kill_is_explained_by_memory(interpreter):
    with pytest.raises(RuntimeFailed, match="ended by SIGKILL") as caught:
        run_runtime(interpreter, "kill", [str(int(signal.SIGKILL))], [])
    assert "out of memory" in caught.value.detail


def test_a_segmentation_fault_is_named(interpreter):
    with pytest.raises(RuntimeFailed, match="ended by SIGABRT"):
        run_runtime(interpreter, "kill", [str(int(signal.SIGABRT))], [])


def test_a_runtime_that_dies_of_a_request_to_stop_was_interrupted(interpreter):
    assert run_runtime(interpreter, "kill", [str(int(signal.SIGTERM))], []) == ExitCode.INTERRUPTED


def test_an_interpreter_that_cannot_start_is_named(interpreter, tmp_path):
    with pytest.raises(RuntimeFailed, match="could not be started"):
        run_runtime(Interpreter(str(tmp_path / "none"), interpreter.runtime_package), "tell", [], [])


LAUNCHER = """
import sys
from pathlib import Path
from mistral_fetch.launch.locate import Interpreter
from mistral_fetch.launch.process import run_runtime
sys.exit(run_runtime(Interpreter(sys.executable, Path(sys.argv[1])), "wait", [], []))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_reach_the_runtime(interpreter, number):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", LAUNCHER, str(interpreter.runtime_package)]
    launcher = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert output == f"heard {int(number)}\n"
    assert launcher.returncode == 130


def test_a_signal_before_the_start_is_delivered_after_it(interpreter):
    before = signal.getsignal(signal.SIGTERM)
    with process._signals_passed_on() as follow:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        child = follow(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]))
        assert child.wait(timeout=20) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_to_be_ignored_stays_ignored():
    """As ``nohup`` asks of a hang-up: neither we nor the runtime hear it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process._signals_passed_on():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_runtime_gets_no_secrets():
    environment = runtime_environment({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b", "HF_HOME": "/x"})
    assert environment.keys().isdisjoint({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
    assert environment["HF_HOME"] == "/x"


def test_ctrl_c_on_a_terminal_is_not_passed_on_twice(monkeypatch):
    monkeypatch.setattr(process, "_terminal_tells_both", lambda: True)
    with process._signals_passed_on() as follow:
        child = follow(subprocess.Popen([sys.executable, "-c", "print(input())"], stdin=subprocess.PIPE, text=True))
        os.kill(os.getpid(), signal.SIGINT)
        child.communicate("still here\n", timeout=20)
    assert child.returncode == 0


def test_the_environment_is_settled_before_pytorch_starts(monkeypatch, interpreter):
    monkeypatch.setattr(process, "usable_threads", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = runtime_environment({"PATH": "/bin"})
    assert (made["OMP_NUM_THREADS"], made["MKL_NUM_THREADS"], made["PATH"]) == ("3", "3", "/bin")
    assert made["HF_HUB_OFFLINE"] == "1"
    assert tell(interpreter)["threads"] == "3"


def test_what_the_user_set_is_left_alone():
    made = runtime_environment({"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "8"})
    assert (made["OMP_NUM_THREADS"], made["MALLOC_ARENA_MAX"]) == ("1", "8")
