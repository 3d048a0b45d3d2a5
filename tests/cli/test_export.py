"""Exports at the command line: what is printed, and how they end."""

from __future__ import annotations

import json

import pytest

from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.publisher import PublisherSimulator

HUB_FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 999, "tokenizer.json": b"{} "}


@pytest.fixture
def hub_model(program, tmp_path):
    """A model in Hugging Face's layout, pulled from a manifest."""
    publisher = PublisherSimulator(HUB_FILES, name="hub")
    for path, data in HUB_FILES.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / path).write_bytes(data)
    (tmp_path / "hub.meta4").write_bytes(serialise_metalink(publisher.manifest()))
    assert program("pull", "hub.meta4", "--quiet").code == 0


def test_hugging_face_s_cache(program, hub_model, tmp_path):
    done = program("export", "hf", "hub.meta4", "--to", "home", "--repo", "me/mine")
    assert done.code == 0, done.err
    place = tmp_path / "home" / "hub" / "models--me--mine"
    commit = (place / "refs" / "main").read_text()
    assert done.out == f"{place / 'snapshots' / commit}\n"
    assert "HF_HUB_OFFLINE=1" in done.err
    again = program("export", "hf", "hub.meta4", "--to", "home", "--repo", "me/mine", "--json", "--quiet")
    assert (again.code, again.json["was_complete"]) == (0, True)
    assert program("export", "hf", "hub.meta4", "--to", "home", "--quiet").code == 2
    default = program("export", "hf", "hub.meta4", "--repo", "me/mine", "--quiet")
    assert default.out.startswith(str(tmp_path / "huggingface" / "hub"))


@pytest.mark.parametrize("kind", ["gguf-source", "ollama", "oci"])
def test_directories(program, hub_model, tmp_path, kind):
    done = program("export", kind, "hub.meta4", "--to", "out", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.json["directory"] == str(tmp_path / "out")
    assert done.json["was_complete"] is False
    assert program("export", kind, "hub.meta4", "--to", "out", "--json", "--quiet").json["was_complete"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    refused = program("export", kind, "hub.meta4", "--to", "taken", "--quiet")
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (13, "", 3)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]


def test_what_cannot_be_exported_says_why(program, pulled, tmp_path):
    for kind in ("gguf-source", "ollama"):
        refused = program("export", kind, "tiny.meta4", "--to", "out", "--quiet")
        assert (refused.code, len(refused.err.splitlines())) == (2, 3)
    assert program("export", "oci", "tiny.meta4", "--to", "image", "--quiet").code == 0
    assert json.loads((tmp_path / "image" / "index.json").read_text())["schemaVersion"] == 2
    assert program("export", "oci", "tiny.meta4", "--to", "image", "--symlink", "--copy", "--quiet").code == 2
    assert program("export", "oci", "mistral-7b", "--to", "image", "--quiet").code == 3
    assert not (tmp_path / "out").exists()
