"""Models laid out as directories of links to blobs, and the refs that name them.

A snapshot is built in a hidden directory beside its final place and renamed into it, ``.complete`` last, so
a reader sees all of it or nothing. Its name is the manifest's content digest: two channels that bring the
same files end in the same snapshot.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch import system
from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import IntegrityError, ManifestError, StoreError
from mistral_fetch.manifest import Manifest, PieceHashes
from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink, serialise_metalink
from mistral_fetch.store.blobs import find_blob
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.durable import disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.store.layout import Layout, unquote_name

if TYPE_CHECKING:
    from mistral_fetch.trust import Signed

MANIFEST_NAME = "manifest.meta4"
PROVENANCE_NAME = "PROVENANCE.json"
COMPLETE_NAME = ".complete"
SIGNED_NAME = ".signed"
FROM_CACHE = "this cache"
_LICENCE_TEXTS = {"Apache-2.0": "Apache-2.0.txt"}


@dataclass(frozen=True)
class RefRecord:
    """One name of a snapshot: the ref's key, the channel it came by, when it was pulled (seconds since 1970)."""

    key: str
    channel: str
    content_digest: str
    pulled_at: int


def find_snapshot(layout: Layout, content_digest: str) -> Path | None:
    """Return the snapshot's directory if it is complete and every file is there with its size."""
    directory = layout.snapshot(content_digest)
    return directory if is_complete(directory) else None


def is_complete(directory: Path) -> bool:
    """Return whether a directory has a valid ``.complete``, and every file with the size in it."""
    try:
        sizes = _read_complete(directory)["sizes"]
        return all((directory / path).stat().st_size == size for path, size in sizes.items())
    except (OSError, StoreError, AttributeError):
        return False


