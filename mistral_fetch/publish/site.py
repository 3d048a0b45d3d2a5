"""What a mirror serves: one address for each file of each publication, and nothing else. Values, no network.

The layout is the one that ``publish`` writes, so that a mirror, a web server on ``OUT`` and this program look alike::

    /NAME.meta4  /NAME.torrent  /NAME.v1.torrent  /SHA256SUMS  /NAME/<files>  (/NAME.meta4.sig  /NAME.sig)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_fetch.publish.hashing import SourceFile
from mistral_fetch.publish.readback import CHECKSUMS_NAME, PublishedFiles, ReadBack
from mistral_fetch.publish.watch import Stamp, stamp_of

_METALINK_TYPE = "application/metalink4+xml"
_TORRENT_TYPE = "application/x-bittorrent"
_BINARY_TYPE = "application/octet-stream"
_TEXT_TYPE = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Resource:
    """What lies at one address: a file that must stay as it is, or a few bytes made by us."""

    etag: str
    kind: str
    size: int
    location: Path | None = None
    stamp: Stamp | None = None
    data: bytes = b""


@dataclass(frozen=True)
class ServedModel:
    """A publication and the files it is about."""

    name: str
    out: Path
    read: ReadBack
    files: Sequence[SourceFile]
    own_name: str
    """The name that the publication's files have; another model may have it too."""


def build_site(models: Sequence[ServedModel], *, has_index: bool) -> dict[str, Resource]:
    """Return every address and what lies there.

    Args:
        models: What to serve; their names differ.
        has_index: Serve the list of them at the root, and checksums with the models' names in front.
    """
    site: dict[str, Resource] = {}
    for model in models:
        for file in model.files:
            sha256 = model.read.manifest.entry(file.path).sha256 or ""
            site[f"/{model.name}/{file.path}"] = Resource(
                sha256, _BINARY_TYPE, file.size, file.location, stamp_of(file.location)
            )
        site |= _papers(model)
    sums = [
        f"{entry.sha256}  {f'{model.name}/' if has_index else ''}{entry.path}\n"
        for model in models
        for entry in sorted(model.read.manifest.files, key=lambda entry: entry.path)
    ]
    site[f"/{CHECKSUMS_NAME}"] = _made("".join(sums).encode(), _TEXT_TYPE)
    if has_index:
        site["/"] = _made(_index(models), "application/json")
    return site


def _papers(model: ServedModel) -> dict[str, Resource]:
    places = PublishedFiles.of(model.out, model.own_name)
    manifest = places.manifest.read_bytes()
    signatures: dict[str, bytes] = {}
    if model.name != model.own_name:
        manifest = _renamed(manifest, model)
    else:  # a signature is over the manifest as it was written
        signatures = {f"/{place.name}": place.read_bytes() for place in _signatures(model) if place.is_file()}
    return {
        **{path: _made(data, "application/json") for path, data in signatures.items()},
        f"/{model.name}.meta4": _made(manifest, _METALINK_TYPE),
        f"/{model.name}.torrent": _made(places.torrent.read_bytes(), _TORRENT_TYPE),
        f"/{model.name}.v1.torrent": _made(places.plain_torrent.read_bytes(), _TORRENT_TYPE),
    }


def _signatures(model: ServedModel) -> tuple[Path, Path]:
    return model.out / f"{model.own_name}.meta4.sig", model.out / f"{model.own_name}.sig"


def _renamed(manifest: bytes, model: ServedModel) -> bytes:
    """Return a manifest whose relative addresses are those of another name."""
    from urllib.parse import quote

    old, new = quote(model.own_name).encode(), quote(model.name).encode()
    for ending in (b"/", b".torrent<", b".v1.torrent<"):
        manifest = manifest.replace(b">" + old + ending, b">" + new + ending)
    return manifest


def _index(models: Sequence[ServedModel]) -> bytes:
    listed: list[dict[str, Any]] = []
    for model in models:
        info = model.read.manifest.info
        listed.append(
            {
                "name": model.name,
                "manifest": f"{model.name}.meta4",
                "torrent": f"{model.name}.torrent",
                "plain_torrent": f"{model.name}.v1.torrent",
                "size": model.read.manifest.size,
                "files": len(model.read.manifest.files),
                "content_digest": str(model.read.manifest.content_digest()),
                "version": info.version,
                "licence": info.licence,
                "credit": info.credit,
                "source_url": info.source_url,
            }
        )
    return (json.dumps({"models": listed}, indent=1, ensure_ascii=False) + "\n").encode()


def _made(data: bytes, kind: str) -> Resource:
    return Resource(hashlib.sha256(data).hexdigest(), kind, len(data), data=data)
