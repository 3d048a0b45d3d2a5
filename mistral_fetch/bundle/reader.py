"""A bundle that is being read: its documents, and the proof that everything between contents is what must be there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mistral_fetch.bundle.contents import (
    CONTENTS_NAME,
    HEADER_NAME,
    MANIFEST_DOCUMENT,
    MAX_CONTENTS_BYTES,
    MAX_HEADER_BYTES,
    Content,
    ModelRecord,
    Plan,
    begin,
    check_manifest,
    malformed,
    parse_contents,
    parse_header,
    plan_bundle,
)
from mistral_fetch.bundle.tar import BLOCK, file_header, padding, read_size
from mistral_fetch.bundle.volumes import BundleInput
from mistral_fetch.errors import DigestMismatch, SizeMismatch, printable
from mistral_fetch.manifest import Manifest
from mistral_fetch.metalink import parse_metalink


@dataclass(frozen=True)
class BundledModel:
    """A model in a bundle. Its documents are what the table of contents says; nobody vouched for them yet."""

    number: int
    record: ModelRecord
    manifest: Manifest
    documents: Mapping[str, bytes]


class BundleReader:
    """Reads a bundle in one direction at least, and refuses the first byte that is not the one that must stand there.

    Where the input can be read at any place, all of that is done at once, before anybody asks for content.

    Args:
        source: The bundle's bytes.

    Raises:
        MalformedBundle: It is no bundle, or not written as one.
        MalformedManifest, UnsafePath: A manifest in it is hostile.
        DigestMismatch: A document was changed on the way.
        SizeMismatch: It is cut short.
    """

    def __init__(self, source: BundleInput) -> None:
        self.source = source
        self.label = source.label
        contents, position = self._read_contents()
        records = parse_contents(contents)
        self.models, position = self._read_models(records, position)
        self.plan: Plan = plan_bundle(contents, records, [model.manifest for model in self.models])
        assert position == (self.plan.contents[0].frame_offset if self.plan.contents else self.plan.tail_offset)
        self._next_frame = 0
        self._is_through = False
        if self.is_seekable:
            self._check_all()

    @property
    def is_seekable(self) -> bool:
        """Return whether content can be read at any place, and more than once."""
        return self.source.size is not None

    def go_to(self, content: Content) -> None:
        """Check every frame up to a content, so that what is read next is that file.

        Raises:
            MalformedBundle, SizeMismatch, IntegrityError: As above.
        """
        while self._next_frame < len(self.plan.contents):
            if self.plan.contents[self._next_frame].offset > content.offset:
                return
            self._check_next_frame()

    def finish(self) -> None:
        """Check all that is left, and that nothing follows.

        Raises:
            MalformedBundle, SizeMismatch, IntegrityError: As above.
        """
        if self._is_through:
            return
        while self._next_frame < len(self.plan.contents):
            self._check_next_frame()
        self._compare(self.plan.tail_offset, self.plan.tail, "the end of the bundle")
        if self.source.has_more(self.plan.size):
            raise malformed(f"expected its end after {self.plan.size} bytes, got more")
        self._is_through = True

    def _read_contents(self) -> tuple[bytes, int]:
        header, position = self._read_first(HEADER_NAME, 0, MAX_HEADER_BYTES)
        size, sha256 = parse_header(header)
        contents, end = self._read_first(CONTENTS_NAME, position, MAX_CONTENTS_BYTES)
        if len(contents) != size:
            raise malformed(f"expected {size} bytes of {CONTENTS_NAME}, got {len(contents)}")
        _check_digest(CONTENTS_NAME, contents, sha256)
        assert end == len(begin(contents))
        return contents, end

    def _read_first(self, name: str, offset: int, limit_bytes: int) -> tuple[bytes, int]:
        """Read one of the two members whose size nobody has told yet."""
        found = self.source.read(offset, BLOCK)
        try:
            size = read_size(found)
        except ValueError as error:
            raise malformed(f"expected {name} as a member of a tar archive, got something else") from error
        if size > limit_bytes or found != file_header(name, size):
            raise malformed(f"expected {name}, at most {limit_bytes} bytes, got {_describe(found)}")
        return self._read_content(name, offset + BLOCK, size)

    def _read_content(self, path: str, offset: int, size: int) -> tuple[bytes, int]:
        data = self.source.read(offset, size)
        zeros = padding(size)
        self._compare(offset + size, zeros, f"the zeros after {path}")
        return data, offset + size + len(zeros)

    def _read_models(self, records: Sequence[ModelRecord], position: int) -> tuple[tuple[BundledModel, ...], int]:
        models = []
        for number, record in enumerate(records):
            documents = {}
            for document in record.documents:
                path = f"{record.folder}/{document.path}"
                header = file_header(path, document.size)
                self._compare(position, header, path)
                data, position = self._read_content(path, position + len(header), document.size)
                _check_digest(path, data, document.sha256)
                documents[document.path] = data
            manifest = parse_metalink(documents[MANIFEST_DOCUMENT])
            check_manifest(record, manifest)
            models.append(BundledModel(number, record, manifest, documents))
        return tuple(models), position

    def _check_all(self) -> None:
        try:
            self.finish()
        except SizeMismatch as error:
            raise SizeMismatch(
                f"{self.label} is cut short, or a volume of it is missing",
                detail=f"expected {self.plan.size} bytes, got {self.source.size}",
                hint="copy it again, or name all volumes",
            ) from error

    def _check_next_frame(self) -> None:
        content = self.plan.contents[self._next_frame]
        path = f"{self.models[content.model].record.folder}/{content.entry.path}"
        self._compare(content.frame_offset, content.frame, path)
        self._next_frame += 1

    def _compare(self, offset: int, expected: bytes, what: str) -> None:
        found = self.source.read(offset, len(expected))
        if found != expected:
            at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            header = found[at - at % BLOCK :][:BLOCK]
            raise malformed(f"expected {what} at byte {offset + at}, got {_describe(header)}")


def _describe(block: bytes) -> str:
    """Return what a block looks like, for people; nothing in it is believed."""
    name, kind = block[:100].rstrip(b"\0"), block[156:157]
    if block[257:262] != b"ustar":
        return "something else"
    kinds = {b"0": "file", b"1": "hard link", b"2": "symbolic link", b"5": "directory", b"x": "pax header"}
    return f"a {kinds.get(kind, 'member of another kind')} called {printable(name.decode('utf-8', 'replace'))!r}"


def _check_digest(path: str, data: bytes, sha256: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise DigestMismatch(
            f"{path} in the bundle is not what its table of contents says",
            detail=f"expected sha256:{sha256}, got sha256:{actual}",
            hint="copy the bundle again; if that does not help, do not use it",
        )
