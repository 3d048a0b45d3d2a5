"""``bench``, ``ppl`` and ``logits``: what reaches the runtime, and its answer as ours. The runtime here is a stub."""

from __future__ import annotations

import json
import sys

import pytest

STUB = """#!{python} -IS
import json, sys
if "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
open({record!r}, "w").write(json.dumps(sys.argv[4:]))
if "--top=0" in sys.argv:
    print(json.dumps({{"error": dict(kind="bad-request", what="no", detail="expected more", hint="more")}}))
    sys.exit(2)
print('{{"next": []}}')
"""


@pytest.fixture
def told(tmp_path, environment):
    """Return a function that gives the arguments the runtime was last started with."""
    stub, record = tmp_path / "stub-python", tmp_path / "record.json"
    stub.write_text(STUB.format(python=sys.executable, record=str(record)))
    stub.chmod(0o755)
    (tmp_path / "model").mkdir()
    environment.setenv("MISTRAL_FETCH_PYTHON", str(stub))
    return lambda: json.loads(record.read_text())


COMPUTE = ["--device", "cpu", "--dtype", "float32", "--threads", "2", "--ignore-memory-plan"]
COMMANDS = {
    "bench": (
        ["--prompt-tokens", "8", "--decode-tokens", "4", "--rounds", "2", "--plot", "x.svg", "--timings"],
        ["--prompt-tokens=8", "--decode-tokens=4", "--rounds=2", "--plot=x.svg", "--timings"],
    ),
    "ppl": (["--context", "64", "--stride", "8"], ["--context=64", "--stride=8"]),
    "logits": (
        ["--top", "3", "--all", "--raw", "--system", "-s", "--chat-template", "v3"],
        ["--top=3", "--all", "--raw", "--system=-s", "--chat-template=v3"],
    ),
}
POSITIONALS = {"bench": [], "ppl": ["-x.txt"], "logits": ["--help"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_arrives_as_one_argument(program, told, name):
    given, expected = COMMANDS[name]
    shown = program(name, *given, *COMPUTE, "--quiet", "--", "./model", *POSITIONALS[name])
    assert (shown.code, shown.out) == (0, '{"next": []}\n')
    separator = told().index("--")
    prompt = ["--prompt=--help"] if name == "logits" else []
    compute = ["--device=cpu", "--dtype=float32", "--threads=2", "--ignore-memory-plan", "--quiet"]
    assert sorted(told()[:separator]) == sorted([name, *expected, *compute, *prompt])
    assert told()[separator + 1 :] == ["model", *(POSITIONALS[name] if name == "ppl" else [])]


def test_a_missing_model_is_fetched_first(program, told, manifest):
    shown = program("ppl", "tiny.meta4", "text.txt")
    assert "complete and verified" in shown.err
    assert told() == ["ppl", "--", program("path", "tiny.meta4").out.strip(), "text.txt"]


def test_json_is_the_runtimes_answer_or_its_error(program, told):
    shown = program("logits", "./model", "hello", "--json")
    assert (shown.code, shown.json) == (0, {"next": []})
    assert "--json" in told()
    shown = program("logits", "./model", "hello", "--top", "0", "--json")
    assert shown.code == 2
    assert "expected more" in json.dumps(shown.json)


def test_timings_reach_run_and_chat(program, told):
    program("run", "./model", "hello", "--timings")
    assert told() == ["generate", "--timings", "--prompt=hello", "--", "model"]
    program("chat", "./model", "--timings")
    assert told() == ["chat", "--timings", "--", "model"]
