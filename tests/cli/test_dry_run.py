"""Transcripts of pull --dry-run: the whole plan, and not a byte on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple

import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.cli.conftest import FILES, SIZE, WEIGHTS

PIECE = 65_536
TINY = PublisherSimulator(FILES, name="tiny")


@pytest.fixture
def mirror():
    with TINY.serve() as serving:
        yield serving


def free(environment, size):
    usage = namedtuple("usage", "total used free")
    environment.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, size))
    environment.setenv("MISTRAL_FETCH_DISK_RESERVE", "1000")


def everything(home):
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_ino) for path in home.rglob("*"))


def test_a_fresh_home_stays_absent_and_no_content_is_asked_for(program, mirror, environment):
    free(environment, 10**7)
    url = mirror.url("tiny.meta4")
    shown = program("pull", url, "--dry-run")
    host = "{}:{}".format(*mirror.address)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == (
        f"FILE         SIZE      MISSING   FROM{' ' * (len(host) - 4)}  ASSURANCE\n"
        f"params.json  11 B      11 B      {host}  sha256\n"
        f"weights.bin  281.6 kB  281.6 kB  {host}  sha256\n"
        f"{url}: would fetch 281.6 kB of 281.6 kB by manifest\n"
        "disk: 281.6 kB needed and 1.0 kB kept in reserve, 10.0 MB free\n"
    )
    assert not program.home.exists()
    assert {request.path for request in mirror.requests()} == {"tiny.meta4"}


def test_programs_get_the_same(program, mirror, environment):
    free(environment, 10**7)
    plan = program("pull", mirror.url("tiny.meta4"), "--dry-run", "--json").json
    assert (plan["was_complete"], plan["directory"], plan["channel"], plan["refused"]) == (
        False,
        None,
        "manifest",
        None,
    )
    assert plan["files"][1] == {
        "path": "weights.bin",
        "size": len(WEIGHTS),
        "present_bytes": 0,
        "missing_bytes": len(WEIGHTS),
        "sources": ["{}:{}".format(*mirror.address)],
        "adoptable": [],
        "assurance": "sha256",
    }
    assert (plan["total_bytes"], plan["to_fetch_bytes"], plan["present_bytes"]) == (SIZE, SIZE, 0)
    assert plan["disk"] == {"needed_bytes": SIZE, "reserve_bytes": 1000, "free_bytes": 10**7}


def test_a_complete_model_says_so(program, manifest, pulled):
    before = everything(program.home)
    shown = program("pull", "tiny.meta4", "--dry-run")
    key = f"tiny.meta4#{hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]}"
    assert (shown.code, shown.out) == (0, f"{key}: complete in {pulled}; nothing to fetch\n")
    assert program("pull", "tiny.meta4", "--dry-run", "--json").json["directory"] == str(pulled)
    again = program("pull", "tiny.meta4", "--dry-run", "--refresh", "--json").json
    assert (again["to_fetch_bytes"], again["files"][1]["sources"]) == (0, ["this cache"])
    assert everything(program.home) == before


def test_what_an_earlier_run_left_counts_as_present_and_is_left_alone(program, mirror):
    mirror.script("tiny/weights.bin", [Fault(end_at=3 * PIECE)] + [Fault(status=404)] * 9)
    assert program("pull", mirror.url("tiny.meta4"), "--quiet").code != 0
    before = everything(program.home)
    plan = program("pull", mirror.url("tiny.meta4"), "--dry-run", "--json").json
    assert plan["files"][1]["present_bytes"] == 3 * PIECE
    assert plan["disk"]["needed_bytes"] == plan["to_fetch_bytes"] == plan["total_bytes"] - plan["present_bytes"]
    assert everything(program.home) == before


def test_a_damaged_blob_is_not_touched(program, manifest, pulled):
    blob = (pulled / "weights.bin").resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.write(b"\x7f")
    before = everything(program.home)
    assert program("pull", "tiny.meta4", "--dry-run", "--refresh").code == 0
    assert everything(program.home) == before


def test_a_disk_that_is_too_small_is_exit_code_9_as_for_the_pull(program, mirror, environment):
    free(environment, SIZE + 999)
    url = mirror.url("tiny.meta4")
    shown = program("pull", url, "--dry-run")
    assert shown.code == 9
    assert f"would be refused (exit 9): not enough space in the cache at {program.home}\n" in shown.out
    refused = program("pull", url, "--dry-run", "--json").json["refused"]
    assert (refused["kind"], refused["exit_code"]) == ("out-of-space", 9)
    assert program("pull", url, "--quiet").code == 9
    free(environment, SIZE + 1000)
    assert program("pull", url, "--dry-run").code == 0


def test_too_weak_a_proof_is_exit_code_33_as_for_the_pull(program):
    with TINY.serve(TINY.manifest(piece_length=None, has_sha256=False)) as mirror:
        url = mirror.url("tiny.meta4")
        shown = program("pull", url, "--dry-run")
        assert shown.code == 33
        assert "would be refused (exit 33): nothing strong enough vouches for params.json\n" in shown.out
        assert program("pull", url, "--quiet").code == 33
        plan = program("pull", url, "--dry-run", "--json", "--min-assurance", "size").json
        assert (plan["refused"], plan["files"][0]["assurance"]) == (None, "size")


def test_what_may_be_adopted_is_shown_and_needs_no_disk(program, mirror, environment, tmp_path):
    (tmp_path / "usb").mkdir()
    (tmp_path / "usb/weights.bin").write_bytes(WEIGHTS)
    free(environment, 2000)
    shown = program("pull", mirror.url("tiny.meta4"), "--dry-run", "--from", "usb")
    assert shown.code == 0
    assert f"adopted from {tmp_path / 'usb/weights.bin'}" in shown.out
    assert "would fetch 11 B of 281.6 kB by manifest, 281.6 kB to adopt if right\n" in shown.out
    assert "disk: 11 B needed" in shown.out
    assert (tmp_path / "usb/weights.bin").stat().st_nlink == 1
    assert not program.home.exists()


def test_offline_it_is_as_the_pull_would_be(program, manifest, tmp_path):
    assert program("pull", "tiny.meta4", "--dry-run", "--offline").code == 6
    shutil.move("tiny", "usb")
    assert program("pull", "tiny.meta4", "--dry-run", "--offline", "--from", "usb").code == 0
    (tmp_path / "usb/params.json").unlink()
    shown = program("pull", "tiny.meta4", "--dry-run", "--offline", "--from", "usb")
    assert shown.code == 6
    assert "would be refused (exit 6)" in shown.out
    assert "params.json  11 B      11 B      nowhere" in shown.out


def test_local_files_are_named_as_such(program, manifest):
    plan = program("pull", "tiny.meta4", "--dry-run", "--json").json
    assert [file["sources"] for file in plan["files"]] == [["local files"], ["local files"]]


def test_a_torrent_names_its_swarm_and_what_that_proves(program, tmp_path):
    made = TINY.publish(tmp_path / "out")
    plan = program("pull", made.plain_torrent_path, "--dry-run", "--json").json
    assert [file["assurance"] for file in plan["files"]] == ["btv1", "btv1"]
    assert plan["files"][0]["sources"] == [f"torrent {made.plain_info_hash[:8]}…"]
    assert not program.home.exists()


@pytest.mark.swarm
def test_a_magnet_s_metadata_is_not_kept(program, tmp_path):
    made = TINY.publish(tmp_path / "out")
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
    seeder = Seeder(parse_metainfo(made.torrent_path.read_bytes()), tmp_path / "out/tiny", settings)
    try:
        seeder.wait_until_seeding(30)
        magnet = f"magnet:?xt=urn:btih:{made.info_hash_v1}"
        shown = program("pull", magnet, "--dry-run", "--peer", f"127.0.0.1:{seeder.port}", "--json", "--quiet")
    finally:
        seeder.close()
    assert shown.code == 0, shown.out
    assert shown.json["total_bytes"] == SIZE
    assert not program.home.exists()


def test_an_unknown_source_is_the_error_of_the_pull(program):
    shown = program("pull", "http://127.0.0.1:1/model.meta4", "--dry-run", "--json")
    assert (shown.code, shown.json["error"]["exit_code"]) == (6, 6)
    assert not program.home.exists()


def test_several_models_are_several_plans(program, manifest, mirror):
    shown = program("pull", "tiny.meta4", mirror.url("tiny.meta4"), "--dry-run", "--json")
    assert [plan["was_complete"] for plan in shown.json] == [False, False]
