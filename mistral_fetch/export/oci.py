"""``export oci``: an OCI image layout whose layers are the cache's blobs, described as the CNCF ModelPack spec says.

Sources: OCI image-spec 1.1 (image layout, manifest, annotations); modelpack/model-spec v1 (media types, config,
``org.cncf.model.filepath``). Each file is a layer of its own, raw: neither archived nor compressed, so a layer's digest
is the file's sha256. The same model gives the same image: no dates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_fetch.errors import UsageError
from mistral_fetch.export.directory import Exported
from mistral_fetch.export.links import Placer, new_directory, write_text
from mistral_fetch.export.model import Model, ModelFile
from mistral_fetch.store.durable import make_directory, write_durably

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
MODEL_MANIFEST = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
CODE = "application/vnd.cncf.model.code.v1.raw"
FILEPATH = "org.cncf.model.filepath"
_LAYOUT = '{"imageLayoutVersion":"1.0.0"}'
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # OCI distribution-spec: what a tag may be
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
_CONFIGS = (".json", ".model", ".txt", ".jinja", ".v1", ".v2", ".v3")
_FORMATS = {"consolidated-pth": "pytorch", "consolidated-safetensors": "safetensors", "hf-safetensors": "safetensors"}


def export_oci(model: Model, target: Path, placer: Placer, tag: str) -> Exported:
    """Lay a model out as an OCI image layout.

    Raises:
        UsageError: The tag is none.
        Conflict, StoreError: The target is something else, or the disk refused.
    """
    if not _TAG.fullmatch(tag):
        raise UsageError(
            f"{tag[:80]!r} is no tag",
            detail="expected letters, digits, '.', '_' and '-', at most 128",
            hint="type for example --tag v0.3",
        )
    small, manifest = _describe(model, tag)
    expected = {f"blobs/sha256/{file.sha256}": file.size for file in model.files}
    expected |= {path: len(data) for path, data in small.items()}
    with new_directory(target, expected) as draft:
        if draft is not None:
            _write(draft, model, small, placer)
    step = f"skopeo copy oci:{target}:{tag} docker://REGISTRY/{model.name.lower()}:{tag}"
    return Exported(target, draft is None, f"{placer.told()}; manifest {manifest}", step)


def _write(draft: Path, model: Model, small: Mapping[str, bytes], placer: Placer) -> None:
    blobs = draft / "blobs" / "sha256"
    make_directory(blobs)
    for sha256, file in {file.sha256: file for file in model.files}.items():
        placer.place(file.location, blobs / sha256)
    for path, data in small.items():
        if path == "oci-layout":
            write_text(draft / path, _LAYOUT)
        elif not (draft / path).exists():  # a model may bring the very text that is written for it
            write_durably(draft / path, data)


def _describe(model: Model, tag: str) -> tuple[dict[str, bytes], str]:
    """Return all small files of the layout by their path, and the manifest's digest."""
    layers = [_layer(file) for file in model.files]
    small: dict[str, bytes] = {}
    if model.licence is not None:
        text = model.licence.read_bytes()
        layers.append({**_descriptor(DOC, text), "annotations": _names("LICENSE")})
        small[_blob_path(text)] = text
    config = _json(_config(model, [str(layer["digest"]) for layer in layers]))
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": MODEL_MANIFEST,
            "config": _descriptor(MODEL_CONFIG, config),
            "layers": layers,
            "annotations": _annotations(model),
        }
    )
    named = {"org.opencontainers.image.ref.name": tag}
    entry = {**_descriptor(IMAGE_MANIFEST, manifest), "artifactType": MODEL_MANIFEST, "annotations": named}
    index = _json({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [entry]})
    small |= {_blob_path(config): config, _blob_path(manifest): manifest}
    small |= {"index.json": index, "oci-layout": _LAYOUT.encode()}
    return small, f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def _layer(file: ModelFile) -> dict[str, Any]:
    digest = f"sha256:{file.sha256}"
    return {
        "mediaType": media_type(file.path),
        "digest": digest,
        "size": file.size,
        "annotations": _names(file.path),
    }


def media_type(path: str) -> str:
    """Return what the model-spec calls a file: weights, what belongs to them, documentation or code."""
    name = path.rpartition("/")[2].lower()
    if name.startswith(("license", "licence", "readme", "notice")) or name.endswith((".md", ".pdf")):
        return DOC
    if name.endswith(_WEIGHTS):
        return WEIGHT
    return CODE if name.endswith((".py", ".sh")) else WEIGHT_CONFIG if name.endswith(_CONFIGS) else DOC


def _names(path: str) -> dict[str, str]:
    # The second one is what ORAS and others name a file by when they unpack.
    return {FILEPATH: path, "org.opencontainers.image.title": path}


def _config(model: Model, diff_ids: list[str]) -> dict[str, Any]:
    info = model.info
    descriptor = {
        "name": info.name,
        "version": info.version,
        "family": "mistral" if "mistral" in info.name.lower() else "",
        "sourceURL": info.source_url,
    }
    licences = {"licenses": [info.licence]} if info.licence else {}
    return {
        "descriptor": {**{key: value for key, value in descriptor.items() if value}, **licences},
        "modelfs": {"type": "layers", "diffIds": diff_ids},
        "config": {"architecture": "transformer", **_format(info.weight_format)},
    }


def _format(weight_format: str) -> dict[str, str]:
    return {"format": _FORMATS[weight_format]} if weight_format in _FORMATS else {}


def _annotations(model: Model) -> dict[str, str]:
    info = model.info
    named = {
        "title": info.name,
        "version": info.version,
        "licenses": info.licence,
        "source": info.source_url,
        "authors": info.credit,
    }
    return {f"org.opencontainers.image.{key}": value for key, value in named.items() if value}


def _descriptor(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _blob_path(data: bytes) -> str:
    return f"blobs/sha256/{hashlib.sha256(data).hexdigest()}"


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
