"""``pull --convert``, and what list, show, verify, repair and rm make of the copy. The runtime is a stub but once."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.publisher import PublisherSimulator

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mistral_fetch" / "demo_model"
FILES = {"consolidated.00.pth": b"pickled" * 1000, "params.json": b"{}"}
WEIGHTS = b"tensors" * 1000
CONVERT = ("pull", "m.meta4", "--convert", "safetensors", "--quiet")

# Stands in for a Python with PyTorch: writes the product as the runtime does, or fails as it is told.
STUB = """#!{python} -IS
import hashlib, json, os, signal, sys
if "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
open({record!r}, "a").write(json.dumps(sys.argv[4:]) + "\\n")
word = os.environ.get("STUB", "")
weights = {weights!r}
with open(os.path.join(sys.argv[-1], "consolidated.safetensors"), "wb") as file:
    file.write(weights[:100] if word == "kill" else weights)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "stop":
    sys.exit(130)
if word == "refuse":
    error = dict(kind="unsafe-pickle", what="it is not only weights", detail="found os.system", hint="do not load it")
    print(json.dumps(dict(error=error)))
    sys.exit(40)
answer = dict(file="consolidated.safetensors", recipe="safetensors-1", size=len(weights))
print(json.dumps(dict(answer, sha256="nonsense" if word == "nonsense" else hashlib.sha256(weights).hexdigest())))
"""


@pytest.fixture
def record(tmp_path, environment):
    """Where the stub notes each of its starts."""
    record = tmp_path / "record.jsonl"
    stub = tmp_path / "stub-python"
    stub.write_text(STUB.format(python=sys.executable, record=str(record), weights=WEIGHTS))
    stub.chmod(0o755)
    environment.setenv("MISTRAL_FETCH_PYTHON", str(stub))
    return record


@pytest.fixture
def model(tmp_path, record):
    """``m.meta4`` with a pickle, its files beside it; return the cache's key of it."""
    write_model(tmp_path, FILES)
    return f"m.meta4#{hashlib.sha256((tmp_path / 'm.meta4').read_bytes()).hexdigest()[:16]}"


def write_model(folder, files):
    (folder / "m").mkdir()
    for path, data in files.items():
        (folder / "m" / path).write_bytes(data)
    (folder / "m.meta4").write_bytes(serialise_metalink(PublisherSimulator(files, name="m").manifest()))


def test_the_copy_s_directory_is_printed(program, model, record):
    shown = program(*CONVERT)
    assert (shown.code, shown.err) == (0, "")
    directory = Path(shown.out.strip())
    snapshot = Path(program("path", "m.meta4").out.strip())
    assert directory == program.home / "derived" / "safetensors-1" / snapshot.name
    assert (directory / "consolidated.safetensors").read_bytes() == WEIGHTS
    assert (directory / "params.json").read_bytes() == b"{}"
    assert not (directory / "consolidated.00.pth").exists()
    (told,) = [json.loads(line) for line in record.read_text().splitlines()]
    assert told[:3] == ["convert", f"--reserve={256 << 20}", "--json"]
    assert told[3:5] == ["--", str(snapshot)]
    assert Path(told[5]).parent == directory.parent


def test_json_has_both_directories(program, model):
    told = program(*CONVERT, "--json").json
    snapshot = program("path", "m.meta4").out.strip()
    assert (told["ref"], told["directory"], told["was_complete"]) == (model, snapshot, False)
    assert told["converted"] == {
        "recipe": "safetensors-1",
        "directory": str(program.home / "derived" / "safetensors-1" / Path(snapshot).name),
        "file": "consolidated.safetensors",
        "size": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "was_complete": False,
    }
    again = program(*CONVERT, "--json").json
    assert (again["was_complete"], again["converted"]["was_complete"]) == (True, True)


def test_a_complete_model_is_converted_without_being_fetched(program, model):
    assert program("pull", "m.meta4", "--quiet").code == 0
    for path in FILES:
        Path("m", path).unlink()
    assert program(*CONVERT, "--offline").code == 0


def test_the_second_time_needs_no_runtime(program, model, environment):
    first = program(*CONVERT)
    environment.setenv("MISTRAL_FETCH_PYTHON", "/nowhere/python")
    assert program(*CONVERT).out == first.out


