"""``quantize`` and ``--quantize``: what is kept, what is used, and what never is. The runtime here is a stub."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store import derived_check
from mistral_fetch.transfer.quantize import SIZE_PERCENT

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mistral_fetch" / "demo_model"
KEY = "int4-g64-1+torch2.13.0+avx512bf16"
OTHER_KEY = "int4-g64-1+torch2.14.0+avx512bf16"
FILES = {"consolidated.00.pth": b"pickled" * 1000, "params.json": b"{}"}
QUANTIZE = ("quantize", "m.meta4", "--to", "int4", "--quiet")
RUN = ("run", "m.meta4", "hello", "--quantize", "int4", "--quiet")

# Stands in for a Python with PyTorch. Its weights are of its key, and whatever runs on them prints which they are.
STUB = """#!{python} -IS
import hashlib, json, os, signal, sys, time
if "find_spec" in sys.argv[2] and "runpy" not in sys.argv[2]:
    print("missing:")
    sys.exit(0)
open({record!r}, "a").write(json.dumps(sys.argv[4:]) + "\\n")
word, key, command = os.environ.get("STUB", ""), os.environ.get("STUB_KEY", {key!r}), sys.argv[4]
def fail(kind):
    print(json.dumps(dict(error=dict(kind=kind, what="no", detail="expected more, got less", hint="try another"))))
    sys.exit(40)
recipe = key.partition("+")[0]
weights = (key * 99).encode()
if command != "quantize":
    last = sys.argv.index("--") + 1
    print(json.dumps(dict(weights=open(os.path.join(sys.argv[last], "quantized.safetensors")).read())))
    sys.exit(0)
if "--describe" in sys.argv:
    if word == "old":
        fail("bad-request")
    answer = dict(recipe=recipe, key=key, product="quantized.safetensors")
    print(json.dumps(dict(answer, key=dict(slash="a/b", dots="..", none=None).get(word, key))))
    sys.exit(0)
with open(os.path.join(sys.argv[-1], "quantized.safetensors"), "wb") as file:
    file.write(weights[:100] if word in ("kill", "orphan") else weights)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(0)
if word == "stop":
    sys.exit(130)
if word == "full":
    fail("disk-full")
if word == "slow":
    time.sleep(0.5)
answer = dict(file="quantized.safetensors", recipe=recipe, key="another" if word == "upgraded" else key)
answer.update(size=len(weights), sha256=hashlib.sha256(weights).hexdigest(), seconds=1.5, quality=dict(mse=0.25))
print(json.dumps(answer))
"""


@pytest.fixture
def record(tmp_path, environment):
    """Where the stub notes each of its starts."""
    record = tmp_path / "record.jsonl"
    stub = tmp_path / "stub-python"
    stub.write_text(STUB.format(python=sys.executable, record=str(record), key=KEY))
    stub.chmod(0o755)
    environment.setenv("MISTRAL_FETCH_PYTHON", str(stub))
    return record


def publish(folder, files):
    (folder / "m").mkdir()
    for path, data in files.items():
        (folder / "m" / path).write_bytes(data)
    (folder / "m.meta4").write_bytes(serialise_metalink(PublisherSimulator(files, name="m").manifest()))


@pytest.fixture
def model(tmp_path, record):
    """``m.meta4`` with a pickle, its files beside it."""
    publish(tmp_path, FILES)


def starts(record, *, made=False):
    """Return what the runtime was started with, in order; ``made``: only where weights were to be written."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return [line for line in lines if not made or (line[0] == "quantize" and "--describe" not in line)]


def weights_of(key):
    return (key * 99).encode()


def product_of(program, key=KEY):
    (directory,) = (program.home / "derived" / key).iterdir()
    return directory / "quantized.safetensors"


