"""Bundles at the command line: whole outputs and exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import FILES, ROOT


def run(home: Path, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own, for what goes through descriptors."""
    argv = [sys.executable, "-m", "mistral_fetch", *arguments, "--home", str(home)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MISTRAL_FETCH_DISK_RESERVE": "0"}
    return subprocess.run(argv, input=stdin, env=environment, capture_output=True, check=False, timeout=60)


def test_create_verify_import(program, pulled, tmp_path):
    made = program("bundle", "create", "tiny.meta4", "--quiet")
    assert (made.code, made.out, made.err) == (0, f"{tmp_path / 'tiny-1.tar'}\n", "")
    proved = program("bundle", "verify", "tiny-1.tar", "--quiet")
    assert (proved.code, proved.err) == (0, "")
    assert "every byte of" in proved.out
    taken = program("bundle", "import", "tiny-1.tar", "--home", "other", "--quiet")
    assert (taken.code, taken.err) == (0, "")
    directory = Path(taken.out.strip())
    assert {path: (directory / path).read_bytes() for path in FILES} == FILES
    listed = program("list", "--home", "other", "--json").json["models"]
    assert [(model["channel"], model["state"], model["assurance"]) for model in listed] == [
        ("manifest", "complete", "sha256")
    ]
    again = program("bundle", "import", "tiny-1.tar", "--home", "other", "--json", "--quiet").json["models"]
    assert [(model["was_complete"], model["read_bytes"]) for model in again] == [(True, 0)]
    assert program("verify", "--home", "other", "--quiet").code == 0


def test_a_stream_goes_from_cache_to_cache_and_leaves_standard_output_alone(program, pulled, tmp_path):
    home = tmp_path / "home"
    sent = run(home, "bundle", "create", "tiny.meta4", "-o", "-", "--quiet")
    assert (sent.returncode, sent.stderr) == (0, b"")
    assert program("bundle", "create", "tiny.meta4", "-o", "b.tar", "--quiet").code == 0
    assert sent.stdout == (tmp_path / "b.tar").read_bytes()
    taken = run(tmp_path / "other", "bundle", "import", "-", "--json", "--quiet", stdin=sent.stdout)
    assert taken.returncode == 0, taken.stderr
    (model,) = json.loads(taken.stdout)["models"]
    assert {path: (Path(model["directory"]) / path).read_bytes() for path in FILES} == FILES
    assert run(home, "bundle", "create", "tiny.meta4", "-o", "-", "--json").returncode == 2
    cut = run(tmp_path / "third", "bundle", "import", "-", "--quiet", stdin=sent.stdout[:-2000])
    assert (cut.returncode, cut.stdout) == (32, b"")
    assert len(cut.stderr.splitlines()) == 3


def test_volumes(program, pulled, tmp_path):
    made = program("bundle", "create", "tiny.meta4", "-o", "b.tar", "--split", "100kB", "--json", "--quiet")
    names = made.json["files"]
    assert [Path(name).name for name in names][:2] == ["b.tar.001", "b.tar.002"]
    assert len(names) == -(-made.json["size"] // 100_000)
    taken = program("bundle", "import", *reversed(names), "--home", "other", "--quiet")
    assert taken.code == 0, taken.err
    assert program("bundle", "verify", *names[:-1], "--quiet").code == 32
    assert program("bundle", "verify", *names[1:], "--quiet").code == 3


def test_exit_codes(program, pulled, tmp_path):
    assert program("bundle", "create", "tiny.meta4", "-o", "b.tar", "--quiet").code == 0
    assert program("bundle", "create", "tiny.meta4", "-o", "b.tar", "--quiet").code == 13
    assert program("bundle", "create", "mistral-7b", "--quiet").code == 3
    assert program("bundle", "create", "tiny.meta4", "-o", "none/b.tar", "--quiet").code == 3
    assert program("bundle", "create", "tiny.meta4", "-o", "c.tar", "--split", "x", "--quiet").code == 2
    assert program("bundle", "verify", "none.tar", "--quiet").code == 3
    assert program("bundle", "import", "b.tar", "--min-assurance", "best", "--quiet").code == 2
    assert program("bundle", "import", "b.tar", "--home", "x", "--min-assurance", "signed", "--quiet").code == 33
    data = (tmp_path / "b.tar").read_bytes()
    at = data.index(FILES["weights.bin"]) + 70_000
    (tmp_path / "bad.tar").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    bad = program("bundle", "verify", "bad.tar", "--json", "--quiet")
    assert (bad.code, bad.json["ok"]) == (32, False)
    (piece,) = bad.json["wrong"]
    assert (piece["path"], piece["index"], piece["start"], piece["end"]) == ("weights.bin", 1, 65536, 131072)
    refused = program("bundle", "import", "bad.tar", "--home", "y", "--quiet")
    assert (refused.code, refused.out) == (32, "")
    assert "weights.bin in bad.tar: piece 1 at bytes [65536, 131072) is wrong" in refused.err
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    assert program("bundle", "import", "junk.tar", "--quiet").code == 20
    assert program("bundle", "import", "junk.tar", "-", "--quiet", stdin=io.StringIO("")).code == 2
