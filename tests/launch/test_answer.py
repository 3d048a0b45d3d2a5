"""The runtime's JSON answers and errors, as results and errors of this program. The runtime here is a stub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mistral_fetch.errors import ExitCode, Interrupted, MistralFetchError, OutOfSpace, RuntimeFailed, StoreError
from mistral_fetch.launch.answer import ask_runtime
from mistral_fetch.launch.locate import Interpreter

ERROR = {"kind": "malformed-checkpoint", "what": "it is bad", "detail": "expected good", "hint": "fetch it"}
STUB = """
import sys
print(sys.argv[-1])
sys.exit(int(sys.argv[-2]))
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    package = tmp_path / "mistral_runtime"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STUB)
    return Interpreter(sys.executable, package)


def test_an_object_is_the_answer(interpreter: Interpreter) -> None:
    assert ask_runtime(interpreter, "digest", [], ["0", '{"a": [1]}']) == {"a": [1]}


@pytest.mark.parametrize(
    "kind, code, error, ends_in",
    [
        ("malformed-checkpoint", 40, RuntimeFailed, ExitCode.RUNTIME),
        ("bad-request", 2, RuntimeFailed, ExitCode.USAGE),
        ("disk-full", 40, OutOfSpace, ExitCode.DISK),
        ("write-failed", 40, StoreError, ExitCode.DISK),
    ],
)
def test_an_error_keeps_its_three_lines(
    kind: str, code: int, error: type[MistralFetchError], ends_in: ExitCode, interpreter: Interpreter
) -> None:
    told = json.dumps({"error": {**ERROR, "kind": kind}})
    with pytest.raises(error) as caught:
        ask_runtime(interpreter, "convert", [], [str(code), told])
    assert type(caught.value) is error
    assert caught.value.lines() == ("it is bad", "expected good", "fetch it")
    assert caught.value.exit_code == ends_in


@pytest.mark.parametrize("output", ["", "torch says hello", "[1]", '{"error": 7}', '{"error": {"what": "half"}}'])
@pytest.mark.parametrize("code", [0, 40])
def test_nonsense_is_an_error_whatever_the_exit_code(code: int, output: str, interpreter: Interpreter) -> None:
    with pytest.raises(RuntimeFailed) as caught:
        ask_runtime(interpreter, "digest", [], [str(code), output])
    assert caught.value.exit_code == ExitCode.RUNTIME


def test_a_result_with_a_failed_exit_is_no_result(interpreter: Interpreter) -> None:
    with pytest.raises(RuntimeFailed):
        ask_runtime(interpreter, "digest", [], ["40", '{"a": 1}'])


def test_an_interruption_is_one(interpreter: Interpreter) -> None:
    with pytest.raises(Interrupted):
        ask_runtime(interpreter, "convert", [], ["130", ""])
