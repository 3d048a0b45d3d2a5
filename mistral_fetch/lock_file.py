"""``mistral-fetch.lock``: the exact files that references stood for when somebody looked. Values and text, no I/O.

The text is a function of the values: sorted, no dates, so that two machines write the same bytes. What is read is
held to every rule that the writer keeps, and the digests in it have to fit one another, so that an edit by hand that
says something else is found out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import MalformedManifest, ManifestError
from mistral_fetch.manifest import MAX_FILE_SIZE, MAX_FILES, FileEntry, Manifest, validate_path
from mistral_fetch.provision import CHANNELS, read_assurance, read_ref
from mistral_fetch.ref import CatalogRef, HubRef, MagnetRef, ManifestRef, Ref, TorrentRef, parse_ref
from mistral_fetch.strict_json import Fields, Read, UnexpectedJson, accepted, integer, matching, one_of, refuse
from mistral_fetch.strict_toml import decode_toml, explain, toml_text

LOCK_NAME = "mistral-fetch.lock"
LOCK_VERSION = 1
MAX_LOCK_BYTES = 16 * 1024 * 1024
_HEADING = "# Written by mistral-fetch lock; docs/provisioning.md explains it. Not to be edited.\n"
_IDENTITY = r"(hub|manifest|btih|btmh|archive)-[0-9A-Za-z._/+-]{1,200}"


@dataclass(frozen=True)
class LockedFile:
    """One file. ``digest`` is the strongest whole-file digest that the source gave; None where it gave none."""

    path: str
    size: int
    digest: Digest | None


@dataclass(frozen=True)
class LockedModel:
    """What one reference stood for.

    ``revision`` is what it left open: a catalog's full name, a hub's commit, the first digits of a local file's sha256.
    ``identity`` names the source's own description: a commit, an info-hash, an archive's or a manifest's digest.
    """

    ref: str
    revision: str
    channel: str
    identity: str
    assurance: Assurance
    files: tuple[LockedFile, ...]

    @property
    def key(self) -> str:
        """Return the name in the cache."""
        return key_of(parse_ref(self.ref), self.revision)

    @property
    def manifest_digest(self) -> Digest:
        """Return the sha256 of one line ``digest, two spaces, size, two spaces, path`` a file; ``-`` for no digest."""
        lines = "".join(f"{file.digest or '-'}  {file.size}  {file.path}\n" for file in self.files)
        return Digest("sha256", hashlib.sha256(lines.encode()).hexdigest())

    @property
    def content_digest(self) -> Digest | None:
        """Return the model's identity in the cache, where every file has a sha256."""
        manifest = Manifest(tuple(_entry(file) for file in self.files))
        return manifest.content_digest() if manifest.is_fully_pinned else None


@dataclass(frozen=True)
class LockFile:
    """What every reference of a ``mistral-fetch.toml`` stood for."""

    models: tuple[LockedModel, ...]

    def find(self, ref: str) -> LockedModel | None:
        """Return the entry of a reference as it is written in ``mistral-fetch.toml``."""
        return next((model for model in self.models if model.ref == ref), None)


def key_of(ref: Ref, revision: str) -> str:
    """Return the name in the cache of a reference whose open end is known."""
    if isinstance(ref, CatalogRef):
        return revision
    if isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url:
        return f"{ref.location.rpartition('/')[2]}#{revision}"
    return ref.key


def pinned_ref(ref: Ref, revision: str) -> Ref:
    """Return a reference that leaves nothing open."""
    if isinstance(ref, CatalogRef):
        name, _, version = revision.partition("@")
        return CatalogRef(name, version)
    return HubRef(ref.repo, revision) if isinstance(ref, HubRef) else ref


def serialise_lock(lock: LockFile) -> bytes:
    """Return the text of a lock file."""
    models = "".join(_model_text(model) for model in sorted(lock.models, key=lambda model: model.ref))
    return f"{_HEADING}version = {LOCK_VERSION}\n{models}".encode()


def _model_text(model: LockedModel) -> str:
    content = model.content_digest
    lines = [
        "",
        "[[model]]",
        f"ref = {toml_text(model.ref)}",
        *([f"revision = {toml_text(model.revision)}"] if model.revision else []),
        f"channel = {toml_text(model.channel)}",
        f"identity = {toml_text(model.identity)}",
        f"assurance = {toml_text(model.assurance.label)}",
        f'manifest = "{model.manifest_digest}"',
        *([f'content = "{content}"'] if content else []),
    ]
    for file in model.files:
        lines += ["", "[[model.file]]", f"path = {toml_text(file.path)}", f"size = {file.size}"]
        lines += [f'digest = "{file.digest}"'] if file.digest else []
    return "\n".join(lines) + "\n"


