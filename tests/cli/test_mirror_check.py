"""``mirror check``: one word and its exit code."""

from __future__ import annotations

import json

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator

PUBLISHER = PublisherSimulator({"weights.bin": bytes(range(256)) * 2344, "sub/params.json": b'{"dim": 8}'}, name="m")


@pytest.fixture
def mirror():
    with PUBLISHER.serve() as simulator:
        yield simulator


@pytest.fixture
def program_check(program, mirror, tmp_path):
    (tmp_path / "right.meta4").write_bytes(serialise_metalink(PUBLISHER.manifest()))
    return lambda *arguments: program("mirror", "check", *arguments)


@pytest.mark.parametrize(
    ("fault", "code", "word"),
    [
        (None, 0, "fine"),
        (Fault(ignores_range=True), 6, "no ranges"),
        (Fault(status=404), 6, "unreachable"),
        (Fault(wrong_bytes_at=(70_000,)), 32, "lying"),
        (Fault(size=1000), 32, "stale"),
    ],
)
def test_the_command_says_one_word_and_its_code(program_check, mirror, fault, code, word):
    if fault:
        mirror.always("m/weights.bin", fault)
    shown = program_check(mirror.url("m.meta4"), "--pieces", "30", "--seed", "7")
    assert shown.code == code, shown.err
    assert shown.out.startswith(f"{mirror.url('m.meta4')}: {word} (")
    assert "--seed 7" in shown.out


def test_the_command_in_json(program_check, mirror):
    mirror.always("m/weights.bin", Fault(wrong_bytes_at=(70_000,)))
    shown = program_check(mirror.url("m/"), "--manifest", "right.meta4", "--pieces", "30", "--json")
    assert shown.code == 32
    told = json.loads(shown.out)
    assert (told["verdict"], told["pieces"]) == ("lying", 11)
    weights = next(file for file in told["files"] if file["path"] == "weights.bin")
    assert weights["wrong_ranges"] == [[65536, 131072]]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ftp://x/m.meta4"], 2),
        (["http://127.0.0.1:1/m/"], 2),
        (["http://127.0.0.1:1/m.meta4"], 6),
        (["http://127.0.0.1:1/m/", "--manifest", "none.meta4"], 3),
        ([], 2),
        (["http://127.0.0.1:1/m.meta4", "--offline"], 6),
    ],
)
def test_the_command_refuses(program_check, arguments, code):
    assert program_check(*arguments).code == code
