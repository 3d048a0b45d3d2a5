"""From nothing to a verified model by every recipe; then again, for nothing; then damaged, for the damaged piece."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes import appliers

PIECE = 65_536
WEIGHTS = "consolidated.00.pth"
HOMES = {"docker": "/cache", "kubernetes": "/models", "workflow": "/workspace/.models"}
HAS_ANSIBLE = shutil.which("ansible-playbook", path=str(Path(sys.executable).parent)) is not None
RECIPES = [
    pytest.param(appliers.shell, id="shell"),
    pytest.param(appliers.docker, id="docker", marks=pytest.mark.slow),
    pytest.param(appliers.cloud_init, id="cloud-init"),
    pytest.param(
        appliers.ansible,
        id="ansible",
        marks=[
            pytest.mark.slow,
            pytest.mark.interop,
            pytest.mark.skipif(not HAS_ANSIBLE, reason="ansible-core is not installed"),
        ],
    ),
    pytest.param(appliers.systemd_sync, id="systemd"),
    pytest.param(appliers.kubernetes("serve.yaml"), id="kubernetes"),
    pytest.param(appliers.kubernetes("serve-vllm.yaml"), id="kubernetes-vllm"),
    pytest.param(appliers.kubernetes("fleet.yaml"), id="kubernetes-fleet"),
    pytest.param(appliers.workflow, id="workflow"),
]


def report_of(said):
    """Return what ``sync --json`` printed, where a recipe shows it."""
    found = [json.JSONDecoder().raw_decode(text[text.index("{") :])[0] for text in said if '"lock_changed"' in text]
    return found[0] if found else None


def flip_a_byte(home, offset):
    (snapshot,) = (path for path in (home / "snapshots").iterdir() if path.is_dir())
    blob = (snapshot / WEIGHTS).resolve()
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[offset] ^= 1
    blob.write_bytes(content)
    return blob


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("apply", RECIPES)
def test_a_recipe_brings_the_model_once_and_mends_what_is_damaged(apply, prepared, models, mirror, request):
    kind = request.node.callspec.id.partition("-")[0]
    home = prepared.path(HOMES.get(kind, "/var/lib/mistral-fetch"))

    def received_by(done):
        before = mirror.bytes_sent()
        return done(prepared, models), mirror.bytes_sent() - before

    said, cost = received_by(apply)
    assert cost >= sum(path.stat().st_size for path in (home / "blobs").rglob("*") if path.is_file()) > 3_900_000
    first = report_of(said)
    assert first is None or (first["changed"], first["totals"]["failed"]) == (True, 0)

    said, cost = received_by(apply)
    assert cost == 0
    again = report_of(said)
    assert again is None or (again["changed"], again["models"][0]["state"]) == (False, "ok")
    assert (first is None) == (again is None)
    if kind == "ansible":
        assert re.search(r"changed=0 .*failed=0 ", said[0]), said[0]

    blob = flip_a_byte(home, 5 * PIECE + 7)
    assert digest_of(blob) != blob.name
    said, cost = received_by(apply)
    assert cost == PIECE
    assert digest_of(blob) == blob.name
    if kind == "ansible":
        assert re.search(r"changed=1 ", said[0]), said[0]


def test_what_was_provisioned_answers(prepared, models):
    appliers.shell(prepared, models)
    prepared.environment["MISTRAL_FETCH_HOME"] = str(prepared.path("/var/lib/mistral-fetch"))
    question = "Q: What licence is Mistral 7B under?\nA:"
    options = ["--offline", "--quiet", "--temperature", "0", "--max-tokens", "12"]
    answer = prepared.run(["/opt/mistral-fetch/bin/mistral-fetch", "run", prepared.model, question, *options])
    assert "Mistral 7B is released under" in answer
