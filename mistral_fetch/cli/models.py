"""From what a publisher typed to the files it means, and to the torrents and manifest that go with them."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_fetch.errors import OfflineRefused, PublishError
from mistral_fetch.ref import DirectoryRef, parse_ref

if TYPE_CHECKING:
    from mistral_fetch.cli.options import FrontEnd
    from mistral_fetch.events import Report
    from mistral_fetch.publish.hashing import SourceFile
    from mistral_fetch.publish.model import ModelFiles
    from mistral_fetch.publish.readback import ReadBack
    from mistral_fetch.store.layout import Layout


@dataclass(frozen=True)
class Prepared:
    """A model with its publication, wherever that lies."""

    model: ModelFiles
    files: tuple[SourceFile, ...]
    out: Path
    read: ReadBack


def find_model(front: FrontEnd, text: str) -> ModelFiles:
    """Return the files that a person means: a directory of that name comes first, then the cache's complete models.

    Raises:
        NotInCache, UnknownModel, NotFoundError: There is no such directory, and the cache has no such model.
        PublishError: A file of the cache is damaged.
    """
    from mistral_fetch.cli.paths import local_directory
    from mistral_fetch.publish.model import model_of_directory
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.local import require_local

    layout = Layout(front.settings.home)
    if _is_directory(text) or isinstance(parse_ref(text), DirectoryRef):
        directory = local_directory(text)
        return _snapshot_at(directory) or model_of_directory(directory)
    directory = require_local(layout, text, front.settings).directory
    return _model_in(Layout(directory.parent.parent), directory)  # a shared cache, perhaps


def all_models(front: FrontEnd) -> list[ModelFiles]:
    """Return every complete model of the cache, each content once."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import find_snapshot, list_refs

    layout = Layout(front.settings.home)
    layout.check_version()
    digests = dict.fromkeys(record.content_digest for record in list_refs(layout))
    found = (find_snapshot(layout, digest) for digest in digests)
    return [_model_in(layout, directory) for directory in found if directory is not None]


def prepare(
    front: FrontEnd, model: ModelFiles, out: Path | None, report: Report, trackers: tuple[str, ...] = ()
) -> Prepared:
    """Return a model with its torrents, manifest and checksums, made now unless that was done before.

    Args:
        front: Whose cache is written to where ``out`` is None.
        model: The files.
        out: Where the publication lies, or is to be written.
        report: Told while files are hashed.
        trackers: Announce addresses for what is written to ``out``.

    Raises:
        PublishError: The model cannot be published.
        StoreError: The outputs could not be written.
    """
    from mistral_fetch.publish.build import plan_publication, publish
    from mistral_fetch.publish.readback import read_back
    from mistral_fetch.store.layout import Layout

    place = out or _place_in(Layout(front.settings.home), model)
    files = model.files or tuple(plan_publication(model.directory))
    known = _published_before(model, place, trackers if out else ())
    if known is not None:
        return Prepared(model, files, place, known)
    given = trackers if out else ()
    if (place / f"{model.name}.meta4.sig").is_file():
        return Prepared(model, files, place, _signed_before(model, files, place, given, report))
    publish(model.directory, place, name=model.name, trackers=given, info=model.info, files=files, report=report)
    return Prepared(model, files, place, read_back(place, model.name))


def refuse_offline(front: FrontEnd, doing: str) -> None:
    """Refuse to serve where no socket may be opened.

    Raises:
        OfflineRefused: ``--offline`` is set.
    """
    if front.settings.offline:
        raise OfflineRefused(
            f"{doing} needs a network",
            detail="expected to open a socket, but --offline forbids it",
            hint="run it again without --offline (or without MISTRAL_FETCH_OFFLINE)",
        )


def _is_directory(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def _snapshot_at(directory: Path) -> ModelFiles | None:
    """Return the cache's model that a directory is, if it is one."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import find_snapshot

    place = directory.resolve()
    layout = Layout(place.parent.parent)
    if place.parent != layout.snapshots or find_snapshot(layout, place.name) is None:
        return None
    return _model_in(layout, place)


def _model_in(layout: Layout, directory: Path) -> ModelFiles:
    from mistral_fetch.publish.model import model_of_snapshot
    from mistral_fetch.store.snapshots import load_manifest, load_provenance

    return model_of_snapshot(directory, layout.blobs, load_manifest(directory), load_provenance(directory))


def _place_in(layout: Layout, model: ModelFiles) -> Path:
    layout.prepare()
    key = model.content_digest or f"of-{hashlib.sha256(str(model.directory.resolve()).encode()).hexdigest()[:32]}"
    return layout.publication(key)


def _published_before(model: ModelFiles, place: Path, trackers: tuple[str, ...]) -> ReadBack | None:
    """Return the publication that was made of the same bytes; who reads a directory cannot know that they are."""
    from mistral_fetch.publish.readback import read_back

    if not model.content_digest:
        return None
    try:
        found = read_back(place, model.name)
    except PublishError:
        return None
    manifest = found.manifest
    is_same = manifest.content_digest().value == model.content_digest and manifest.info == model.info
    return found if is_same and found.hybrid.trackers == trackers else None


def _signed_before(
    model: ModelFiles, files: tuple[SourceFile, ...], place: Path, trackers: tuple[str, ...], report: Report
) -> ReadBack:
    """Return a signed publication as it is, after hashing the files: it must never be written over.

    Raises:
        PublishError: It is of other files, or names other trackers.
    """
    from mistral_fetch.publish.build import publish
    from mistral_fetch.publish.readback import read_back

    found = read_back(place, model.name)
    with tempfile.TemporaryDirectory() as scratch:
        made = publish(model.directory, Path(scratch), name=model.name, files=files, report=report)
    is_same = found.manifest.content_digest() == made.manifest.content_digest()
    if is_same and (not trackers or found.hybrid.trackers == trackers):
        return found
    raise PublishError(
        f"what is signed in {place} is not this model",
        detail="expected the same files (and trackers) as were signed, got others",
        hint="publish it again with --sign, or give another directory with --out",
    )