def parse_lock(data: bytes, name: str) -> LockFile:
    """Return what a lock file says.

    Raises:
        MalformedManifest: It is not what this program writes; the line is named.
    """
    try:
        fields = Fields(decode_toml(data, MAX_LOCK_BYTES), "")
        fields.required("version", integer(LOCK_VERSION, LOCK_VERSION))
        models = fields.entries("model", _read_model)
        fields.done()
        _refuse_repeats((f".model[{i}].ref", model.key, model.ref) for i, model in enumerate(models))
    except UnexpectedJson as error:
        raise MalformedManifest(
            f"the lock file {name} cannot be used",
            detail=explain(data, error),
            hint="take back the edit, or write it anew with: mistral-fetch lock --update",
        ) from None
    return LockFile(models)


def _read_model(value: Any, where: str) -> LockedModel:
    fields = Fields(value, where)
    ref = fields.required("ref", read_ref)
    revision: str = fields.optional("revision", _revision_of(parse_ref(ref)), "")
    model = LockedModel(
        ref,
        revision,
        fields.required("channel", one_of(*CHANNELS)),
        fields.required("identity", matching(_IDENTITY, "the name of a source's description")),
        fields.required("assurance", read_assurance),
        fields.required("file", _read_files),
    )
    if not model.revision and isinstance(parse_ref(ref), CatalogRef | HubRef):
        raise UnexpectedJson(where, "the key 'revision'", "none")
    _hold_to(fields.required("manifest", _digest), model.manifest_digest, f"{where}.manifest")
    _hold_to(fields.maybe("content", _digest), model.content_digest, f"{where}.content")
    fields.done()
    return model


def _revision_of(ref: Ref) -> Read[str]:
    if isinstance(ref, CatalogRef):
        return matching(r"[a-z0-9][a-z0-9._-]{0,95}@[a-z0-9][a-z0-9._+-]{0,63}", "a name@version of the catalog")
    if isinstance(ref, HubRef):
        return matching(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}", "a commit")
    if isinstance(ref, ManifestRef | TorrentRef) and not ref.is_url:
        return matching(r"[0-9a-f]{16}", "16 hexadecimal digits")
    assert isinstance(ref, ManifestRef | TorrentRef | MagnetRef)
    return accepted(lambda _value: False, "no revision of such a reference")


def _read_files(value: Any, where: str) -> tuple[LockedFile, ...]:
    # Not the reader of short lists: a model may have more files than that.
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_FILES:
        refuse(where, f"1 to {MAX_FILES} files", value)
    files = tuple(_read_file(item, f"{where}[{index}]") for index, item in enumerate(value))
    _refuse_repeats((f"{where}[{index}].path", file.path, file.path) for index, file in enumerate(files))
    if list(files) != sorted(files, key=lambda file: file.path):
        refuse(where, "files sorted by path", value)
    try:
        Manifest(tuple(_entry(file) for file in files))
    except ManifestError as error:
        raise UnexpectedJson(where, "files that do not clash", f"{error.what}: {error.detail}") from None
    return files


def _read_file(value: Any, where: str) -> LockedFile:
    fields = Fields(value, where)
    file = LockedFile(
        fields.required("path", _path),
        fields.required("size", integer(0, MAX_FILE_SIZE)),
        fields.maybe("digest", _digest),
    )
    fields.done()
    return file


def _path(value: Any, where: str) -> str:
    try:
        if not isinstance(value, str):
            refuse(where, "a path", value)
        validate_path(value)
    except ManifestError as error:
        raise UnexpectedJson(where, error.detail.removeprefix("expected "), repr(value)[:80]) from None
    return value


def _digest(value: Any, where: str) -> Digest:
    text = value if isinstance(value, str) and value == value.lower() else ""
    try:
        return Digest.parse(text)
    except ValueError:
        raise UnexpectedJson(where, "a digest as algorithm:hexadecimal", repr(value)[:80]) from None


def _hold_to(written: Digest | None, computed: Digest | None, where: str) -> None:
    if written != computed:
        raise UnexpectedJson(where, f"{computed}, which the files below give", str(written))


def _refuse_repeats(entries: Iterable[tuple[str, str, str]]) -> None:
    seen: set[str] = set()
    for where, key, shown in entries:
        if key in seen:
            raise UnexpectedJson(where, "every entry once", f"{shown!r} again")
        seen.add(key)


def _entry(file: LockedFile) -> FileEntry:
    return FileEntry(file.path, file.size, (file.digest,) if file.digest else ())