def load_manifest(directory: Path) -> Manifest:
    """Return the manifest a complete snapshot was made from.

    Raises:
        StoreError: The snapshot is not complete or cannot be read.
        IntegrityError: Its manifest is not the one ``.complete`` speaks of.
    """
    complete = _read_complete(directory)
    try:
        data = (directory / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise _broken(directory, f"expected {MANIFEST_NAME}, got: {error.strerror}") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual not in {complete.get("manifest_sha256"), complete.get("earlier_manifest_sha256")}:
        raise IntegrityError(
            f"the manifest of the snapshot at {directory} was changed",
            detail=f"expected sha256:{complete.get('manifest_sha256')}, got sha256:{actual}",
            hint="mistral-fetch repair REF writes it anew",
        )
    return parse_metalink(data)


def load_provenance(directory: Path) -> dict[str, Any]:
    """Return what ``PROVENANCE.json`` records about a snapshot.

    Raises:
        StoreError: It cannot be read.
    """
    try:
        record = json.loads((directory / PROVENANCE_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(directory, f"expected {PROVENANCE_NAME}, got: {error}") from error
    return record if isinstance(record, dict) else {}


def load_signed(directory: Path, provenance: Mapping[str, Any]) -> Signed | None:
    """Return the signed document that a snapshot's papers name, not checked again; None where there is none.

    Raises:
        StoreError: They name one that is not there, or is another.
    """
    record = provenance.get("signature")
    if record is None:
        return None
    from mistral_fetch.signatures import MAX_BUNDLE_BYTES
    from mistral_fetch.trust import Signed

    try:
        kind, key, document = (str(record[name]) for name in ("kind", "key", "document"))
        path = directory / SIGNED_NAME / Digest.parse(document).value
        signed = Signed(
            kind,
            _read_at_most(path, MAX_METALINK_BYTES),
            _read_at_most(path.with_name(f"{path.name}.sig"), MAX_BUNDLE_BYTES),
            Digest.parse(key).value,
        )
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise _broken(directory, f"expected the signed document that {PROVENANCE_NAME} names, got: {error}") from error
    if f"sha256:{signed.sha256}" != document:
        raise _broken(directory, f"expected the signed document {document}, got sha256:{signed.sha256}")
    return signed


def _read_at_most(path: Path, limit_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit_bytes + 1)


def write_snapshot(
    layout: Layout, manifest: Manifest, provenance: Mapping[str, Any], signed: Signed | None = None
) -> Path:
    """Lay a fully pinned manifest out as a directory, all of whose blobs are in the store.

    Args:
        layout: The cache.
        manifest: What to lay out.
        provenance: Where it came from, and what vouches for it.
        signed: The signed document that the provenance speaks of.

    Raises:
        StoreError: A blob is missing, or the disk refused.
    """
    content_digest = manifest.content_digest().value
    final = layout.snapshot(content_digest)
    existing = find_snapshot(layout, content_digest)
    if existing is not None:
        _renew_manifest(existing, manifest)
        _renew_provenance(existing, provenance, signed)
        return existing
    draft = layout.snapshots / f".{content_digest[:16]}-{secrets.token_hex(6)}.tmp"
    with disk_errors("laying out the model", draft):
        make_directory(layout.snapshots)
        try:
            _fill(layout, manifest, provenance, signed, draft, final)
            move_into_place(draft, final)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError) and find_snapshot(layout, content_digest):
                return final  # another process was faster
            raise
        fsync_directory(layout.snapshots)
        reached("snapshot-named")
        for abandoned in find_drafts(layout, content_digest):
            shutil.rmtree(abandoned, ignore_errors=True)
    return final


def learn_pieces(directory: Path, manifest: Manifest, pieces: Mapping[str, PieceHashes]) -> None:
    """Add piece hashes, computed from files that were just proved right, to a complete snapshot's manifest.

    ``.complete`` speaks for both manifests before the new one replaces the old, so a crash in between harms nothing.

    Raises:
        StoreError: The disk refused.
    """
    entries = (replace(e, pieces=pieces[e.path]) if e.path in pieces else e for e in manifest.files)
    data = serialise_metalink(manifest.with_files(entries))
    earlier = _read_complete(directory).get("manifest_sha256")
    fields = {**json.loads(_completion(manifest, data)), "earlier_manifest_sha256": earlier}
    with disk_errors("recording piece hashes", directory):
        write_durably(directory / COMPLETE_NAME, _json_bytes(fields))
        write_durably(directory / MANIFEST_NAME, data)


def _renew_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a manifest that cannot be believed any more; the files are those of the one at hand."""
    try:
        load_manifest(directory)
    except (StoreError, IntegrityError, ManifestError):
        data = serialise_metalink(manifest)
        with disk_errors("writing the manifest anew", directory):
            write_durably(directory / MANIFEST_NAME, data)
            write_durably(directory / COMPLETE_NAME, _completion(manifest, data))


def _renew_provenance(directory: Path, provenance: Mapping[str, Any], signed: Signed | None) -> None:
    """Let newer papers (licence, credit, prompt format) replace older ones, unless they prove less."""
    try:
        old = {str(file["path"]): file for file in load_provenance(directory)["files"]}
        weakest = min(Assurance.parse(str(file["assurance"])) for file in old.values())
    except (StoreError, KeyError, TypeError, ValueError):
        old, weakest = {}, Assurance.SIZE  # damaged: anything is better
    files = []
    for file in provenance.get("files", []):
        before = old.get(file["path"], {}).get("sources")
        is_from_cache = file["sources"] == [FROM_CACHE] and isinstance(before, list)
        files.append({**file, "sources": before} if is_from_cache else file)
    if min((Assurance.parse(file["assurance"]) for file in files), default=Assurance.SIZE) >= weakest:
        with disk_errors("recording where the model comes from", directory):
            _write_signed(directory, signed)  # before the papers that name it, and under a name of its own
            write_durably(directory / PROVENANCE_NAME, _json_bytes({**provenance, "files": files}))
            _remove_other_signed(directory, signed)


def _write_signed(directory: Path, signed: Signed | None) -> None:
    if signed is not None:
        write_durably(directory / SIGNED_NAME / signed.sha256, signed.document)
        write_durably(directory / SIGNED_NAME / f"{signed.sha256}.sig", signed.bundle)


def _remove_other_signed(directory: Path, signed: Signed | None) -> None:
    for path in directory.glob(f"{SIGNED_NAME}/*"):
        if signed is None or path.name not in {signed.sha256, f"{signed.sha256}.sig"}:
            path.unlink(missing_ok=True)


def move_into_place(draft: Path, final: Path) -> None:
    """Give a finished draft its name, in place of what is not complete there.

    Raises:
        OSError: It cannot be renamed; another process may have been faster.
    """
    try:
        draft.rename(final)
    except OSError:
        if is_complete(final) or not final.is_dir():
            raise
        # It has no valid .complete, so nobody may use it: left over from a damaged or foreign cache.
        shutil.rmtree(final)
        draft.rename(final)


def find_drafts(layout: Layout, content_digest: str) -> list[Path]:
    """Return the hidden directories in which this snapshot is being built, or was when its process died."""
    return sorted(layout.snapshots.glob(f".{content_digest[:16]}-*.tmp"))


def _fill(
    layout: Layout,
    manifest: Manifest,
    provenance: Mapping[str, Any],
    signed: Signed | None,
    draft: Path,
    final: Path,
) -> None:
    draft.mkdir()
    for entry in manifest.files:
        blob = find_blob(layout, entry.sha256 or "", entry.size or 0)
        if blob is None:
            raise _broken(final, f"expected a blob for {entry.path}, got none")
        link = draft / entry.path
        make_directory(link.parent)
        link_blob(blob, link, final / entry.path)
    licence = _LICENCE_TEXTS.get(manifest.info.licence)
    if licence is not None and not (draft / "LICENSE").exists():
        text = (resources.files("mistral_fetch") / "licences" / licence).read_bytes()
        write_durably(draft / "LICENSE", text)
    _write_signed(draft, signed)
    write_papers(draft, manifest, provenance)
    reached("snapshot-laid-out")
    complete_draft(draft, manifest)
    reached("snapshot-complete")


def write_papers(draft: Path, manifest: Manifest, provenance: Mapping[str, Any]) -> None:
    """Write a draft's manifest and where its files come from, and make all names in it durable."""
    write_durably(draft / MANIFEST_NAME, serialise_metalink(manifest))
    write_durably(draft / PROVENANCE_NAME, _json_bytes(provenance))
    for directory in {draft, *(path.parent for path in draft.rglob("*"))}:
        fsync_directory(directory)


def complete_draft(draft: Path, manifest: Manifest) -> None:
    """Write ``.complete``, the last file of a draft; all else is durable."""
    write_durably(draft / COMPLETE_NAME, _completion(manifest, serialise_metalink(manifest)))


def _completion(manifest: Manifest, data: bytes) -> bytes:
    sizes = {entry.path: entry.size for entry in manifest.files}
    return _json_bytes({"manifest_sha256": hashlib.sha256(data).hexdigest(), "sizes": sizes})


def link_blob(blob: Path, link: Path, final_link: Path) -> None:
    """Make ``link`` stand for ``blob``: a relative symbolic link, else a hard link, else a copy.

    ``final_link`` is where the link will be once its directory has its final name; it has the same depth.
    """
    try:
        link.symlink_to(os.path.relpath(blob, final_link.parent))
        return
    except (OSError, NotImplementedError):  # file systems and platforms without symbolic links
        link.unlink(missing_ok=True)
    try:
        os.link(blob, link)
    except OSError:
        shutil.copyfile(blob, link)
        link.chmod(0o444)
        with link.open("rb") as copy:
            system.sync_file(copy.fileno())


def write_ref(layout: Layout, record: RefRecord) -> None:
    """Record, durably, which snapshot a name stands for on one channel.

    Raises:
        StoreError: The disk refused.
    """
    path = layout.ref(record.key, record.channel)
    fields = {"snapshot": record.content_digest, "ref": record.key, "channel": record.channel}
    with disk_errors("naming the model", path):
        write_durably(path, _json_bytes({**fields, "pulled_at": record.pulled_at}))


def list_refs(layout: Layout) -> list[RefRecord]:
    """Return every ref in the cache, the newest pull first."""
    try:
        directories = list(layout.refs.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = [record for directory in directories for record in _read_refs(directory)]
    return sorted(records, key=lambda record: (-record.pulled_at, record.key, record.channel))


def find_refs(layout: Layout, key: str) -> list[RefRecord]:
    """Return what one name stands for, by channel, the newest pull first."""
    return sorted(_read_refs(layout.ref(key, "x").parent), key=lambda record: -record.pulled_at)


def _read_refs(directory: Path) -> Iterator[RefRecord]:
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        if path.name.startswith("."):
            continue  # a writer's temporary file, complete perhaps, but nobody named it
        try:
            fields = json.loads(path.read_bytes())
            yield RefRecord(
                str(fields["ref"]), unquote_name(path.name), str(fields["snapshot"]), int(fields["pulled_at"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn, or a foreign program's: it names nothing


def _read_complete(directory: Path) -> dict[str, Any]:
    try:
        fields = json.loads((directory / COMPLETE_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(directory, f"expected a readable {COMPLETE_NAME}, got: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("sizes"), dict):
        raise _broken(directory, f"expected sizes in {COMPLETE_NAME}, got something else")
    return fields


def _broken(directory: Path, detail: str) -> StoreError:
    return StoreError(f"the snapshot at {directory} is not complete", detail=detail, hint="pull the model again")


def _json_bytes(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()