def change(path, data):
    path.chmod(0o644)
    path.write_bytes(data)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_copy_s_directory_is_printed(program, model, record):
    shown = program(*QUANTIZE)
    assert (shown.code, shown.err) == (0, "")
    directory = Path(shown.out.strip())
    snapshot = Path(program("path", "m.meta4").out.strip())
    assert directory == program.home / "derived" / KEY / snapshot.name
    assert (directory / "quantized.safetensors").read_bytes() == weights_of(KEY)
    assert (directory / "params.json").read_bytes() == b"{}"
    described, made = starts(record)
    assert described == ["quantize", "--describe", "--to=int4", "--json", "--"]
    assert made[:6] == ["quantize", "--to=int4", f"--reserve={256 << 20}", "--quiet", "--json", "--"]
    assert made[6] == str(snapshot)
    assert Path(made[7]).parent == directory.parent


@pytest.mark.parametrize(
    "weights",
    [
        ["consolidated.00.pth"],
        ["consolidated.safetensors"],
        ["model.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ["consolidated.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ["consolidated.00.pth", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
    ],
)
def test_it_stands_for_all_weights_of_any_layout_and_for_nothing_else(program, tmp_path, record, weights):
    others = {"config.json": b"{}", "tokenizer.model": b"t", "adapter.bin": b"a"}
    publish(tmp_path, {**{path: path.encode() * 99 for path in weights}, **others})
    directory = Path(program(*QUANTIZE).out.strip())
    papers = {"LICENSE", "PROVENANCE.json", "manifest.meta4", ".complete"}
    assert {path.name for path in directory.iterdir()} - papers == {"quantized.safetensors", *others}


def test_json_tells_what_was_made_the_second_time_too(program, model, record):
    first, second = program(*QUANTIZE, "--json").json, program(*QUANTIZE, "--json").json
    directory = product_of(program).parent
    assert first == {
        "ref": f"m.meta4#{hashlib.sha256(Path('m.meta4').read_bytes()).hexdigest()[:16]}",
        "content_digest": directory.name,
        "recipe": "int4-g64-1",
        "directory": str(directory),
        "file": "quantized.safetensors",
        "size": len(weights_of(KEY)),
        "sha256": hashlib.sha256(weights_of(KEY)).hexdigest(),
        "was_complete": False,
        "key": KEY,
        "made": {"seconds": 1.5, "quality": {"mse": 0.25}},
    }
    assert second == {**first, "was_complete": True}
    assert len(starts(record, made=True)) == 1


def test_a_person_is_told_what_is_written_and_what_was(program, model):
    shown = program("quantize", "m.meta4", "--to", "int4")
    assert ": writing 2.0 kB of int4 weights\n" in shown.err
    assert shown.err.endswith(f": 3.3 kB of int4 weights kept as {KEY}\n")
    assert program("quantize", "m.meta4", "--to", "int4").err == ""


def test_a_model_without_weights_is_told(program, tmp_path, record):
    publish(tmp_path, {"params.json": b"{}", "weights.gguf": b"g"})
    shown = program(*QUANTIZE)
    assert (shown.code, shown.out) == (2, "")
    assert "has no weights that can be quantized" in shown.err
    assert starts(record, made=True) == []


def test_a_disk_without_room_is_refused_with_numbers_before_anything_is_written(program, model, record, environment):
    class Usage(NamedTuple):
        free: int

    assert program("pull", "m.meta4", "--quiet").code == 0
    environment.setenv("MISTRAL_FETCH_DISK_RESERVE", "0")
    for to, needed in (("int4", 2030), ("int8", 3710)):
        environment.setattr(shutil, "disk_usage", lambda _path, needed=needed: Usage(needed - 1))
        shown = program("quantize", "m.meta4", "--to", to, "--quiet")
        assert (shown.code, shown.out) == (9, "")
        assert "not enough space to quantize" in shown.err
        assert f"({needed / 1000:.1f} kB to write" in shown.err
    assert starts(record, made=True) == []
    environment.setattr(shutil, "disk_usage", lambda _path: Usage(2030))
    assert program(*QUANTIZE).code == 0


def test_the_room_asked_for_is_enough_for_mistral_7b():
    """What the runtime says it writes for the model's shapes."""
    from mistral_runtime.config import ModelConfig
    from mistral_runtime.quantized_file import Recipe, stored_bytes

    config = ModelConfig(4096, 32, 128, 14336, 32, 8, 32768, 1e-5, 1e6)
    published = sum(2 * math.prod(shape) for shape in config.tensor_shapes().values())
    for to, percent in SIZE_PERCENT.items():
        written = stored_bytes(config, Recipe.of(to, None))
        assert percent - 2 < 100 * written / published < percent


# --- what is used ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "run": (["hello"], ["generate", "--quiet", "--prompt=hello"], []),
    "chat": ([], ["chat", "--quiet"], []),
    "bench": ([], ["bench", "--quiet"], []),
    "ppl": (["text.txt"], ["ppl", "--quiet"], ["text.txt"]),
    "logits": (["hello"], ["logits", "--prompt=hello", "--quiet"], []),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_model_is_fetched_and_quantized_at_the_first_use_and_run_from_the_copy(program, model, record, name):
    given, options, positionals = COMMANDS[name]
    for _ in range(2):
        shown = program(name, "m.meta4", *given, "--quantize", "int4", "--quiet")
        assert (shown.code, shown.err) == (0, "")
        assert shown.json == {"weights": weights_of(KEY).decode()}
        assert starts(record)[-1] == [*options, "--", str(product_of(program).parent), *positionals]
    assert len(starts(record, made=True)) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_is_quantized_by_the_runtime_in_memory(program, model, record, name):
    Path("m/quantized.safetensors").write_text("{}")
    given, options, positionals = COMMANDS[name]
    assert program(name, "./m", *given, "--quantize", "int8", "--quiet").code == 0
    assert starts(record) == [[options[0], "--quantize=int8", *options[1:], "--", "m", *positionals]]
    assert not (program.home / "derived").exists()


def test_a_directory_has_no_place_for_a_copy(program, model, record):
    shown = program("quantize", "./m", "--to", "int8", "--json")
    assert (shown.code, shown.json["error"]["kind"]) == (2, "usage-error")
    assert "mistral-fetch run ./m --quantize int8" in shown.json["error"]["hint"]
    assert not record.exists()


@pytest.mark.parametrize("arguments", [("quantize", "m.meta4"), ("quantize", "m.meta4", "--to", "int3")])
def test_how_far_has_to_be_said(program, model, record, arguments):
    assert program(*arguments).code == 2
    assert not record.exists()


# --- what is never used ----------------------------------------------------------------------------------------------


def rotten(product):
    change(product, b"?" + product.read_bytes()[1:])


def rotten_and_dated_back(product):
    times = product.stat()
    rotten(product)
    os.utime(product, ns=(times.st_atime_ns, times.st_mtime_ns))


def of_another_key(product):
    change(product, weights_of(OTHER_KEY))  # as long as the right one


def truncated(product):
    change(product, product.read_bytes()[:-1])


def linked_elsewhere(product):
    """Right today, but no stamp of the link tells when what it leads to changes."""
    elsewhere = product.parents[3] / "elsewhere"
    product.rename(elsewhere)
    product.symlink_to(elsewhere)


def gone(product):
    product.unlink()


def with_other_papers(product):
    change(product.with_name("manifest.meta4"), b"<metalink/>")


def without_papers(product):
    change(product.with_name("PROVENANCE.json"), b"{")


ATTACKS = (
    rotten,
    rotten_and_dated_back,
    of_another_key,
    truncated,
    linked_elsewhere,
    gone,
    with_other_papers,
    without_papers,
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_what_was_written_is_made_again_and_never_run(program, model, record, attack):
    program(*QUANTIZE)
    product = product_of(program)
    attack(product)
    shown = program("run", "m.meta4", "hello", "--quantize", "int4")
    assert (shown.code, shown.json) == (0, {"weights": weights_of(KEY).decode()})
    assert f"{product.parent} is not what was written; making it again" in shown.err
    assert len(starts(record, made=True)) == 2
    assert product.read_bytes() == weights_of(KEY)
    assert not product.is_symlink()
    assert program("verify", "--quiet").code == 0


def test_what_was_only_touched_is_hashed_once_and_kept(program, model, record, environment):
    program(*QUANTIZE)
    hashed = []
    verify = derived_check.verify_directory
    environment.setattr(derived_check, "verify_directory", lambda *given: hashed.append(1) or verify(*given))
    program(*RUN)
    assert hashed == []
    product = product_of(program)
    shutil.copyfile(product, product.with_name("copy"))
    product.with_name("copy").replace(product)  # as in a cache that was copied: the same bytes, another file
    for _ in range(2):
        assert program(*RUN).json == {"weights": weights_of(KEY).decode()}
        assert hashed == [1]
    assert len(starts(record, made=True)) == 1
    rotten(product)
    program(*RUN)
    assert hashed == [1, 1, 1]  # before the lock is waited for, and again with it held
    assert len(starts(record, made=True)) == 2


def test_piece_hashes_of_a_verify_do_not_change_what_is_right(program, model, record):
    program(*QUANTIZE)
    assert program("verify", "--quiet").code == 0
    program(*RUN)
    assert len(starts(record, made=True)) == 1
    rotten(product_of(program))
    assert program(*RUN).json == {"weights": weights_of(KEY).decode()}


def test_another_torch_or_processor_gets_a_copy_of_its_own(program, model, record, environment):
    program(*RUN)
    environment.setenv("STUB_KEY", OTHER_KEY)
    assert program(*RUN).json == {"weights": weights_of(OTHER_KEY).decode()}
    environment.setenv("STUB_KEY", KEY)
    assert program(*RUN).json == {"weights": weights_of(KEY).decode()}
    assert len(starts(record, made=True)) == 2
    made = program("list", "--json").json["models"][0]["derived"]
    assert [(one["recipe"], one["state"]) for one in made] == [(KEY, "complete"), (OTHER_KEY, "complete")]
    shown = program("show", "m.meta4").out
    assert all(one["directory"] in shown for one in made)
    assert program("pull", "m.meta4", "--convert", "safetensors", "--quiet").code == 40  # this stub cannot
    done = program("rm", "m.meta4", "--json").json
    assert {one["directory"] for one in made} <= set(done["deleted"])
    assert list((program.home / "derived").rglob("*.safetensors")) == []


def test_verify_says_what_it_hashed_and_repair_takes_a_wrong_one_away(program, model, record, environment):
    program(*RUN)
    environment.setenv("STUB_KEY", OTHER_KEY)
    program(*RUN)
    summary, *made = program("verify", "m.meta4", "--quiet").out.splitlines()
    assert summary.startswith("6 files, ")
    assert [line.partition(" ")[2] for line in made] == [f"({key}): as it was made" for key in (KEY, OTHER_KEY)]
    rotten(product_of(program, OTHER_KEY))
    shown = program("verify", "m.meta4", "--quiet")
    assert shown.code == 32
    assert f" ({OTHER_KEY}): quantized.safetensors: " in shown.out
    assert "as it was made" not in shown.out
    shown = program("repair", "m.meta4", "--quiet")
    assert shown.out.splitlines()[-1].startswith(f"removed the damaged {program.home / 'derived' / OTHER_KEY}/")
    assert product_of(program).read_bytes() == weights_of(KEY)
    assert program("verify", "--quiet").code == 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["old", "slash", "dots", "none"])
def test_a_runtime_that_cannot_say_what_it_makes_is_told_before_anything_is_fetched(program, model, environment, word):
    environment.setenv("STUB", word)
    shown = program(*RUN)
    assert (shown.code, shown.out, len(shown.err.splitlines())) == (40, "", 3)
    assert program("path", "m.meta4").code == 3


@pytest.mark.parametrize(
    "word, code, what",
    [
        ("full", 9, "error: no\n  expected more, got less\n  try another\n"),
        ("kill", 40, "error: the runtime was ended by SIGKILL\n"),
        ("stop", 130, "error: interrupted\n"),
        ("upgraded", 40, "error: the runtime made something else than what it was asked for\n"),
    ],
)
def test_a_failure_leaves_the_model_and_nothing_else(program, model, environment, word, code, what):
    environment.setenv("STUB", word)
    shown = program(*QUANTIZE)
    assert (shown.code, shown.out, len(shown.err.splitlines())) == (code, "", 3)
    assert shown.err.startswith(what)
    assert list((program.home / "derived" / KEY).iterdir()) == []
    assert program("path", "m.meta4").code == 0
    environment.delenv("STUB")
    assert program(*RUN).json == {"weights": weights_of(KEY).decode()}


def begin(*arguments):
    argv = [sys.executable, "-m", "mistral_fetch", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_killed_at_work_leaves_nothing_half(program, model, record, environment):
    environment.setenv("STUB", "orphan")
    process = begin(*QUANTIZE)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (draft,) = (program.home / "derived" / KEY).iterdir()
    assert (draft.name[0], draft.suffix) == (".", ".tmp")
    assert program("list", "--json").json["models"][0]["derived"] == []
    environment.delenv("STUB")
    assert program(*RUN).json == {"weights": weights_of(KEY).decode()}
    assert not draft.exists()


def test_two_processes_at_once_make_one_copy(program, model, record, environment):
    environment.setenv("STUB", "slow")
    assert program("pull", "m.meta4", "--quiet").code == 0
    running = [begin(*RUN) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert [json.loads(out) for out, _ in ended] == [{"weights": weights_of(KEY).decode()}] * 2
    assert len(starts(record, made=True)) == 1


def test_two_processes_that_find_it_damaged_make_it_again_once(program, model, record, environment):
    program(*QUANTIZE)
    rotten(product_of(program))
    environment.setenv("STUB", "slow")
    running = [begin(*RUN) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in running]
    assert [json.loads(out) for out, _ in ended] == [{"weights": weights_of(KEY).decode()}] * 2
    assert len(starts(record, made=True)) == 2


# --- the real runtime ------------------------------------------------------------------------------------------------


def test_the_real_runtime_quantizes_a_real_model_and_runs_it(program, tmp_path):
    publish(tmp_path, {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()})
    greedy = ("--json", "--quiet", "--temperature", "0", "-n", "8", "--device", "cpu")
    shown = program("run", "m.meta4", "the", "--quantize", "int8", *greedy)
    assert shown.code == 0, shown.err
    made = program("list", "--json").json["models"][0]["derived"]
    assert [one["state"] for one in made] == ["complete"]
    assert made[0]["recipe"].startswith("int8-")
    told = program("quantize", "m.meta4", "--to", "int8", "--json").json
    assert (told["was_complete"], told["directory"]) == (True, made[0]["directory"])
    assert 0 < told["made"]["quality"]["relative_error"] < 0.05
    assert program("verify", "--quiet").code == 0
    # From the directory as it is, and quantized in memory: the same weights, so the same text.
    kept = program("run", made[0]["directory"], "the", *greedy).json
    in_memory = program("run", "./m", "the", "--quantize", "int8", *greedy).json
    assert shown.json["text"] == kept["text"] == in_memory["text"] != ""


def test_for_a_gpu_the_runtime_quantizes_what_was_published(program, model, record):
    program("run", "m.meta4", "hello", "--quantize", "int4", "--device", "cuda", "--quiet")  # the stub wants a copy
    (started,) = starts(record)
    assert started[:2] == ["generate", "--quantize=int4"]
    assert not (Path(started[-1]) / "quantized.safetensors").exists()
