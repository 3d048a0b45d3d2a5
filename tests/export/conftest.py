"""Models of a cache in the layouts that matter, made of nothing but names: no program here opens a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.export.links import LinkMode, Placer
from mistral_fetch.export.model import Model, load_model
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, write_ref, write_snapshot
from mistral_fetch.transfer.local import LocalModel

HUB_FILES = {
    "config.json": b'{"model_type": "mistral"}\n',
    "model-00001-of-00002.safetensors": b"first" * 999,
    "model-00002-of-00002.safetensors": b"second" * 999,
    "model.safetensors.index.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer.json": b"{}",  # the index's bytes under a second name
    "README.md": b"# A model\n",
}
MISTRAL_FILES = {"consolidated.safetensors": b"all" * 999, "params.json": b"{}", "tokenizer.model.v3": b"pieces"}
PICKLED_FILES = {"consolidated.00.pth": b"pickled" * 99, "params.json": b"{}", "tokenizer.model": b"pieces"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = ModelInfo(
    name="org/tiny",
    version="v0.3",
    licence="Apache-2.0",
    credit="The makers",
    source_url="https://example.org/tiny",
    weight_format="hf-safetensors",
    chat_template="v3",
)

Keep = Callable[..., LocalModel]


@pytest.fixture
def layout(own_home: Path) -> Layout:
    made = Layout(own_home)
    made.prepare()
    return made


@pytest.fixture
def keep(layout: Layout) -> Keep:
    """Return a function that puts files into the cache as a model that was pulled."""

    def put(
        files: Mapping[str, bytes],
        ref: str = "hf:org/tiny@main",
        channel: str = "hub",
        info: ModelInfo = INFO,
        papers: Mapping[str, Any] | None = None,
    ) -> LocalModel:
        for data in files.values():
            blob = layout.blob(hashlib.sha256(data).hexdigest())
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists():
                blob.write_bytes(data)
                blob.chmod(0o444)
        manifest = PublisherSimulator(files, info=info).manifest()
        told = {"path": "", "assurance": "sha256", "sources": ["hub"]}
        listed = [
            {**told, "path": e.path, "size": e.size, "sha256": e.sha256, "promised": [f"sha256:{e.sha256}"]}
            for e in manifest.files
        ]
        identity = f"{channel}-{COMMIT}" if channel == "hub" else f"{channel}-1"
        fields = {"ref": ref, "channel": channel, "identity": identity, "name": info.name, "files": listed}
        directory = write_snapshot(layout, manifest, {**fields, **(papers or {})})
        record = RefRecord(ref, channel, manifest.content_digest().value, 1_700_000_000)
        write_ref(layout, record)
        return LocalModel(directory, record)

    return put


@pytest.fixture
def loaded(layout: Layout, keep: Keep) -> Callable[..., Model]:
    """Return a function that keeps files and loads them as a model to export."""

    def load(files: Mapping[str, bytes], *arguments: Any, **more: Any) -> Model:
        return load_model(layout, keep(files, *arguments, **more), prefers_converted=True)

    return load


def placer(mode: LinkMode = LinkMode.SHARE) -> Placer:
    """Return what places blobs in a way."""
    return Placer(mode, lambda: None)
