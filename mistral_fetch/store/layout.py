"""Where things lie inside the cache: the only module that knows the names of its files.

<home>/
  VERSION                       the layout's number, and nothing else
  blobs/sha256/ab/<hex>         verified bytes, mode 0444
  partial/<key>/                an unfinished file, see :mod:`mistral_fetch.store.partials`
  snapshots/<content digest>/   a model laid out as a directory of links
  refs/<quoted ref>/<channel>   which snapshot a name stands for
  locks/<quoted ref>            who is working on it
  mirrors.json                  how fast, how reliable and how honest mirrors were; nothing depends on it
  trust/<quoted address>/       which signed catalogs were seen there, and a copy of the last one from a server
  publications/<key>/           torrents, manifest and checksums that `seed` and `mirror` made of a model
  derived/<key>/<content digest>/   a snapshot's weights in another form, see :mod:`mistral_fetch.store.derived`
  pins/<quoted ref>             what `prune` must not remove
  used/<content digest>         its time is when the snapshot was used last
  trash/<id>/                   a snapshot that `prune` removed and can bring back, see :mod:`mistral_fetch.store.trash`
"""

from __future__ import annotations

import hashlib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.errors import StoreError, UnsupportedLayout
from mistral_fetch.store.durable import disk_errors, make_directory, write_durably

LAYOUT_VERSION = "1"
_MAX_QUOTED = 200


@dataclass(frozen=True)
class Layout:
    """The paths of one cache. Creating it touches nothing on disk."""

    home: Path

    def blob(self, sha256: str) -> Path:
        """Return where the blob of this digest lies, or would."""
        return self.blobs / sha256[:2] / sha256

    @property
    def blobs(self) -> Path:
        """Return the directory of all blobs."""
        return self.home / "blobs" / "sha256"

    @property
    def partials(self) -> Path:
        """Return the directory of all partials."""
        return self.home / "partial"

    def partial(self, key: str) -> Path:
        """Return the directory of one partial; ``key`` names the content, such as ``sha256-<hex>``."""
        return self.partials / quote_name(key)

    @property
    def snapshots(self) -> Path:
        """Return the directory of all snapshots."""
        return self.home / "snapshots"

    def snapshot(self, content_digest: str) -> Path:
        """Return one snapshot's directory, by the hexadecimal content digest."""
        return self.snapshots / content_digest

    @property
    def refs(self) -> Path:
        """Return the directory of all refs."""
        return self.home / "refs"

    def ref(self, key: str, channel: str) -> Path:
        """Return the file that says which snapshot a ref means on one channel."""
        return self.refs / quote_name(key) / quote_name(channel)

    @property
    def mirror_scores(self) -> Path:
        """Return the file with what was learnt about mirrors."""
        return self.home / "mirrors.json"

    def trust(self, address: str) -> Path:
        """Return the directory that remembers what catalogs were accepted from an address."""
        return self.home / "trust" / quote_name(address)

    def publication(self, key: str) -> Path:
        """Return where the torrents and the manifest made of a model lie, for ``seed`` and ``mirror``."""
        return self.home / "publications" / quote_name(key)

    @property
    def derivations(self) -> Path:
        """Return the directory of everything that was made from snapshots, one folder a recipe's key."""
        return self.home / "derived"

    def derived(self, recipe: str, content_digest: str) -> Path:
        """Return the directory of what a recipe makes of the snapshot with this content digest."""
        return self.derivations / quote_name(recipe) / content_digest

    def derived_lock(self, content_digest: str) -> Path:
        """Return the lock file of everything that is made from one snapshot."""
        return self.lock(f"derived-{content_digest}")

    @property
    def pins(self) -> Path:
        """Return the directory of all pins."""
        return self.home / "pins"

    def pin(self, key: str) -> Path:
        """Return the file that keeps a ref from being pruned."""
        return self.pins / quote_name(key)

    def used(self, content_digest: str) -> Path:
        """Return the file whose time is when a snapshot was used last."""
        return self.home / "used" / content_digest

    def use_lock(self, content_digest: str) -> Path:
        """Return the lock file that processes share while they read a snapshot or what was made of it."""
        return self.lock(f"use-{content_digest}")

    @property
    def trash(self) -> Path:
        """Return the directory of what was removed and can be brought back."""
        return self.home / "trash"

    def lock(self, key: str) -> Path:
        """Return the lock file of a ref."""
        return self.home / "locks" / quote_name(key)

    def check_version(self) -> None:
        """Refuse a cache written by a layout this version does not know.

        Raises:
            UnsupportedLayout: The cache has another layout version.
        """
        try:
            with disk_errors("opening the cache", self.home):
                found = (self.home / "VERSION").read_text("utf-8", "replace").strip()[:40]
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return
            raise
        if found != LAYOUT_VERSION:
            raise UnsupportedLayout(
                f"the cache at {self.home} has another layout",
                detail=f"expected layout version {LAYOUT_VERSION}, got {found!r}",
                hint="use the program version that wrote it, or another cache with --home DIR",
            )

    def prepare(self) -> None:
        """Create the cache's root and its version file if they are not there.

        Raises:
            UnsupportedLayout: See :meth:`check_version`.
            StoreError: The disk refused.
        """
        self.check_version()
        with disk_errors("preparing the cache", self.home):
            make_directory(self.home)
            if not (self.home / "VERSION").exists():
                write_durably(self.home / "VERSION", f"{LAYOUT_VERSION}\n".encode())


def quote_name(key: str) -> str:
    """Return ``key`` as one safe file name: readable where it can be, never with a separator, never too long."""
    quoted = urllib.parse.quote(key, safe="@+=,").replace(".", "%2E") if key in {".", ".."} else _quote(key)
    if len(quoted) <= _MAX_QUOTED:
        return quoted
    return f"{quoted[:120]}-{hashlib.sha256(key.encode()).hexdigest()}"


def _quote(key: str) -> str:
    return urllib.parse.quote(key, safe="@+=,")


def unquote_name(name: str) -> str:
    """Return the key a short quoted name stands for; a long one stays cut."""
    return urllib.parse.unquote(name)
