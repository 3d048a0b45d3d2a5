"""Ctrl-C, SIGTERM and readers that leave: a pull stops in good order, says so, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_fetch.simulators.publisher import PublisherSimulator

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4096 * 2  # 2 MiB, 32 pieces of 64 KiB


@pytest.fixture
def mirror():
    with PublisherSimulator({"weights.bin": CONTENT}, name="m").serve(rate_bytes_per_second=1_000_000) as simulator:
        yield simulator


def start(environment, *arguments, **options):
    environment.setenv("PYTHONPATH", str(ROOT))
    argv = [sys.executable, "-m", "mistral_fetch", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(argv, text=True, **options)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_pull_keeps_its_state_and_goes_on(environment, mirror, tmp_path, number):
    pull = ["pull", mirror.url("m.meta4"), "--home", tmp_path / "home"]
    process = start(environment, *pull, "--progress", "plain")
    wait_until(lambda: mirror.bytes_sent("m/weights.bin") > 600_000)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-3:] == [
        "error: stopped before the transfer was complete",
        "  everything verified so far is kept",
        "  run the same command again to go on",
    ]
    sent = mirror.bytes_sent("m/weights.bin")
    assert sent < len(CONTENT)
    mirror.rate_bytes_per_second = None
    done = start(environment, *pull, "--quiet")
    out, err = done.communicate(timeout=30)
    assert (done.returncode, err) == (0, "")
    assert Path(out.strip(), "weights.bin").read_bytes() == CONTENT
    # What was in flight is lost: the piece under way and what the sockets held.
    second = int(mirror.requests("m/weights.bin")[-1].range.removeprefix("bytes=").partition("-")[0] or 0)
    assert second > 300_000


def test_a_stopped_pull_in_json(environment, mirror, tmp_path):
    process = start(environment, "pull", mirror.url("m.meta4"), "--home", tmp_path / "home", "--json", "--quiet")
    wait_until(lambda: mirror.bytes_sent("m/weights.bin") > 100_000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert '"kind": "interrupted"' in out
    assert len(out.splitlines()) == 1


def test_a_second_ctrl_c_insists(environment, tmp_path):
    """Even where the orderly stop does not come: here a mirror that says nothing at all."""
    from mistral_fetch.simulators.mirror import Fault, MirrorSimulator

    with MirrorSimulator({"m.meta4": b"x"}) as mirror:
        mirror.always("m.meta4", Fault(hang_at=-1))
        process = start(environment, "pull", mirror.url("m.meta4"), "--home", tmp_path / "home", "--quiet")
        wait_until(lambda: mirror.requests("m.meta4"))
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize("arguments", [["list", "--catalog"], ["show", "mistral-7b"], ["--help"], ["pull", "--help"]])
def test_a_reader_that_leaves_is_no_error(environment, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(environment, *arguments, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=20)
    assert err == ""
    assert process.returncode in {0, 1}


def test_a_full_disk_under_standard_output_is_said(environment):
    with Path("/dev/full").open("w") as full:
        process = start(environment, "list", "--catalog", stdout=full)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 9
    assert err.startswith("error: the result could not be written to standard output\n")
    assert len(err.splitlines()) == 3
