"""``publish`` and ``doctor``: a publisher's transcript, and a report fit to be pasted anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


def test_publish_says_what_it_wrote(program, manifest):
    shown = program("publish", "tiny", "--out", "out", "--licence", "Apache-2.0", "--quiet")
    assert (shown.code, shown.err) == (0, "")
    first, *files = shown.out.splitlines()
    assert first == "tiny: 2 files, 281.6 kB"
    assert re.fullmatch(r"  out/tiny.meta4", files[0])
    assert re.fullmatch(r"  out/tiny.torrent \(v1 [0-9a-f]{40}, v2 [0-9a-f]{64}\)", files[1])
    assert re.fullmatch(r"  out/tiny.v1.torrent \(v1 [0-9a-f]{40}, for clients without v2\)", files[2])
    assert files[3].startswith("  out/SHA256SUMS (")
    assert files[4].startswith("Serve out with the files in out/tiny")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "SHA256SUMS",
        "tiny.meta4",
        "tiny.torrent",
        "tiny.v1.torrent",
    ]


def test_what_was_published_can_be_pulled(program, manifest):
    assert program("publish", "tiny", "--out", ".", "--name", "tiny", "--quiet").code == 0
    shown = program("pull", "tiny.meta4", "--json", "--quiet")
    assert shown.code == 0, shown.err
    assert shown.json["assurance"] == "sha256"


@pytest.mark.parametrize("directory", ["nowhere", "empty", "tiny.meta4"])
def test_what_cannot_be_published_is_refused(program, manifest, tmp_path, directory):
    (tmp_path / "empty").mkdir()
    shown = program("publish", directory, "--out", "out", "--quiet")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: cannot publish {directory}")
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_directory_can_have_is_refused(program, manifest):
    for arguments in (["x" * 300, "--out", "out"], ["tiny", "--out", "x" * 300]):
        shown = program("publish", *arguments)
        assert (shown.code, shown.out) == (2, "")
        assert "cannot be a directory" in shown.err.splitlines()[0]
        assert len(shown.err.splitlines()) == 3


def test_doctor_is_calm_on_a_good_machine(program):
    shown = program("doctor")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "program",
        "cache",
        "disk",
        "links",
        "locks",
        "packages",
        "runtime",
        "threads",
        "environment",
    ]
    assert all(line.startswith("ok ") for line in lines)
    assert not program.home.exists()


SECRETS = {
    "HF_TOKEN": "hf_secret",
    "HTTPS_PROXY": "http://someone:geheim@proxy.example:3128",
    "https_proxy": "http://someone:geheim@proxy.example:3128",
    "HF_ENDPOINT": "https://someone:geheim@hub.example",
}


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_doctor_prints_no_secret(program, environment, extra):
    for name, value in SECRETS.items():
        environment.setenv(name, value)
    shown = program("doctor", *extra)
    assert shown.code == 0
    assert "HF_TOKEN" in shown.out
    for secret in ("hf_secret", "geheim", "someone", "proxy.example"):
        assert secret not in shown.out + shown.err


def test_doctor_finds_what_is_missing(program, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_PYTHON", str(tmp_path / "no-such-python"))
    program.home.mkdir()
    (program.home / "VERSION").write_text("99\n")
    shown = program("doctor", "--json")
    assert shown.code == 1
    report = json.loads(shown.out)
    assert [name for name, check in report.items() if not check["ok"]] == ["cache", "runtime"]
    assert "expected layout version 1, got '99'" in report["cache"]["detail"]
    assert "no-such-python" in report["runtime"]["detail"]
