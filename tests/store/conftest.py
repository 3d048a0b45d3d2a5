"""A model laid out in a cache, for the tests of the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mistral_fetch.manifest import Manifest, ModelInfo
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, write_ref, write_snapshot

Keep = Callable[..., Path]


@pytest.fixture
def layout(own_home: Path) -> Layout:
    made = Layout(own_home)
    made.prepare()
    return made


@pytest.fixture
def keep(layout: Layout) -> Keep:
    """Return a function that puts files into the cache as a model, and gives its snapshot's directory."""

    def put(files: Mapping[str, bytes], ref: str = "model", *, info: ModelInfo | None = None) -> Path:
        manifest = PublisherSimulator(files, info=info).manifest()
        add_blobs(layout, files)
        directory = write_snapshot(layout, manifest, {"name": ref})
        write_ref(layout, RefRecord(ref, "manifest", manifest.content_digest().value, 1_700_000_000))
        return directory

    return put


def add_blobs(layout: Layout, files: Mapping[str, bytes]) -> list[Path]:
    """Put files into the store as if they had been committed."""
    blobs = [layout.blob(hashlib.sha256(data).hexdigest()) for data in files.values()]
    for blob, data in zip(blobs, files.values(), strict=True):
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(data)
    return blobs


def manifest_of(files: Mapping[str, bytes]) -> Manifest:
    """Return the truth about files."""
    return PublisherSimulator(files).manifest()