def test_without_a_runtime_nothing_is_fetched(program, model, environment):
    environment.setenv("MISTRAL_FETCH_PYTHON", "/nowhere/python")
    shown = program(*CONVERT)
    assert shown.code == 40
    assert "error: the interpreter /nowhere/python does not answer" in shown.err
    assert program("path", "m.meta4").code == 3


@pytest.mark.parametrize(
    "word, code, what",
    [
        ("refuse", 40, "error: it is not only weights\n  found os.system\n  do not load it\n"),
        ("kill", 40, "error: the runtime was ended by SIGKILL\n"),
        ("stop", 130, "error: interrupted\n"),
        ("nonsense", 40, "error: the runtime made something else than what it was asked for\n"),
    ],
)
def test_a_conversion_that_fails_leaves_the_model_and_nothing_else(program, model, environment, word, code, what):
    environment.setenv("STUB", word)
    shown = program(*CONVERT)
    assert (shown.code, shown.out) == (code, "")
    assert shown.err.startswith(what)
    assert len(shown.err.splitlines()) == 3
    assert [path for path in (program.home / "derived").rglob("*") if path.name != "safetensors-1"] == []
    assert program("path", "m.meta4").code == 0
    environment.delenv("STUB")
    assert program(*CONVERT).code == 0


def test_a_model_without_a_pickle_is_told(program, pulled, record):
    shown = program("pull", "tiny.meta4", "--convert", "safetensors", "--quiet")
    assert (shown.code, shown.out) == (2, "")
    assert "has no weights that need converting" in shown.err
    assert not record.exists()


def test_list_and_show_name_the_copy(program, model):
    directory = program(*CONVERT).out.strip()
    _, row, copy, _, _ = program("list").out.splitlines()
    assert row.startswith(model)
    assert copy.split() == ["safetensors-1", *copy.split()[1:3], "complete"]
    (made,) = program("list", "--json").json["models"][0]["derived"]
    assert (made["recipe"], made["directory"], made["state"]) == ("safetensors-1", directory, "complete")
    assert directory in program("show", "m.meta4").out


def damage(directory):
    product = directory / "consolidated.safetensors"
    product.chmod(0o644)
    product.write_bytes(b"?" + WEIGHTS[1:])


def test_verify_hashes_the_copy_too_and_repair_takes_a_wrong_one_away(program, model, record):
    directory = Path(program(*CONVERT).out.strip())
    shown = program("verify", "--quiet")
    assert (shown.code, shown.out.partition(",")[0]) == (0, "4 files")
    damage(directory)
    shown = program("verify", "m.meta4", "--quiet")
    assert shown.code == 32
    assert shown.out.startswith(f"{model} (safetensors-1): consolidated.safetensors: ")
    told = program("repair", "m.meta4", "--dry-run", "--json", "--quiet").json
    assert (told["discarded"], directory.exists()) == ([], True)
    shown = program("repair", "m.meta4", "--quiet")
    assert shown.code == 0
    assert shown.out.splitlines()[-1].startswith(f"removed the damaged {directory};")
    assert not directory.exists()
    assert program(*CONVERT).code == 0
    assert program("verify", "--quiet").code == 0
    assert len(record.read_text().splitlines()) == 2
    assert program("repair", "m.meta4", "--json", "--quiet").json["discarded"] == []


def test_rm_frees_the_copy_with_the_model(program, model):
    directory = program(*CONVERT).out.strip()
    planned = program("rm", "m.meta4", "--dry-run", "--json").json
    assert directory in planned["deleted"]
    assert Path(directory).is_dir()
    done = program("rm", "m.meta4", "--json").json
    assert done["freed_bytes"] == planned["freed_bytes"] >= len(WEIGHTS) + len(FILES["consolidated.00.pth"])
    assert not Path(directory).exists()
    assert program("list").out == "the cache is empty; see mistral-fetch list --catalog\n"


def test_the_real_runtime_converts_a_real_model_that_compares_as_the_same(program, tmp_path):
    write_model(tmp_path, {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()})
    shown = program(*CONVERT)
    assert shown.code == 0, shown.err
    directory = Path(shown.out.strip())
    assert {path.name for path in directory.iterdir()} >= {"params.json", "tokenizer.model", "RELEASE"}
    assert program("verify", "--quiet").code == 0
    shown = program("compare", "m.meta4", str(directory), "--json")
    assert shown.code == 0, shown.err
    assert shown.json["same"]
    assert [model["layout"] for model in shown.json["models"]] == ["consolidated.pth", "consolidated.safetensors"]
    assert shown.json["models"][0]["tensors"] == 39
