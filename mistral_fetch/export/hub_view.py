"""``export hf``: a model of the cache in Hugging Face's own cache, where its programs find it without a network.

The layout is huggingface_hub's: ``models--ORG--NAME/blobs/<etag>``, ``snapshots/<commit>/<path>`` as relative links to
those, ``refs/<revision>`` with the commit. Other programs work on that cache at the same time and may have parts of the
model there already; so names are added one by one, the ref last, and nothing that is there is written to.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.catalog import Catalog
from mistral_fetch.catalog_values import HubChannel
from mistral_fetch.digest import Digest
from mistral_fetch.errors import Conflict, NotFoundError, UsageError
from mistral_fetch.export.directory import Exported
from mistral_fetch.export.links import Placer
from mistral_fetch.export.model import Model, ModelFile, require_hugging_face_layout
from mistral_fetch.ref import CatalogRef, HubRef, is_hub_repo, parse_ref
from mistral_fetch.store.durable import disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.units import MIB

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# What a hub keeps in git itself is called by its git id; larger files and weights by their sha256.
_MAX_GIT_BYTES = 10 * MIB
_GIT_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".py", "LICENSE", ".gitattributes")


@dataclass(frozen=True)
class HubName:
    """What Hugging Face's programs call a model."""

    repo: str
    revision: str
    commit: str

    @property
    def folder(self) -> str:
        """Return the directory of the repository in the hub's cache."""
        return f"models--{self.repo.replace('/', '--')}"


def hub_name(model: Model, catalog: Catalog, repo: str | None) -> HubName:
    """Return what a model is called on the hub it came from, or by the name that a person gives it.

    A model that came from no hub has no commit: then the first 40 digits of its content digest stand for one.

    Raises:
        UsageError: It has no such name, or the given one is none.
    """
    if repo is not None and not is_hub_repo(repo):
        raise UsageError(f"{repo[:80]!r} is no repository", detail="expected ORG/NAME", hint="type --repo ORG/NAME")
    known, revision = _origin(model, catalog)
    named = repo or known
    if named is None:
        raise UsageError(
            f"{model.key} has no name on a hub",
            detail=f"expected a model of a hub, got one by {model.channel}",
            hint="name it for the programs that will load it: --repo ORG/NAME",
        )
    commit = str(model.papers.get("identity", "")).rpartition("-")[2]
    is_known = model.channel == "hub" and _COMMIT.fullmatch(commit) is not None
    return HubName(named, revision, commit if is_known else model.content_digest[:40])


def _origin(model: Model, catalog: Catalog) -> tuple[str | None, str]:
    try:
        ref = parse_ref(model.key)
    except UsageError:
        return None, "main"
    if isinstance(ref, HubRef):
        is_name = _REVISION.fullmatch(ref.revision) and not _COMMIT.fullmatch(ref.revision)
        return ref.repo, ref.revision if is_name else "main"
    if not isinstance(ref, CatalogRef) or model.channel != "hub":
        return None, "main"
    try:
        channel = catalog.find(ref.name, ref.version).channel("hub")
    except NotFoundError:
        return None, "main"
    return (channel.repo if isinstance(channel, HubChannel) else None), "main"


def export_hub_view(model: Model, name: HubName, hub_cache: Path, placer: Placer, *, replaces_ref: bool) -> Exported:
    """Add a model to Hugging Face's cache.

    Args:
        model: A complete model.
        name: What it is called there.
        hub_cache: The cache's ``hub`` directory.
        placer: How blobs get there.
        replaces_ref: Let the revision stand for this commit, where it stands for another one.

    Raises:
        UsageError: Its files are not named as transformers looks for them.
        Conflict: Something else is there under one of the names.
        StoreError: The disk refused.
    """
    require_hugging_face_layout(model, "transformers")
    place = hub_cache / name.folder
    with disk_errors("adding to Hugging Face's cache", place):
        _refuse_other_ref(place, name, replaces_ref=replaces_ref)
        for directory in (place / "blobs", place / "snapshots" / name.commit, place / "refs"):
            make_directory(directory)
        _drop_drafts(place)
        added = [_add(place, name, file, etag, placer) for file, etag in _etags(model).items()]
        for directory in {place / "blobs", *(path.parent for path in (place / "snapshots" / name.commit).rglob("*"))}:
            fsync_directory(directory)
        is_named = _read_ref(place, name) == name.commit
        if not is_named:
            write_durably(place / "refs" / name.revision, name.commit.encode())
    directory = place / "snapshots" / name.commit
    step = f"HF_HUB_OFFLINE=1 HF_HUB_CACHE={hub_cache} COMMAND, with the model {name.repo}"
    return Exported(directory, is_named and not any(added), placer.told(), step)


def _refuse_other_ref(place: Path, name: HubName, *, replaces_ref: bool) -> None:
    found = _read_ref(place, name)
    if found not in {"", name.commit} and not replaces_ref:
        raise Conflict(
            f"{name.revision} of {name.repo} is another commit in Hugging Face's cache",
            detail=f"expected {name.commit}, got {found[:80]}",
            hint="let it stand for this one with --replace, or give another cache with --to",
        )


def _read_ref(place: Path, name: HubName) -> str:
    try:
        return (place / "refs" / name.revision).read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""


def _etags(model: Model) -> Mapping[ModelFile, str]:
    """Return what the hub calls each file: what it told when it was pulled, else what it would compute."""
    records = model.papers.get("files")
    promised = {str(r.get("path")): r.get("promised") for r in records if isinstance(r, dict)} if records else {}
    return {file: _etag(file, promised.get(file.path)) for file in model.files}


def _etag(file: ModelFile, promised: object) -> str:
    told = [str(text) for text in promised] if isinstance(promised, list) else []
    git_id = next((text for text in told if text.startswith("gitsha1:")), None)
    if git_id is not None and not any(text.startswith("sha256:") for text in told):
        try:
            return Digest.parse(git_id).value
        except ValueError:
            return file.sha256
    if file.size > _MAX_GIT_BYTES or not file.path.endswith(_GIT_SUFFIXES):
        return file.sha256
    data = file.location.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _add(place: Path, name: HubName, file: ModelFile, etag: str, placer: Placer) -> bool:
    """Add one file's blob and link where they are missing; return whether one was."""
    blob, link = place / "blobs" / etag, place / "snapshots" / name.commit / file.path
    is_new = not os.path.lexists(blob)
    if is_new:
        draft = blob.with_name(f"{etag}.{secrets.token_hex(6)}.mistral-fetch")
        placer.place(file.location, draft)
        draft.rename(blob)
    elif blob.stat().st_size != file.size:
        raise _other(blob, f"{file.size} bytes", f"{blob.stat().st_size}")
    make_directory(link.parent)
    wanted = os.path.relpath(blob, link.parent)
    if not os.path.lexists(link):
        link.symlink_to(wanted)
        return True
    if not link.exists() or not link.samefile(blob):
        raise _other(link, f"a link to {wanted}", "something else")
    return is_new


def _drop_drafts(place: Path) -> None:
    for draft in (place / "blobs").glob("*.mistral-fetch"):
        draft.unlink(missing_ok=True)


def _other(path: Path, expected: str, actual: str) -> Conflict:
    return Conflict(
        f"{path} is there already, and is something else",
        detail=f"expected {expected}, got {actual}",
        hint="remove it, or give another cache with --to",
    )
