"""Where a model's bytes may lie on this machine already: the user's directories, and Hugging Face's own cache.

A shelf only proposes files of the right size; whether one is right is found out by hashing it
(:mod:`mistral_fetch.store.adopt`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from mistral_fetch.config import Settings
from mistral_fetch.errors import printable
from mistral_fetch.events import Notice, Report
from mistral_fetch.manifest import FileEntry

# A home directory named by mistake must not be walked for minutes.
MAX_ENTRIES = 20_000
# Each one is read as a whole; more of the same name and size are hardly ever the right one.
MAX_CANDIDATES = 8


class Shelf(Protocol):
    """A place to look in."""

    label: str
    """What ``PROVENANCE.json`` says of a file that was found here."""

    def candidates(self, entry: FileEntry) -> list[Path]:
        """Return the files that may be this one, the likeliest first; all have its size."""


def open_shelves(directories: Sequence[Path], settings: Settings, report: Report) -> list[Shelf]:
    """Return where to look: what the user named, then Hugging Face's cache unless the settings leave it out."""
    shelves: list[Shelf] = [DirectoryShelf(directory, report) for directory in directories]
    hub_cache = hub_cache_directory() if settings.hf_cache else None
    if hub_cache is not None and hub_cache.is_dir():
        shelves.append(HubCacheShelf(hub_cache))
    return shelves


def hub_cache_directory(environment: Mapping[str, str] | None = None) -> Path | None:
    """Return where Hugging Face's programs keep what they fetched, or None where no such place can be named."""
    environment = os.environ if environment is None else environment
    cache = environment.get("XDG_CACHE_HOME", "") or "~/.cache"
    home = environment.get("HF_HOME", "") or f"{cache}/huggingface"
    named = environment.get("HF_HUB_CACHE", "") or f"{home}/hub"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:  # ~somebody who is not known here
        return None


class DirectoryShelf:
    """A directory of any kind: a model's own, one above several models', another cache, a disk of downloads."""

    def __init__(self, directory: Path, report: Report) -> None:
        self.directory = directory.absolute()
        self.label = f"adopted from {printable(str(self.directory))}"
        self._report = report

    def candidates(self, entry: FileEntry) -> list[Path]:
        """Return files at the same path, then those below one folder, then any of that name or digest."""
        return _of_size(self._propose(entry), entry.size or 0)

    def _propose(self, entry: FileEntry) -> Iterator[Path]:
        digests = _digest_names(entry)
        shards = [f"blobs/sha256/{name[:2]}/{name}" for name in digests if len(name) == 64]  # another cache of ours
        likely = [entry.path, *digests, *(f"blobs/{name}" for name in digests), *shards]
        yield from (self.directory / place for place in likely)
        yield from (folder / place for place in likely for folder in self._folders)
        for name in (*digests, entry.path.rpartition("/")[2]):
            yield from self._by_name.get(name, ())

    @cached_property
    def _folders(self) -> list[Path]:
        return sorted(Path(found.path) for found in _scan(self.directory) if _is_folder(found, follow=True))

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """Every file below the directory by its name, the nearest first. Folders behind links are not entered."""
        names: dict[str, list[Path]] = {}
        queue, seen = [self.directory], 0
        for folder in queue:
            for found in _scan(folder):
                seen += 1
                if seen > MAX_ENTRIES:
                    self._report(Notice(f"only the first {MAX_ENTRIES} entries of {self.directory} were looked at"))
                    return names
                if _is_folder(found, follow=False):
                    queue.append(Path(found.path))
                else:
                    names.setdefault(found.name, []).append(Path(found.path))
        return names


class HubCacheShelf:
    """Hugging Face's cache, where a file is named by its sha256 or, if it is small, its git blob id."""

    label = "adopted from the Hugging Face cache"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def candidates(self, entry: FileEntry) -> list[Path]:
        """Return the blobs of the file's digests, whichever repository they belong to."""
        names = _digest_names(entry)
        return _of_size((folder / "blobs" / name for name in names for folder in self._models), entry.size or 0)

    @cached_property
    def _models(self) -> list[Path]:
        return sorted(Path(found.path) for found in _scan(self.directory) if found.name.startswith("models--"))


def _digest_names(entry: FileEntry) -> list[str]:
    digests = [entry.digest(algorithm) for algorithm in ("sha256", "gitsha1")]
    return [digest.value for digest in digests if digest is not None]


def _of_size(paths: Iterable[Path], size: int) -> list[Path]:
    """Return the regular files of this size, each inode once; symbolic links to them count."""
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):
            continue  # not there, a link to nowhere, or not ours to see: no candidate
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            found.setdefault((status.st_dev, status.st_ino), path)
            if len(found) == MAX_CANDIDATES:
                break
    return list(found.values())


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for _, entry in zip(range(MAX_ENTRIES + 1), entries, strict=False)]
    except OSError:
        return []  # unreadable: there is nothing to find in it


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False
