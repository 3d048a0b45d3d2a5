"""A publisher in memory: edit its files, publish, serve, and pull as a user would. Public: for tests and trials.

publisher = PublisherSimulator({"weights.bin": content})
with publisher.serve() as mirror:
    ... pull mirror.url("model.meta4") ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from mistral_fetch.digest import Digest
from mistral_fetch.manifest import FileEntry, Manifest, MirrorUrl, ModelInfo, PieceHashes
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.publish.build import Publication, publish
from mistral_fetch.publish.sign import sign_publication
from mistral_fetch.signatures import SigningKey, sign_document
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.units import KIB

# Finer than what we publish, so that small files have several pieces.
SMALL_PIECE_LENGTH = 64 * KIB


class PublisherSimulator:
    """Publishes a few files, truthfully; lies are the mirrors' and the tests' business.

    Args:
        files: Content by path; may be changed between two publications.
        name: The model's name.
        info: What the manifest says about the model.
    """

    def __init__(self, files: Mapping[str, bytes], *, name: str = "model", info: ModelInfo | None = None) -> None:
        self.files = dict(files)
        self.name = name
        self.info = info or ModelInfo(name=name, version="1", licence="Apache-2.0")

    def manifest(
        self, bases: Sequence[str] = (), *, piece_length: int | None = SMALL_PIECE_LENGTH, has_sha256: bool = True
    ) -> Manifest:
        """Return the truth about the files.

        Args:
            bases: Addresses of mirrors, best first; by default the folder ``name`` beside the manifest.
            piece_length: The grid of the piece hashes; None for no piece hashes.
            has_sha256: Whether to give whole-file digests.
        """
        bases = bases or [quote(self.name)]
        entries = []
        for path, data in self.files.items():
            pieces = _piece_hashes(data, piece_length) if piece_length and data else None
            digests = (Digest("sha256", hashlib.sha256(data).hexdigest()),) if has_sha256 else ()
            mirrors = tuple(MirrorUrl(f"{base}/{quote(path)}", number) for number, base in enumerate(bases, start=1))
            entries.append(FileEntry(path, len(data), digests, pieces, mirrors))
        return Manifest(tuple(entries), self.info)

    def publish(self, directory: Path, mirrors: Sequence[str] = (), *, key: Path | None = None) -> Publication:
        """Write the files to ``directory/name`` and everything a downloader needs beside them, signed with a key."""
        for path, data in self.files.items():
            target = directory / self.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        made = publish(directory / self.name, directory, name=self.name, mirrors=mirrors, info=self.info)
        if key is not None:
            sign_publication(made.manifest, made.manifest_path, made.name, SigningKey(key))
        return made

    def sign(self, document: bytes, key: Path) -> bytes:
        """Return the signature that belongs beside a document; ``key`` is a PEM file with a private key."""
        return sign_document(document, f"{self.name}.meta4", SigningKey(key))

    def serve(self, manifest: Manifest | None = None, *, key: Path | None = None, **options: float) -> MirrorSimulator:
        """Return a mirror of the files with ``name.meta4`` beside them, to be used in a ``with`` statement.

        Args:
            manifest: What ``name.meta4`` says; the truth by default.
            key: A PEM file with the private key that signs the manifest; None for no signature.
            options: Passed on to :class:`MirrorSimulator`.
        """
        served = {f"{self.name}/{path}": data for path, data in self.files.items()}
        document = served[f"{self.name}.meta4"] = serialise_metalink(manifest or self.manifest())
        if key is not None:
            served[f"{self.name}.meta4.sig"] = self.sign(document, key)
        return MirrorSimulator(served, **options)  # type: ignore[arg-type]


def _piece_hashes(data: bytes, length: int) -> PieceHashes:
    return PieceHashes(
        length, tuple(hashlib.sha256(data[at : at + length]).hexdigest() for at in range(0, len(data), length))
    )
