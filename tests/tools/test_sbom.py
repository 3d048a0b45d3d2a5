"""The bill of materials: what the base program needs, all of it, and the same bytes each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def generate(*arguments, seed="0"):
    command = [sys.executable, str(ROOT / "tools/generate_sbom.py"), *arguments]
    env = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def bill():
    return json.loads(generate())


def test_it_is_the_same_each_time():
    assert generate(seed="1") == generate(seed="2")


def test_it_has_the_shape_that_readers_expect(bill):
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert bill["serialNumber"].startswith("urn:uuid:")
    assert bill["metadata"]["component"]["type"] == "application"
    for component in bill["components"]:
        assert component["type"] == "library"
        assert component["purl"] == f"pkg:pypi/{component['name']}@{component['version'].replace('+', '%2B')}"


def test_it_names_the_base_and_nothing_of_the_extras(bill):
    names = {component["name"] for component in bill["components"]}
    assert names >= {"httpx", "httpcore", "libtorrent", "platformdirs", "rich", "typer"}
    assert not names & {"torch", "numpy", "starlette", "pytest", "model-signing", "mkdocs"}
    assert {component["version"] for component in bill["components"] if component["name"] == "httpx"} == {
        version("httpx")
    }


def test_every_reference_is_a_component_and_everything_is_needed_by_something(bill):
    root = bill["metadata"]["component"]["bom-ref"]
    refs = [component["bom-ref"] for component in bill["components"]]
    assert len(set(refs)) == len(refs)
    assert {entry["ref"] for entry in bill["dependencies"]} == {root, *refs}
    assert {needed for entry in bill["dependencies"] for needed in entry["dependsOn"]} == set(refs)


def test_the_program_needs_what_it_says(bill):
    root = bill["metadata"]["component"]["bom-ref"]
    (told,) = (entry["dependsOn"] for entry in bill["dependencies"] if entry["ref"] == root)
    base = [Requirement(text) for text in requires("mistral-fetch")]
    base = {one.name for one in base if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert {ref.removeprefix("pkg:pypi/").partition("@")[0] for ref in told} == base


def test_an_extra_brings_its_own():
    names = {component["name"] for component in json.loads(generate("--extra", "serve"))["components"]}
    assert names >= {"starlette", "uvicorn", "llguidance"}
    assert "torch" not in names
