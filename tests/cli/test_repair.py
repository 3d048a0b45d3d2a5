"""Transcripts of repair: what is wrong, what it cost, and that verify passes afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.cli.conftest import FILES, WEIGHTS

PIECE = 65_536


@pytest.fixture
def mirror():
    with PublisherSimulator(FILES, name="tiny").serve() as serving:
        yield serving


@pytest.fixture
def url(mirror):
    return mirror.url("tiny.meta4")


@pytest.fixture
def snapshot(program, url):
    """A model from a mirror, complete."""
    done = program("pull", url, "--quiet")
    assert done.code == 0, done.err
    return Path(done.out.strip())


def flip(snapshot, *offsets):
    blob = (snapshot / "weights.bin").resolve()
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    blob.write_bytes(content)


def test_two_flipped_bytes_cost_two_pieces_and_verify_passes(program, mirror, url, snapshot):
    flip(snapshot, 5, len(WEIGHTS) - 1)
    before = mirror.bytes_sent("tiny/weights.bin")
    shown = program("repair", url, "--quiet")
    cost = PIECE + len(WEIGHTS) % PIECE
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == (
        f"{url}: weights.bin: 2 of 5 pieces differ, the first at bytes [0, 65536)\n"
        f"repaired 1 file, {cost / 1000:.1f} kB received\n"
    )
    assert mirror.bytes_sent("tiny/weights.bin") - before == cost
    assert program("verify", "--quiet").code == 0
    assert program("list", "--partial").out == "nothing is unfinished\n"


def test_programs_get_the_ranges_and_the_bytes(program, url, snapshot):
    flip(snapshot, PIECE)
    shown = program("repair", url, "--quiet", "--json")
    assert shown.code == 0
    (file,) = shown.json["repaired"]
    assert (shown.json["ref"], shown.json["directory"], shown.json["received_bytes"]) == (url, str(snapshot), PIECE)
    assert (file["path"], file["bad_ranges"], file["received_bytes"]) == ("weights.bin", [[PIECE, 2 * PIECE]], PIECE)


def test_a_whole_model_has_nothing_to_repair_and_nobody_is_asked(program, mirror, url, snapshot):
    asked = len(mirror.requests())
    shown = program("repair", url, "--quiet")
    assert (shown.code, shown.out, shown.err) == (0, f"{url}: nothing to repair\n", "")
    assert len(mirror.requests()) == asked
    assert program("repair", url, "--quiet", "--json").json["repaired"] == []


def test_dry_run_says_what_is_wrong_and_changes_nothing(program, mirror, url, snapshot):
    flip(snapshot, 5)
    (snapshot / "params.json").resolve().unlink()
    before = sorted((path, path.lstat().st_mtime_ns) for path in program.home.rglob("*"))
    asked = len(mirror.requests())
    shown = program("repair", url, "--dry-run", "--quiet")
    assert shown.code == 0
    assert shown.out.splitlines()[-1] == "would repair 2 files (65.5 kB wrong or missing)"
    assert sorted((path, path.lstat().st_mtime_ns) for path in program.home.rglob("*")) == before
    assert len(mirror.requests()) == asked
    shown = program("repair", url, "--dry-run", "--quiet", "--json")
    assert shown.json["dry_run"] is True
    assert [file["bad_ranges"] for file in shown.json["repaired"]] == [[[0, 11]], [[0, PIECE]]]


def test_a_model_that_is_not_in_the_cache_is_exit_code_3(program):
    shown = program("repair", "mistral-7b")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.splitlines()[0] == f"error: mistral-7b is not in the cache at {program.home}"
    assert not program.home.exists()


def test_a_directory_is_referred_to_verify(program, manifest):
    shown = program("repair", "./tiny")
    assert shown.code == 2
    assert shown.err.splitlines()[2].endswith("mistral-fetch verify ./tiny --manifest FILE")


def test_a_liar_is_exit_code_32(program, mirror, url, snapshot):
    flip(snapshot, 5)
    mirror.always("tiny/weights.bin", Fault(wrong_bytes_at=(5,)))
    shown = program("repair", url, "--quiet")
    assert (shown.code, shown.out) == (32, "")
    assert len(shown.err.splitlines()) == 3
    assert program("verify", "--quiet").code == 32


def test_without_a_network_it_is_exit_code_6_and_a_good_copy_helps(program, url, snapshot, tmp_path):
    flip(snapshot, 5)
    shown = program("repair", url, "--offline", "--quiet")
    assert (shown.code, shown.out) == (6, "")
    (tmp_path / "usb").mkdir()
    (tmp_path / "usb/weights.bin").write_bytes(WEIGHTS)
    shown = program("repair", url, "--offline", "--from", "usb", "--quiet")
    assert shown.code == 0, shown.err
    assert shown.out.endswith("repaired 1 file, 0 B received\n")
    assert program("verify", "--quiet").code == 0


def test_a_model_from_this_disk_is_repaired_from_this_disk(program, manifest, pulled):
    flip(pulled, 5)
    shown = program("repair", "tiny.meta4", "--quiet", "--offline")
    assert shown.code == 6  # its files are a source like any other, as for pull
    shown = program("repair", "tiny.meta4", "--quiet", "--json")
    assert shown.json["received_bytes"] == PIECE
    assert program("verify", "--quiet").code == 0


def test_a_damaged_copy_in_the_snapshot_is_replaced(program, url, snapshot):
    blob = (snapshot / "weights.bin").resolve()
    (snapshot / "weights.bin").unlink()
    shutil.copy(blob, snapshot / "weights.bin")
    (snapshot / "weights.bin").chmod(0o644)
    with (snapshot / "weights.bin").open("r+b") as file:
        file.write(b"\x7f")
    shown = program("repair", url, "--quiet", "--json")
    assert (shown.code, shown.json["received_bytes"]) == (0, 0)
    assert program("verify", "--quiet").code == 0
