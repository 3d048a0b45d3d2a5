"""An OCI image layout of a model: digests, sizes, the spec's own words, and what skopeo makes of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.errors import Conflict, UsageError
from mistral_fetch.export.model import Model
from mistral_fetch.export.oci import export_oci, media_type
from tests.export.conftest import HUB_FILES, MISTRAL_FILES, PICKLED_FILES, placer

Loaded = Callable[..., Model]


def read(layout: Path, descriptor: dict[str, Any]) -> bytes:
    """Return what a descriptor names, after checking its digest and size."""
    algorithm, _, value = descriptor["digest"].partition(":")
    data = (layout / "blobs" / algorithm / value).read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (value, descriptor["size"])
    return data


def validate(layout: Path) -> dict[str, Any]:
    """Check a layout from its index down to every layer, and that nothing else lies in it; return the manifest."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    (entry,) = index["manifests"]
    manifest: dict[str, Any] = json.loads(read(layout, entry))
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(read(layout, manifest["config"]))
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}
    for layer in manifest["layers"]:
        read(layout, layer)
    named = {d["digest"].partition(":")[2] for d in (entry, manifest["config"], *manifest["layers"])}
    assert {path.name for path in (layout / "blobs" / "sha256").iterdir()} == named
    assert {path.name for path in layout.iterdir()} == {"oci-layout", "index.json", "blobs"}
    return manifest


@pytest.mark.parametrize("files", [HUB_FILES, MISTRAL_FILES, PICKLED_FILES], ids=["hub", "mistral", "pickle"])
def test_every_digest_and_size_is_right(files: dict[str, bytes], loaded: Loaded, tmp_path: Path) -> None:
    done = export_oci(loaded(files), tmp_path / "image", placer(), "v0.3")
    manifest = validate(done.directory)
    named = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
    assert set(named) == {*files, "LICENSE"}
    for path, data in files.items():
        assert named[path]["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert manifest["annotations"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    config = json.loads(read(done.directory, manifest["config"]))
    assert config["descriptor"]["licenses"] == ["Apache-2.0"]
    assert config["config"]["format"] == "safetensors"


def test_layers_are_the_cache_s_own_bytes(loaded: Loaded, tmp_path: Path) -> None:
    ways = placer()
    export_oci(loaded(HUB_FILES), tmp_path / "image", ways, "v0.3")
    assert set(ways.ways) <= {"reflink", "hard link"}
    assert sum(ways.ways.values()) == len(set(HUB_FILES.values()))


def test_the_same_model_gives_the_same_image(loaded: Loaded, tmp_path: Path) -> None:
    model = loaded(HUB_FILES)
    first, second = (export_oci(model, tmp_path / name, placer(), "a") for name in ("one", "two"))
    assert (first.directory / "index.json").read_bytes() == (second.directory / "index.json").read_bytes()
    assert export_oci(model, tmp_path / "one", placer(), "a").was_complete
    with pytest.raises(Conflict):
        export_oci(model, tmp_path / "one", placer(), "another-tag")


@pytest.mark.parametrize("tag", ["", "a b", "../x", "-x", "x" * 129, "ü"])
def test_tags_are_checked(tag: str, loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export_oci(loaded(MISTRAL_FILES), tmp_path / "image", placer(), tag)
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize(
    "path, kind",
    [
        ("model-00001-of-00002.safetensors", "weight"),
        ("consolidated.00.pth", "weight"),
        ("config.json", "weight.config"),
        ("tokenizer.model.v3", "weight.config"),
        ("sub/README.md", "doc"),
        ("LICENSE", "doc"),
        ("modeling.py", "code"),
        ("image.png", "doc"),
    ],
)
def test_kinds_of_files(path: str, kind: str) -> None:
    assert media_type(path) == f"application/vnd.cncf.model.{kind}.v1.raw"


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize("symlinks", [False, True], ids=["shared", "symlinks"])
def test_skopeo_reads_and_copies_it(symlinks: bool, loaded: Loaded, tmp_path: Path) -> None:
    from mistral_fetch.export.links import LinkMode

    ways = placer(LinkMode.SYMBOLIC) if symlinks else placer()
    done = export_oci(loaded(HUB_FILES), tmp_path / "image", ways, "v0.3")
    options = {"check": True, "capture_output": True, "timeout": 60}
    shown = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{done.directory}:v0.3"], **options)  # type: ignore[call-overload]
    assert json.loads(shown.stdout) == validate(done.directory)
    copy = ["skopeo", "--insecure-policy", "copy", f"oci:{done.directory}:v0.3", f"oci:{tmp_path / 'copy'}:v0.3"]
    subprocess.run(copy, **options)  # type: ignore[call-overload]
    copied = json.loads((tmp_path / "copy" / "index.json").read_text())["manifests"][0]
    assert json.loads(read(tmp_path / "copy", copied)) == validate(done.directory)
