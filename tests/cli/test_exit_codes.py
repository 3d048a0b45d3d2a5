"""Every exit code, reached through the command line as a user would meet it; the table in the docs is this one."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.errors import ExitCode
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.retry import Backoff
from tests.cli.conftest import FILES, WEIGHTS, Transcript
from tests.keys import make_keys

ROOT = Path(__file__).parents[2]
PUBLISHER = PublisherSimulator(FILES, name="tiny")


class World:
    """What a scenario may use: the program, its environment, the current directory, and a manifest in it."""

    def __init__(self, program, environment, manifest):
        self.program, self.environment, self.manifest = program, environment, manifest
        self.folder = manifest.parent


@pytest.fixture
def world(program, environment, manifest):
    return World(program, environment, manifest)


def done(world):
    return world.program("pull", "tiny.meta4")


def bug(world):
    # Not in a module that others import from: one that is first imported now would keep this for ever.
    world.environment.setattr("mistral_fetch.store.inventory.take_inventory", lambda _layout: 1 / 0)
    return world.program("list")


def usage(world):
    return world.program("pull", "--frobnicate")


def not_found(world):
    return world.program("pull", "mistral-8b")


def not_authorised(world):
    with HubSimulator({"org/gated": HubRepository({"consolidated.safetensors": WEIGHTS}, is_gated=True)}) as hub:
        world.environment.setenv("HF_ENDPOINT", hub.base_url)
        return world.program("pull", "hf:org/gated")


def stalled(world):
    world.environment.setenv("MISTRAL_FETCH_READ_TIMEOUT", "0.2")
    delay_after = Backoff.delay_after
    shortly = lambda backoff, error: None if delay_after(backoff, error) is None else 0.01  # noqa: E731
    world.environment.setattr(Backoff, "delay_after", shortly)
    with PUBLISHER.serve() as mirror:
        mirror.script_range("tiny/weights.bin", 0, len(WEIGHTS), [Fault(hang_at=-1)], times=-1)
        return world.program("pull", mirror.url("tiny.meta4"), "--via", "http")


def no_source(world):
    return world.program("pull", "mistral-7b", "--offline")


def disk(world):
    world.environment.setenv("MISTRAL_FETCH_DISK_RESERVE", "1000000GB")
    return world.program("pull", "tiny.meta4")


def locked(world):
    assert world.program("pull", "tiny.meta4", "--quiet").code == 0
    (lock,) = (world.program.home / "locks").iterdir()
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return world.program("pull", "tiny.meta4", "--refresh", "--lock-timeout", "0")


def conflict(world):
    assert world.program("pull", "tiny.meta4", "--quiet").code == 0
    if world.program("pin", "tiny.meta4", "--quiet").code != 0:
        pytest.skip("this version has no pins, and nothing else excludes anything")
    return world.program("rm", "tiny.meta4")


def bad_manifest(world):
    world.manifest.write_text("<html>log in first</html>")
    return world.program("pull", "tiny.meta4")


def rolled_back(world):
    pytest.importorskip("model_signing")
    keys = make_keys(world.folder, "ours")
    info = replace(PUBLISHER.info, expires="2020-01-31T00:00:00Z")
    with PUBLISHER.serve(replace(PUBLISHER.manifest(), info=info), key=keys.private) as mirror:
        return world.program("pull", mirror.url("tiny.meta4"), "--trust-key", keys.public)


def integrity(world):
    pulled = world.program("pull", "tiny.meta4", "--quiet")
    blob = Path(pulled.out.strip(), "weights.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    return world.program("verify", "tiny.meta4")


def lying_mirror(world):
    with PUBLISHER.serve() as mirror:
        mirror.files["tiny/weights.bin"] = bytes(len(WEIGHTS))
        return world.program("pull", mirror.url("tiny.meta4"), "--via", "http")


def assurance(world):
    world.manifest.write_bytes(serialise_metalink(PUBLISHER.manifest(has_sha256=False, piece_length=None)))
    return world.program("pull", "tiny.meta4")


def runtime(world):
    world.environment.setenv("MISTRAL_FETCH_PYTHON", str(world.folder / "no-such-python"))
    return world.program("run", "tiny.meta4", "hello")


def interrupted(world):
    """In a process of its own; the signal is sent once the mirror has been asked, so that it meets a transfer."""
    world.environment.setenv("PYTHONPATH", str(ROOT))
    with PUBLISHER.serve() as mirror:
        mirror.script_range("tiny/weights.bin", 0, len(WEIGHTS), [Fault(hang_at=100_000)], times=-1)
        argv = [sys.executable, "-m", "mistral_fetch", "pull", mirror.url("tiny.meta4"), "--progress", "json"]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        ) as running:
            assert running.stderr
            for line in running.stderr:
                if "bytes-received" in line:
                    break
            running.send_signal(signal.SIGTERM)
            out, err = running.communicate(timeout=30)
    return Transcript(running.returncode, out, "\n".join(err.splitlines()[-3:]))


SCENARIOS = {
    done: ExitCode.OK,
    bug: ExitCode.BUG,
    usage: ExitCode.USAGE,
    not_found: ExitCode.NOT_FOUND,
    not_authorised: ExitCode.NOT_AUTHORISED,
    stalled: ExitCode.STALLED,
    no_source: ExitCode.NO_SOURCE,
    disk: ExitCode.DISK,
    locked: ExitCode.LOCKED,
    conflict: ExitCode.CONFLICT,
    bad_manifest: ExitCode.BAD_MANIFEST,
    rolled_back: ExitCode.ROLLED_BACK,
    integrity: ExitCode.INTEGRITY,
    lying_mirror: ExitCode.INTEGRITY,
    assurance: ExitCode.ASSURANCE,
    runtime: ExitCode.RUNTIME,
    interrupted: ExitCode.INTERRUPTED,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_program_ends_in_this_code(world, scenario):
    shown = scenario(world)
    code = SCENARIOS[scenario]
    assert shown.code == code, shown.err
    if code is ExitCode.OK:
        assert shown.out
        return
    assert "error: " in shown.err or scenario is integrity  # what verify finds is its result
    assert (shown.out == "") == (scenario is not integrity)


def test_every_code_has_a_scenario():
    assert set(SCENARIOS.values()) == set(ExitCode)


def test_the_page_lists_exactly_these_codes():
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = {int(row[1]): row for row in re.finditer(r"^\| (\d+) \| ([A-Z_]+) \| (.*?) \|", page, re.MULTILINE)}
    assert {code: row[2] for code, row in rows.items()} == {int(code): code.name for code in ExitCode}


def test_every_code_that_a_command_names_in_its_help_is_one(program):
    known = {str(int(code)) for code in ExitCode}
    page = (ROOT / "docs" / "cli.md").read_text()
    lines = re.findall(r"^Exit codes: (.*)$", page, re.MULTILINE)
    assert lines
    for line in lines:
        assert set(re.findall(r"(?:^|, )(\d+) ", line)) <= known, line
