"""Transcripts of the cache commands: list, path, verify, rm."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from mistral_fetch import __version__

SIZE = "281.6 kB"


def key(manifest):
    return f"tiny.meta4#{hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]}"


def damage(snapshot, offset=100_000):
    blob = (snapshot / "weights.bin").resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x7f\x7f")


def test_version(program):
    shown = program("--version")
    assert (shown.code, shown.out, shown.err) == (0, f"mistral-fetch {__version__}\n", "")


def test_list_of_an_empty_cache(program):
    shown = program("list")
    assert (shown.code, shown.out, shown.err) == (0, "the cache is empty; see mistral-fetch list --catalog\n", "")
    assert not program.home.exists()


def test_list_shows_what_is_there(program, manifest, pulled):
    shown = program("list")
    assert (shown.code, shown.err) == (0, "")
    heading, row, nothing, total = shown.out.splitlines()
    assert heading.split() == [
        "MODEL",
        "CHANNEL",
        "SIZE",
        "EXCLUSIVE",
        "SHARED",
        "ASSURANCE",
        "PULLED",
        "USED",
        "STATE",
    ]
    own = r"[0-9.]+ kB"
    expected = rf"{re.escape(key(manifest))}  manifest  {SIZE}  {own} +0 B     sha256     \ds ago  \ds ago  complete"
    assert re.fullmatch(expected, row)
    assert nothing == ""
    assert re.fullmatch(rf"{own} on disk: {own} models, {own} other", total)


def test_list_names_a_model_that_lost_a_file(program, pulled):
    (pulled / "weights.bin").resolve().unlink()
    assert program("list").out.splitlines()[1].endswith("damaged")


def leave_unfinished(program):
    """Begin a pull that ends before the last piece, which its source has wrong."""
    with Path("tiny/weights.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert program("pull", "tiny.meta4", "--quiet").code != 0


def test_list_shows_what_is_unfinished(program, manifest):
    leave_unfinished(program)
    shown = program("list", "--partial")
    assert shown.code == 0
    heading, *rows = shown.out.splitlines()
    assert heading.split() == ["UNFINISHED", "FILE", "HELD", "BEGUN"]
    assert rows
    assert {tuple(row.split()[:2]) for row in rows} <= {(key(manifest), "params.json"), (key(manifest), "weights.bin")}
    assert program("list").out.startswith(shown.out)  # no complete model above them


def test_list_of_nothing_unfinished(program, pulled):
    assert program("list", "--partial").out == "nothing is unfinished\n"


def test_list_catalog(program):
    shown = program("list", "--catalog")
    assert (shown.code, shown.err) == (0, "")
    heading, *rows = shown.out.splitlines()
    assert heading.split() == ["MODEL", "PARAMETERS", "WEIGHTS", "LICENCE", "CHANNELS", "NOTE"]
    assert all(row.index("Apache-2.0") == heading.index("LICENCE") for row in rows)
    first = next(row for row in rows if row.startswith("mistral-7b@v0.1"))
    assert "14.48 GB (13.49 GiB)" in first
    assert first.endswith("mistral-7b means this one")


def test_pull_prints_the_directory_and_path_repeats_it(program, manifest, pulled):
    assert (pulled / "weights.bin").read_bytes() == (manifest.parent / "tiny/weights.bin").read_bytes()
    for command in (["path", "tiny.meta4"], ["pull", "tiny.meta4"], ["path", str(manifest)]):
        shown = program(*command)
        assert (shown.code, shown.out, shown.err) == (0, f"{pulled}\n", "")


def test_pull_tells_people_what_it_did_on_standard_error(program, manifest):
    shown = program("pull", "tiny.meta4")
    assert shown.out == f"{program.home / 'snapshots'}/{shown.out.strip().rpartition('/')[2]}\n"
    assert shown.err.splitlines()[-1] == f"{key(manifest)}: complete and verified (sha256), {SIZE} received"


def test_path_of_a_model_that_is_not_there(program, manifest):
    shown = program("path", "tiny.meta4")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err == (
        f"error: tiny.meta4 is not complete in the cache at {program.home}\n"
        "  expected a complete snapshot, got none\n"
        "  fetch it with: mistral-fetch pull tiny.meta4\n"
    )


def test_verify_says_that_every_byte_is_right(program, pulled):
    shown = program("verify", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    assert re.fullmatch(rf"2 files, {SIZE}: every byte is right \(\ds\)\n", shown.out)
    assert program("verify", "tiny.meta4", "--quiet").code == 0


def test_verify_names_the_damaged_range(program, manifest, pulled):
    damage(pulled)
    shown = program("verify", "--quiet")
    assert (shown.code, shown.err) == (32, "")
    assert shown.out == (
        f"{key(manifest)}: weights.bin: 1 of 5 pieces differ, the first at bytes [65536, 131072)\n"
        "1 file is wrong; what a cache holds is repaired with: mistral-fetch repair REF\n"
    )


def test_verify_gives_programs_the_damaged_ranges(program, pulled):
    damage(pulled, 65_535)  # the last byte of the first piece and the first of the second
    shown = program("verify", "--quiet", "--json")
    assert shown.code == 32
    files = {file["path"]: file for file in shown.json["models"][0]["files"]}
    assert not shown.json["ok"]
    assert files["params.json"]["ok"]
    assert not files["weights.bin"]["ok"]
    assert files["weights.bin"]["bad_ranges"] == [[0, 65536], [65536, 131072]]


def test_verify_of_an_empty_cache_has_nothing_to_vouch_for(program):
    shown = program("verify")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith(f"error: there is nothing to verify in the cache at {program.home}\n")


def test_verify_goes_on_after_a_model_whose_files_are_gone(program, manifest, pulled):
    record = next((program.home / "refs").glob("tiny.meta4*/*"))
    gone = record.parent.with_name("gone.meta4") / record.name
    gone.parent.mkdir()
    fields = json.loads(record.read_bytes()) | {"ref": "gone.meta4", "snapshot": "ab" * 32}
    gone.write_text(json.dumps(fields))
    shown = program("verify", "--quiet", "--json")
    assert shown.code == 32
    models = {model["ref"]: model["files"] for model in shown.json["models"]}
    assert [file["ok"] for file in models[key(manifest)]] == [True, True]
    assert [file["ok"] for file in models["gone.meta4"]] == [False]
    assert "is not complete" in models["gone.meta4"][0]["problem"]


def test_verify_of_a_directory_against_its_manifest(program, manifest):
    shutil.copy(manifest, "tiny")
    assert program("verify", "./tiny", "--quiet").code == 0
    os.truncate("tiny/weights.bin", 1000)
    shown = program("verify", "./tiny", "--quiet")
    assert shown.code == 32
    assert "weights.bin" in shown.out
    assert program("verify", "./tiny", "--manifest", str(manifest), "--quiet").code == 32


def test_verify_of_a_directory_without_manifest_asks_for_one(program, manifest):
    shown = program("verify", "./tiny")
    assert (shown.code, shown.out) == (3, "")
    assert "--manifest FILE" in shown.err


def test_rm_dry_run_prints_the_plan_and_touches_nothing(program, pulled):
    shown = program("rm", "tiny.meta4", "--dry-run")
    assert (shown.code, shown.err) == (0, "")
    blobs = sorted(str((pulled / name).resolve()) for name in ("params.json", "weights.bin"))
    *plan, total = shown.out.splitlines()
    assert plan[0] == f"would delete {pulled}"
    assert sorted(plan[1:]) == [f"would delete {blob}" for blob in blobs]
    assert total == f"would free {SIZE}"
    assert program("verify", "--quiet").out.startswith("2 files")


def test_rm_deletes_the_model_and_its_blobs(program, pulled):
    shown = program("rm", "tiny.meta4")
    assert (shown.code, shown.out, shown.err) == (0, f"freed {SIZE}\n", "")
    assert not pulled.exists()
    assert [path for path in (program.home / "blobs").rglob("*") if path.is_file()] == []
    again = program("rm", "tiny.meta4")
    assert again.code == 3
    assert "is not in the cache" in again.err


def test_rm_keeps_blobs_that_another_model_uses(program, manifest, pulled):
    text = manifest.read_text().replace('m:name="tiny"', 'm:name="tiny two"')
    (manifest.parent / "other.meta4").write_text(text)
    assert program("pull", "other.meta4", "--quiet").code == 0
    assert program("rm", "tiny.meta4").code == 0
    assert program("verify", "other.meta4", "--quiet").code == 0


def test_a_pull_that_brought_nothing_leaves_nothing_unfinished(program, manifest):
    shutil.rmtree("tiny")
    assert program("pull", "tiny.meta4", "--quiet").code != 0
    assert program("list").out.startswith("the cache is empty")


def test_rm_deletes_what_is_unfinished(program, manifest):
    leave_unfinished(program)
    assert not program("list").out.startswith("the cache is empty")
    assert program("rm", "tiny.meta4").code == 0
    assert program("list").out.startswith("the cache is empty")
