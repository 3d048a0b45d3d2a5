"""Recipes as their readers parse them: systemd, Kubernetes, cloud-init, GitHub Actions and Docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.recipes.appliers import SOURCES, docker_stages, pod_of
from tests.recipes.sandbox import RECIPES

UNITS = sorted((RECIPES / "systemd").glob("*.service"))
MANIFESTS = sorted((RECIPES / "kubernetes").glob("*.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "kubernetes.schema.json").read_text())
MOST_EXPOSURE = 20  # tenths, of 100
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def named(path):
    return path.name


def analyze(*arguments):
    command = [str(ANALYZE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@needs_systemd
@pytest.mark.interop
def test_systemd_knows_every_line_of_the_units(tmp_path):
    copies = []
    for path in UNITS:  # the program is not where the units expect it
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text().replace("/opt/mistral-fetch/bin/mistral-fetch", "/bin/true"))
    done = analyze("verify", "--recursive-errors=no", *copies)
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
@pytest.mark.interop
@pytest.mark.parametrize("path", UNITS, ids=named)
def test_units_expose_little(path):
    done = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}", path)
    if "--offline" in done.stderr:
        pytest.skip("this systemd-analyze is older than 250")
    assert done.returncode == 0, done.stdout[-400:]


@pytest.mark.parametrize("path", UNITS, ids=named)
def test_units_share_one_user_and_one_cache(path):
    text = path.read_text()
    for line in ("DynamicUser=yes", "User=mistral-fetch", "StateDirectory=mistral-fetch", "ProtectSystem=strict"):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_manifests_are_what_kubernetes_reads(path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for document in yaml.safe_load_all(path.read_text()):
        assert [error.message for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_what_is_mounted_is_there_and_what_is_probed_is_open(path):
    pod = pod_of(path)
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {m["name"] for one in [*pod["initContainers"], *pod["containers"]] for m in one["volumeMounts"]}
    assert mounts == volumes
    for container in pod["containers"]:
        ports = {port["containerPort"] for port in container["ports"]}
        assert container["readinessProbe"]["httpGet"]["port"] in ports


@pytest.mark.parametrize("path", MANIFESTS, ids=named)
def test_workloads_select_their_own_pods(path):
    for document in yaml.safe_load_all(path.read_text()):
        spec = document["spec"]
        if "template" in spec:
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_cloud_init_is_told_what_it_understands():
    text = (RECIPES / "cloud-init/user-data.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    told = yaml.safe_load(text)
    assert set(told) == {"packages", "write_files", "runcmd"}
    assert all(set(file) <= {"path", "content", "encoding", "permissions"} for file in told["write_files"])
    assert all(isinstance(word, str) for command in told["runcmd"] for word in command)


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("cloud-init") is None, reason="cloud-init is not installed")
def test_cloud_init_itself_accepts_it():
    command = ["cloud-init", "schema", "--config-file", str(RECIPES / "cloud-init/user-data.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_workflow_has_the_parts_of_one():
    text = (RECIPES / "github-actions/models.yml").read_text()
    told = yaml.load(text.replace("\non:", "\n'on':"), yaml.SafeLoader)  # YAML 1.1 takes "on" for true
    assert set(told) == {"name", "on", "permissions", "jobs"}
    for step in told["jobs"]["test"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[a-z]+@v\d+", step.get("uses", "actions/x@v1"))


def test_the_last_image_has_the_weights_and_the_tool_has_none():
    steps = docker_stages((RECIPES / "docker/Dockerfile").read_text())
    stages = {stage for stage, _, _ in steps}
    assert stages == {"wheel", "fetch", "weights", "tool", "final"}
    assert ("final", "COPY", "--from=weights /models /models") in steps
    assert not any(stage == "tool" and "weights" in rest for stage, _, rest in steps)
    sources = re.findall(r"--from=(\w+)", " ".join(rest for _, _, rest in steps))
    assert set(sources) <= stages | {"models"}


def test_the_builder_gets_what_the_test_copies_and_no_more():
    kept = [
        line[1:] for line in (RECIPES / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    assert sorted(kept) == sorted(SOURCES)
