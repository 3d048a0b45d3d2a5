"""Transcripts of ``--from``: what is on the machine already is not fetched."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256

import pytest


@pytest.fixture
def beside(manifest):
    """The manifest's own files moved away, to a directory called ``usb``."""
    shutil.move("tiny", "usb")
    return manifest


def test_pull_from_a_directory_receives_nothing_and_says_what_it_took(program, beside):
    shown = program("pull", "tiny.meta4", "--from", "usb")
    assert shown.code == 0, shown.err
    usb = beside.parent / "usb"
    told = shown.err.splitlines()
    assert any(line.startswith(f"weights.bin: adopted {usb}/weights.bin (") for line in told)
    assert told[-1].endswith("complete and verified (sha256), 0 B received")
    assert program("verify", "--quiet").code == 0


def test_several_directories_may_be_named(program, beside):
    (beside.parent / "other").mkdir()
    shutil.move("usb/params.json", "other")
    shown = program("pull", "tiny.meta4", "--from", "usb", "--from", "other", "--offline", "--json", "--quiet")
    assert (shown.code, shown.json["received_bytes"]) == (0, 0)


def test_offline_is_refused_as_ever_without_a_directory_or_with_one_that_lacks_a_file(program, beside):
    bare = program("pull", "tiny.meta4", "--offline")
    assert bare.code == 6
    assert not program.home.exists()
    (beside.parent / "usb/params.json").unlink()
    lacking = program("pull", "tiny.meta4", "--offline", "--from", "usb", "--quiet")
    assert (lacking.code, lacking.err) == (6, bare.err)


def test_a_directory_that_is_not_there_is_explained(program, manifest):
    shown = program("pull", "tiny.meta4", "--from", "nowhere")
    assert (shown.code, shown.out) == (3, "")
    assert shown.err.startswith("error: there is no directory nowhere\n")


def test_the_hub_s_cache_can_be_left_out_by_the_environment(program, beside, environment, tmp_path):
    files = {file: (tmp_path / "usb" / file).read_bytes() for file in ("params.json", "weights.bin")}
    for content in files.values():
        blob = tmp_path / "huggingface/hub/models--a--b/blobs" / sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
    environment.setenv("MISTRAL_FETCH_HF_CACHE", "false")
    assert program("pull", "tiny.meta4", "--quiet").code != 0  # its own files are gone
    environment.setenv("MISTRAL_FETCH_HF_CACHE", "true")
    shown = program("pull", "tiny.meta4", "--quiet", "--json")
    assert (shown.code, shown.json["received_bytes"]) == (0, 0)


def test_show_tells_where_it_was_found(program, beside):
    program("pull", "tiny.meta4", "--from", "usb", "--quiet")
    assert f"      adopted from {beside.parent / 'usb'}" in program("show", "tiny.meta4").out


def test_adoption_in_ndjson_ends_in_a_verified_file(program, beside):
    shown = program("pull", "tiny.meta4", "--from", "usb", "--progress", "json")
    events = [json.loads(line) for line in shown.err.splitlines()]
    names = [event["event"] for event in events]
    assert "bytes-received" not in names
    assert [event["path"] for event in events if event["event"] == "file-verified"] == ["params.json", "weights.bin"]
