"""Two caches and a bundle between them, small enough that every byte of it can be wrong once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bundle import pack as pack_module
from mistral_fetch.bundle.pack import pack
from mistral_fetch.bundle.reader import BundleReader
from mistral_fetch.bundle.receive import import_bundle
from mistral_fetch.bundle.volumes import BundleInput, open_input
from mistral_fetch.bundle.write import write_bundle
from mistral_fetch.config import Settings
from mistral_fetch.events import Event, ignore_events
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, find_snapshot, list_refs, write_ref, write_snapshot
from mistral_fetch.transfer.channels import PullResult
from mistral_fetch.transfer.local import LocalModel

PIECE = 64 * 1024
FILES = {
    "params.json": b"{}\n",
    "weights/w.bin": random.Random(3).randbytes(3 * PIECE + 77),
    "again.json": b"{}\n",
    "empty.txt": b"",
    "Größe/" + "long" * 40 + ".txt": b"named at length\n",
}
REF = "tiny.meta4#0123456789abcdef"
INFO = ModelInfo(name="tiny", version="v1", licence="Apache-2.0")


@dataclass
class Bytes:
    """A sink in memory."""

    data: bytearray

    def write(self, data: bytes | memoryview) -> None:
        """Take all of ``data``."""
        self.data += data


def keep(home: Path, files: Mapping[str, bytes], ref: str, channel: str = "manifest") -> LocalModel:
    """Put a model into a cache as if it had been pulled."""
    layout = Layout(home)
    layout.prepare()
    for data in files.values():
        blob = layout.blob(hashlib.sha256(data).hexdigest())
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
    manifest = PublisherSimulator(files, info=INFO).manifest()
    papers = [{"path": e.path, "size": e.size, "sha256": e.sha256, "assurance": "sha256"} for e in manifest.files]
    told = {"schema": 1, "ref": ref, "channel": channel, "identity": "manifest-1", "name": "tiny", "files": papers}
    directory = write_snapshot(layout, manifest, told)
    record = RefRecord(ref, channel, manifest.content_digest().value, 1_700_000_000)
    write_ref(layout, record)
    return LocalModel(directory, record)


def bundle_of(*models: LocalModel, is_honest: bool = True) -> bytes:
    """Return the bundle of models; somebody else's program would not look at their names."""
    sink = Bytes(bytearray())
    with pytest.MonkeyPatch.context() as patch:
        if not is_honest:
            patch.setattr(pack_module, "check_name", lambda _record: None)
        write_bundle(pack(models, lambda: None), sink, ignore_events, lambda: None)
    return bytes(sink.data)


@dataclass
class Receiver:
    """A cache that bundles are imported into."""

    home: Path
    folder: Path

    def __call__(self, data: bytes, *, piped: bool = False, replace_names: bool = False, **more: Any) -> PullResult:
        """Import a bundle of one model."""
        (result,) = self.all(data, piped=piped, replace_names=replace_names, **more)
        return result

    def all(
        self,
        data: bytes,
        *,
        piped: bool = False,
        replace_names: bool = False,
        report: Callable[[Event], None] = ignore_events,
        **settings: Any,
    ) -> list[PullResult]:
        """Import a bundle, from a file or as if it came through a pipe."""
        (self.folder / "in.tar").write_bytes(data)
        with open_input([str(self.folder / "in.tar")]) as source:
            reader = BundleReader(Once(source) if piped else source)
            chosen = Settings(home=self.home, **{"disk_reserve": 0, "lock_timeout": 5.0, **settings})
            return import_bundle(reader, chosen, report, StopSignal(), replace_names=replace_names)

    def assert_nothing_published(self) -> None:
        """Check that no model is visible, and that whatever has a digest for a name is right."""
        layout = Layout(self.home)
        assert list_refs(layout) == []
        assert [path for path in self.home.glob("snapshots/*") if find_snapshot(layout, path.name)] == []
        for blob in self.home.glob("blobs/sha256/*/*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name

    def assert_exact(self, result: PullResult, files: Mapping[str, bytes] = FILES) -> None:
        """Check that all is there, and nothing is left over."""
        assert {path: (result.directory / path).read_bytes() for path in files} == files
        assert list(self.home.glob("partial/*")) == []
        assert list(self.home.glob("snapshots/.*")) == []


class Once(BundleInput):
    """A file that is read as a pipe is: forwards."""

    def __init__(self, source: BundleInput) -> None:
        super().__init__(source.label)
        self._source = source
        self._position = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        assert offset >= self._position, "a pipe was read backwards"
        self._position = offset + len(view)
        self._source.read_into(offset, view)

    def has_more(self, offset: int) -> bool:
        return self._source.has_more(offset)


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    """A complete model in a cache of its own."""
    return keep(tmp_path / "from", FILES, REF)


@pytest.fixture
def bundle(model: LocalModel) -> bytes:
    """The bundle of that model."""
    return bundle_of(model)


@pytest.fixture
def receive(tmp_path: Path) -> Receiver:
    """An empty cache."""
    return Receiver(tmp_path / "to", tmp_path)
