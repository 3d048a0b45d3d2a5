"""Turn a directory of weights into everything a downloader needs: manifest, two torrents and a checksum list.

Owns what is published and in which form; the digests are :mod:`mistral_fetch.publish.hashing`'s business, and the
network nobody's here. The same files give the same bytes, on any day and any machine. Beside the files themselves
these four are laid out in ``OUT`` (a web server on ``OUT`` with ``NAME/`` in it is a complete mirror)::

    NAME.torrent       hybrid v1 and v2
    NAME.v1.torrent    the same files for clients that cannot read a hybrid (aria2c 1.36, Transmission 3.00)
    SHA256SUMS         for sha256sum -c, run in the directory
    NAME.meta4         written last: whoever finds it finds the rest
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mistral_fetch.bittorrent.create import TorrentAddresses, hybrid_torrent, plain_torrent, tree_order
from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import Metainfo, parse_metainfo
from mistral_fetch.digest import Digest
from mistral_fetch.errors import ManifestError, PublishError
from mistral_fetch.events import BytesVerified, Report, ignore_events
from mistral_fetch.manifest import (
    DEFAULT_PIECE_LENGTH,
    FileEntry,
    Manifest,
    MirrorUrl,
    ModelInfo,
    PieceHashes,
    TorrentLink,
    validate_path,
    validate_paths,
)
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.publish.hashing import FileDigests, HashedDirectory, SourceFile, hash_files, torrent_piece_length
from mistral_fetch.publish.readback import PublishedFiles, read_back
from mistral_fetch.store.durable import disk_errors, write_durably


@dataclass(frozen=True)
class Publication:
    """What was published, and where its parts lie."""

    name: str
    manifest: Manifest
    manifest_path: Path
    torrent_path: Path
    plain_torrent_path: Path
    checksums_path: Path
    info_hash_v1: str
    info_hash_v2: str
    plain_info_hash: str
    piece_length: int
    size: int


@dataclass(frozen=True)
class _Torrents:
    hybrid: Metainfo
    plain: Metainfo


def plan_publication(directory: Path) -> list[SourceFile]:
    """Return every file below ``directory``, sorted; nothing is left out silently.

    Raises:
        PublishError: It is no directory or empty, or holds something that cannot be published: a link that leads
            out of it or to a folder, a special file, an unsafe or clashing name.
    """
    if not directory.is_dir():
        raise _refuse(f"cannot publish {directory}", "expected a directory of model files", "name the directory itself")
    inside = directory.resolve()
    try:
        files = sorted(_walk(directory, "", inside), key=lambda file: file.path)
        if not files:
            raise _refuse(f"cannot publish {directory}", "expected model files, it is empty", "name another directory")
        validate_paths(file.path for file in files)
    except ManifestError as error:
        raise _refuse(error.what, error.detail, "rename the file, then publish again") from error
    except OSError as error:
        detail = f"expected a readable directory, got: {error.strerror or error}"
        raise _refuse(f"cannot read {directory}", detail, "check its permissions, then publish again") from error
    return files


def publish(
    directory: Path,
    out: Path,
    *,
    name: str = "",
    mirrors: Sequence[str] = (),
    trackers: Sequence[str] = (),
    info: ModelInfo | None = None,
    files: Sequence[SourceFile] | None = None,
    report: Report = ignore_events,
) -> Publication:
    """Read ``directory`` once, write its manifest, torrents and checksums to ``out``, and read those back.

    Args:
        directory: The model's files.
        out: Where to write; created if missing. Must not lie in ``directory``.
        name: The model's name in the outputs; the directory's own when empty.
        mirrors: Addresses under which the files will be found, best first. Without one the manifest points to
            ``NAME/`` beside itself.
        trackers: Announce addresses for the torrents.
        info: What people want to know beside the bytes.
        files: What to publish, where that is known already (a cache's model); else all below the directory.
        report: Receives ``BytesVerified`` while files are hashed.

    Raises:
        PublishError: The directory cannot be published as it is, or changed meanwhile.
        StoreError: The outputs could not be written.
    """
    name = _checked_name(name or directory.resolve().name)
    if out.resolve().is_relative_to(directory.resolve()):
        raise _refuse(
            f"cannot write the outputs to {out}",
            "expected a place outside the directory, or the outputs would be part of the next publication",
            "give another directory with --out",
        )
    files = plan_publication(directory) if files is None else files
    piece_length = torrent_piece_length(sum(file.size for file in files))
    hashed = _hash(files, piece_length, report)
    torrents = _build_torrents(name, piece_length, hashed, mirrors, trackers)
    manifest = _manifest(name, hashed, mirrors, info or ModelInfo(name=name))
    publication = _write(out, name, manifest, torrents)
    _prove(publication, torrents)
    return publication


def checksum_list(files: Sequence[FileEntry]) -> str:
    """Return the lines that ``sha256sum -c`` reads, sorted by path."""
    return "".join(f"{entry.sha256}  {entry.path}\n" for entry in sorted(files, key=lambda entry: entry.path))


def _walk(folder: Path, above: str, inside: Path) -> Iterator[SourceFile]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{above}{entry.name}"
            if entry.is_symlink():
                yield _linked_file(Path(entry.path), path, inside)
            elif entry.is_dir():
                yield from _walk(Path(entry.path), f"{path}/", inside)
            elif entry.is_file():
                yield SourceFile(path, entry.stat().st_size, Path(entry.path))
            else:
                raise _unpublishable(path, "it is a device, a socket or a pipe", "remove it, then publish again")


def _linked_file(location: Path, path: str, inside: Path) -> SourceFile:
    hint = "copy the model with its links followed (cp -rL), then publish the copy"
    try:
        target = location.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _unpublishable(path, "it is a link that leads nowhere", hint) from error
    if not target.is_relative_to(inside):
        raise _unpublishable(path, f"it is a link out of the directory, to {target}", hint)
    status = target.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _unpublishable(path, "it is a link to something that is not a file", hint)
    return SourceFile(path, status.st_size, target)


def _hash(files: Sequence[SourceFile], piece_length: int, report: Report) -> HashedDirectory:
    sizes = {file.path: file.size for file in files}
    if not any(sizes.values()):
        raise _refuse("cannot publish empty files only", "expected at least one byte", "check the directory")
    return hash_files(
        files,
        piece_length,
        last_in_tree=max(sizes, key=tree_order),
        progress=lambda path, done: report(BytesVerified(path, done, sizes[path])),
    )


def _build_torrents(
    name: str, piece_length: int, hashed: HashedDirectory, mirrors: Sequence[str], trackers: Sequence[str]
) -> _Torrents:
    # A web seed's address ends where the torrent's own name begins (BEP 19), so a mirror can only be one when
    # its last folder is that name.
    seeds = tuple(mirror.rstrip("/")[: -len(quote(name))] for mirror in mirrors if _ends_in(mirror, name))
    addresses = TorrentAddresses(tuple(trackers), seeds)
    hybrid = hybrid_torrent(name, piece_length, [file.torrent for file in hashed.files], addresses)
    plain = plain_torrent(name, piece_length, hashed.plain_order, hashed.plain_pieces, addresses)
    return _Torrents(_checked_torrent(hybrid, hashed.files), _checked_torrent(plain, hashed.files))


def _ends_in(mirror: str, name: str) -> bool:
    return mirror.rstrip("/").rpartition("/")[2] == quote(name)


def _folder_of_torrents(mirror: str, name: str) -> str:
    # The layout in OUT, seen from outside: torrents lie beside the folder NAME/ where there is one.
    return mirror.rstrip("/")[: -len(quote(name))] if _ends_in(mirror, name) else f"{mirror.rstrip('/')}/"


def _checked_torrent(data: bytes, files: Sequence[FileDigests]) -> Metainfo:
    """Read a torrent back as a stranger would, with our parser and with libtorrent, before anybody gets it."""
    metainfo = parse_metainfo(data)
    load_parameters(metainfo)
    if sorted((file.path, file.size) for file in metainfo.files) != sorted((file.path, file.size) for file in files):
        raise AssertionError("the torrent that was built does not name the files that were read")
    return metainfo


def _manifest(name: str, hashed: HashedDirectory, mirrors: Sequence[str], info: ModelInfo) -> Manifest:
    # Relative addresses are resolved against the manifest's own, so a tree can be moved or served anywhere.
    bases = [mirror.rstrip("/") for mirror in mirrors] or [quote(name)]
    torrent_base = _folder_of_torrents(mirrors[0], name) if mirrors else ""
    # Both, each with a swarm of its own. The hybrid only in words that others skip: aria2c follows a metaurl by
    # itself, and takes a wrong info-hash from a hybrid.
    torrent_urls = {f"{torrent_base}{quote(name)}.v1.torrent": False, f"{torrent_base}{quote(name)}.torrent": True}
    entries = []
    for file in hashed.files:
        addresses = [MirrorUrl(f"{base}/{quote(file.path)}", priority) for priority, base in enumerate(bases, start=1)]
        entries.append(
            FileEntry(
                path=file.path,
                size=file.size,
                digests=(Digest("sha256", file.sha256), Digest("md5", file.md5)),
                pieces=PieceHashes(DEFAULT_PIECE_LENGTH, file.pieces_sha256) if file.size else None,
                mirrors=tuple(addresses),
                torrents=tuple(
                    TorrentLink(url, _path_in_torrent(name, file.path, len(hashed.files)), needs_v2)
                    for url, needs_v2 in torrent_urls.items()
                ),
            )
        )
    return Manifest(files=tuple(entries), info=info)


def _path_in_torrent(name: str, path: str, file_count: int) -> str:
    # As aria2c looks it up: below the torrent's own name, unless the file is the torrent.
    return path if file_count == 1 and path == name else f"{name}/{path}"


def _write(out: Path, name: str, manifest: Manifest, torrents: _Torrents) -> Publication:
    places = PublishedFiles.of(out, name)
    publication = Publication(
        name=name,
        manifest=manifest,
        manifest_path=places.manifest,
        torrent_path=places.torrent,
        plain_torrent_path=places.plain_torrent,
        checksums_path=places.checksums,
        info_hash_v1=torrents.hybrid.info_hash_v1 or "",
        info_hash_v2=torrents.hybrid.info_hash_v2 or "",
        plain_info_hash=torrents.plain.info_hash_v1 or "",
        piece_length=torrents.hybrid.piece_length,
        size=manifest.size,
    )
    with disk_errors("writing a publication", out):
        write_durably(publication.torrent_path, torrents.hybrid.data)
        write_durably(publication.plain_torrent_path, torrents.plain.data)
        write_durably(publication.checksums_path, checksum_list(manifest.files).encode())
        write_durably(publication.manifest_path, serialise_metalink(manifest))
    return publication


def _prove(publication: Publication, torrents: _Torrents) -> None:
    """Read everything back from the disk as strangers will; what they would stumble over is not left lying about."""
    try:
        found = read_back(publication.manifest_path.parent, publication.name)
        if (found.hybrid, found.plain) != (torrents.hybrid, torrents.plain):
            raise AssertionError("the torrents on the disk are not those that were built")
        if found.manifest.content_digest() != publication.manifest.content_digest():
            raise AssertionError("the manifest on the disk is not the one that was built")
    except BaseException:
        publication.manifest_path.unlink(missing_ok=True)
        raise


def _checked_name(name: str) -> str:
    try:
        validate_path(name)
        if "/" not in name:
            return name
    except ManifestError as error:
        raise _refuse(f"cannot publish under the name {name[:80]!r}", error.detail, "give another --name") from error
    raise _refuse(f"cannot publish under the name {name[:80]!r}", "expected a name without /", "give another --name")


def _unpublishable(path: str, reason: str, hint: str) -> PublishError:
    return _refuse(f"cannot publish {path}", f"expected a plain file, but {reason}", hint)


def _refuse(what: str, detail: str, hint: str) -> PublishError:
    return PublishError(what, detail=detail, hint=hint)
