"""Transcripts of ``compare``. The runtime is a stub that prints what lies in a directory as its digests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mistral_fetch.cli.compare import find_differences

A, B, C = "a" * 64, "b" * 64, "c" * 64
STUB = """#!{python} -IS
import json, sys
if "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
found = []
for directory in sys.argv[sys.argv.index("--") + 1:]:
    told = json.load(open(directory + "/digests.json"))
    if "error" in told:
        print(json.dumps(told))
        sys.exit(40)
    found.append(dict(told, directory=directory))
print(json.dumps(dict(snapshots=found)))
"""


def tensor(sha256=A, dtype="BF16", shape=(2, 3)):
    return {"dtype": dtype, "shape": list(shape), "sha256": sha256}


@pytest.fixture
def put(tmp_path, environment):
    """Return a function that makes a directory with these tensors, for the stub."""
    stub = tmp_path / "stub-python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    environment.setenv("MISTRAL_FETCH_PYTHON", str(stub))

    def make(name, tensors, layout="huggingface"):
        told = {"layout": layout, "files": ["f"], "tensor_bytes": 12_000, "tensors_sha256": C, "tensors": tensors}
        Path(name).mkdir()
        Path(name, "digests.json").write_text(json.dumps(told))

    return make


def test_the_same_tensors(program, put):
    put("one", {"norm": tensor(), "wq": tensor(B)}, "consolidated.pth")
    put("two", {"wq": tensor(B), "norm": tensor()})
    shown = program("compare", "./one", "./two")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines() == [
        "A: ./one (consolidated.pth)",
        "B: ./two (huggingface)",
        f"the same 2 tensors, 12.0 kB: sha256:{C}",
    ]


def test_whatever_differs_is_named(program, put):
    put("one", {"bytes": tensor(A), "gone": tensor(), "shape": tensor(shape=(6,)), "same": tensor(), "type": tensor()})
    put(
        "two",
        {"bytes": tensor(B), "new": tensor(), "shape": tensor(), "same": tensor(), "type": tensor(dtype="F16")},
    )
    shown = program("compare", "./one", "./two")
    assert (shown.code, shown.err) == (32, "")
    assert shown.out.splitlines()[2:] == [
        f"bytes: A has sha256:{A}, B has sha256:{B}",
        "gone: only in A",
        "new: only in B",
        "shape: shape [6] in A, [2, 3] in B",
        "type: dtype BF16 in A, F16 in B",
        "not the same: 5 of 5 tensors differ",
    ]
    told = program("compare", "./one", "./two", "--json")
    assert told.code == 32
    assert told.json["same"] is False
    assert [(d["tensor"], d["problem"]) for d in told.json["differences"]] == [
        ("bytes", "bytes"),
        ("gone", "missing"),
        ("new", "missing"),
        ("shape", "shape"),
        ("type", "dtype"),
    ]
    assert told.json["differences"][1]["b"] is None
    assert told.json["models"][1] == {
        "model": "./two",
        "directory": "two",
        "layout": "huggingface",
        "files": ["f"],
        "tensor_bytes": 12_000,
        "tensors_sha256": C,
        "tensors": 5,
    }


def test_a_long_list_is_cut_for_people_only(program, put):
    put("one", {f"t{number:02}": tensor(A) for number in range(30)})
    put("two", {f"t{number:02}": tensor(B) for number in range(30)})
    lines = program("compare", "./one", "./two").out.splitlines()
    assert lines[-2:] == ["and 10 more; --json lists all of them", "not the same: 30 of 30 tensors differ"]
    assert len(program("compare", "./one", "./two", "--json").json["differences"]) == 30


def test_a_tensor_s_name_cannot_pose_as_a_line(program, put):
    put("one", {"x\nthe same 2 tensors": tensor()})
    put("two", {})
    assert program("compare", "./one", "./two").out.splitlines()[2] == "x\\nthe same 2 tensors: only in A"


def test_a_model_of_the_cache_and_a_directory(program, put, pulled):
    put("one", {"norm": tensor()})
    (pulled / "digests.json").write_bytes(Path("one/digests.json").read_bytes())
    shown = program("compare", "tiny.meta4", "./one", "--json")
    assert shown.code == 0
    assert [model["directory"] for model in shown.json["models"]] == [str(pulled), "one"]


def test_weights_that_cannot_be_read_are_the_runtime_s_error(program, put):
    put("one", {})
    error = {
        "kind": "malformed-checkpoint",
        "what": "x is not valid",
        "detail": "expected a, found b",
        "hint": "verify",
    }
    Path("one/digests.json").write_text(json.dumps({"error": error}))
    shown = program("compare", "./one", "./one")
    assert (shown.code, shown.out) == (40, "")
    assert shown.err == "error: x is not valid\n  expected a, found b\n  verify\n"
    told = program("compare", "./one", "./one", "--json").json["error"]
    assert (told["what"], told["detail"], told["exit_code"]) == ("x is not valid", "expected a, found b", 40)


@pytest.mark.parametrize("tensors", [{"norm": 7}, 3, None, {"norm": {"sha256": A}}])
def test_an_answer_without_sense_is_an_error(program, put, tensors):
    put("one", tensors)
    put("two", {"norm": tensor()})
    shown = program("compare", "./one", "./two")
    assert (shown.code, shown.out) == (40, "")
    assert "makes no sense" in shown.err


@pytest.mark.parametrize("text, code", [("./nowhere", 3), ("mistral-7b", 3), ("mistral-8b", 3)])
def test_what_is_not_here_is_told_before_anything_starts(program, put, text, code):
    put("one", {})
    shown = program("compare", "./one", text)
    assert (shown.code, shown.out) == (code, "")
    assert len(shown.err.splitlines()) == 3


def test_nothing_differs_between_a_table_and_itself():
    table = {"a": tensor(), "b": tensor(B)}
    assert find_differences(table, dict(reversed(table.items()))) == []
    assert find_differences({}, {}) == []
