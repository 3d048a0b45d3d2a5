"""What was made from a snapshot: the same model with its weights in another form.

``derived/<recipe>/<content digest of the snapshot>/`` is laid out like a snapshot, with a manifest and papers of its
own: the file that was made lies in it, everything else is linked from the store. It is built in a hidden directory
and renamed, ``.complete`` last, so that a reader sees all of it or nothing. It is removed together with its snapshot.
How the file is made is the business of whoever calls; nothing of the weights is opened here.
"""

from __future__ import annotations

import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mistral_fetch import system
from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import StoreError
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.store.blobs import find_blob
from mistral_fetch.store.derived_check import take_stamp
from mistral_fetch.store.durable import disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.store.layout import Layout, unquote_name
from mistral_fetch.store.snapshots import (
    COMPLETE_NAME,
    complete_draft,
    is_complete,
    link_blob,
    load_manifest,
    load_provenance,
    move_into_place,
    write_papers,
)
from mistral_fetch.version import __version__

_LICENCE_NAME = "LICENSE"


@dataclass(frozen=True)
class Product:
    """A file that a recipe made, durable in the directory it was given; the sha256 is of what was written.

    ``facts`` is what its maker measured, such as seconds or quality, as JSON values: kept in the papers, not relied on.
    """

    path: str
    size: int
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How weights are made from weights. ``name`` stands for every byte of the result, and for who may use it.

    ``replaced`` are the files of the snapshot that the product stands for; the result does not have them.
    """

    name: str
    weight_format: str
    replaced: Collection[str]


def find_derived(layout: Layout, recipe: str, content_digest: str) -> Path | None:
    """Return the directory of what a recipe made of a snapshot, if it is complete with every file's size."""
    directory = layout.derived(recipe, content_digest)
    return directory if is_complete(directory) else None


def list_derived(layout: Layout, content_digest: str) -> list[Path]:
    """Return everything that was made of a snapshot, complete or not, by recipe."""
    return sorted(path for path in layout.derivations.glob(f"*/{content_digest}") if path.is_dir())


def describe_derived(layout: Layout, content_digest: str) -> list[dict[str, Any]]:
    """Return what ``list`` and ``show`` say of everything that was made of a snapshot."""
    return [
        {
            "recipe": unquote_name(directory.parent.name),
            "directory": str(directory),
            "bytes_on_disk": own_bytes(directory),
            "state": "complete" if is_complete(directory) else "damaged",
        }
        for directory in list_derived(layout, content_digest)
    ]


def find_derived_drafts(layout: Layout, content_digest: str) -> list[Path]:
    """Return the hidden directories in which something is being made of a snapshot, or was when its process died."""
    return sorted(layout.derivations.glob(f"*/.{content_digest[:16]}-*.tmp"))


def discard_derived(directory: Path) -> None:
    """Remove something that was made of a snapshot; it can be made again.

    Raises:
        StoreError: The disk refused.
    """
    with disk_errors("removing what was made of a model", directory):
        # Not complete any more before anything in it goes.
        (directory / COMPLETE_NAME).unlink(missing_ok=True)
        fsync_directory(directory)
        shutil.rmtree(directory)


def own_bytes(directory: Path) -> int:
    """Return how much disk a directory's files take that are not links to blobs."""
    found = (path.lstat() for path in directory.rglob("*"))
    return sum(
        system.bytes_on_disk(status) for status in found if stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    )


def write_derived(layout: Layout, recipe: Recipe, content_digest: str, make: Callable[[Path], Product]) -> Path:
    """Let ``make`` write a product into the directory it is given, and lay the model out around it.

    Raises:
        StoreError: The snapshot is not complete, or the disk refused.
        IntegrityError: The snapshot's own manifest was changed.
    """
    source = layout.snapshot(content_digest)
    manifest, papers = load_manifest(source), load_provenance(source)
    final = layout.derived(recipe.name, content_digest)
    draft = final.with_name(f".{content_digest[:16]}-{secrets.token_hex(6)}.tmp")
    with disk_errors("writing another form of the model", draft):
        make_directory(draft)
        try:
            product = make(draft)
            _seal(draft / product.path, product)
            _lay_out(layout, recipe, manifest, papers, product, draft)
            move_into_place(draft, final)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError) and is_complete(final):
                return final  # another process was faster
            raise
        fsync_directory(final.parent)
    return final


def _seal(path: Path, product: Product) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != product.size:
        raise StoreError(
            f"the runtime did not leave what it said at {path}",
            detail=f"expected a file of {product.size} bytes, got {status.st_size}",
            hint="run the same command again",
        )
    path.chmod(0o444)


def _lay_out(
    layout: Layout, recipe: Recipe, source: Manifest, papers: Mapping[str, Any], product: Product, draft: Path
) -> None:
    directory = layout.snapshot(source.content_digest().value)
    kept = [replace(e, mirrors=(), torrents=()) for e in source.files if e.path not in recipe.replaced]
    for entry in kept:
        blob = find_blob(layout, entry.sha256 or "", entry.size or 0)
        if blob is None:
            raise StoreError(
                f"the snapshot at {directory} is not complete",
                detail=f"expected a blob for {entry.path}, got none",
                hint="mistral-fetch repair REF fetches what is missing",
            )
        make_directory((draft / entry.path).parent)
        # A link goes up as far as from the directory's final name: the two are neighbours.
        link_blob(blob, draft / entry.path, draft / entry.path)
    if (directory / _LICENCE_NAME).is_file() and not (draft / _LICENCE_NAME).exists():
        write_durably(draft / _LICENCE_NAME, (directory / _LICENCE_NAME).read_bytes())
    made = FileEntry(product.path, product.size, (Digest("sha256", product.sha256),))
    manifest = Manifest((made, *kept), replace(source.info, weight_format=recipe.weight_format))
    # The last change of the product was its mode: from here on, its stamp tells whether anybody wrote to it.
    described = _describe(recipe, source, manifest, papers, product)
    described["files"][0]["stamp"] = take_stamp(draft / product.path)
    write_papers(draft, manifest, described)
    complete_draft(draft, manifest)


def _describe(
    recipe: Recipe, source: Manifest, manifest: Manifest, papers: Mapping[str, Any], product: Product
) -> dict[str, Any]:
    """Return the content of ``PROVENANCE.json`` (``docs/store-format.md``): the snapshot's, and what was made of it."""
    files = [file for file in papers.get("files", []) if file["path"] not in recipe.replaced]
    used = [file for file in papers.get("files", []) if file["path"] in recipe.replaced]
    made = {
        "path": product.path,
        "size": product.size,
        "sha256": product.sha256,
        # No more is proved of it than of what it was made from.
        "assurance": _weakest([str(file["assurance"]) for file in used]),
        "promised": [],
        "sources": [f"made from {file['path']}" for file in used],
        "verified_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    origin = {
        "recipe": recipe.name,
        "content_digest": str(source.content_digest()),
        "files": [{key: file[key] for key in ("path", "size", "sha256")} for file in used],
        **({"facts": dict(product.facts)} if product.facts else {}),
    }
    return {
        **papers,
        "weight_format": recipe.weight_format,
        "content_digest": str(manifest.content_digest()),
        "derived_from": origin,
        "tool": f"mistral-fetch {__version__}",
        "files": [made, *files],
    }


def _weakest(labels: Collection[str]) -> str:
    return min(map(Assurance.parse, labels), default=Assurance.SIZE).label
